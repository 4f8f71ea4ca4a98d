// Preloaded into a program: /proc/meminfo says that $AVAILABLE KiB of memory are available.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

FILE * fopen(const char * path, const char * mode) {
    static FILE * (*next)(const char *, const char *);
    static char text[256];
    if (next == NULL) {
        *(void **) &next = dlsym(RTLD_NEXT, "fopen");
    }
    if (strcmp(path, "/proc/meminfo") != 0) {
        return next(path, mode);
    }
    snprintf(text, sizeof(text), "MemTotal:       99999999 kB\nMemAvailable:   %s kB\n", getenv("AVAILABLE"));
    return fmemopen(text, strlen(text), "r");
}
