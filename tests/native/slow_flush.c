// Preloaded into a program: delays every fflush outside its main thread.
//
// llama.cpp's log prints from its own thread and flushes after each piece. With the delay, pieces are
// still queued when main() returns.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

int fflush(FILE * stream) {
    static int (*next)(FILE *);
    if (next == NULL) {
        *(void **) &next = dlsym(RTLD_NEXT, "fflush");
    }
    if (gettid() != getpid()) {
        usleep(200 * 1000);
    }
    return next(stream);
}
