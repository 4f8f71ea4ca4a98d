#pragma once

// CHECK(x): where x does not hold the program says so and ends with status 1.
// expect(good, what): counts the check; where it fails the program says so and goes on. report() ends such a program.

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

// Prints the counts; the program's exit status, which is a failure too where nothing was checked.
inline int report() {
    printf("%d checks, %d failed\n", n_done, n_failed);
    return n_failed != 0 || n_done == 0;
}
