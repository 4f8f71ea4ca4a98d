#pragma once

// CHECK(x): if x is false, prints it and exits with status 1.
// expect(good, what): counts the check; if it fails, prints `what` and continues. report() ends such a program.

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#define CHECK(x)                                                                                                       \
    do {                                                                                                               \
        if (!(x)) {                                                                                                    \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #x);                                      \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

inline int n_done, n_failed;

__attribute__((format(printf, 1, 2))) inline std::string text(const char * format, ...) {
    char    result[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(result, sizeof(result), format, arguments);
    va_end(arguments);
    return result;
}

inline void expect(bool good, const std::string & what) {
    ++n_done;
    if (!good) {
        ++n_failed;
        printf("FAILED %s\n", what.c_str());
    }
}

// Prints the counts and returns the exit status, which is a failure if nothing was checked.
inline int report() {
    printf("%d checks, %d failed\n", n_done, n_failed);
    return n_failed != 0 || n_done == 0;
}
