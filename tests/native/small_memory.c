// Preloaded into a program: files below /proc and /sys are those in the folder $ROOT, if that is set. Prints each call
// that reads a mapped file as a whole (MAP_POPULATE, MADV_POPULATE_READ) and each advice on huge pages, with the address.
// If $OLD_KERNEL is set, MADV_POPULATE_READ fails as before Linux 5.14.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

FILE * fopen(const char * path, const char * mode) {
    static FILE * (*next)(const char *, const char *);
    if (next == NULL) {
        *(void **) &next = dlsym(RTLD_NEXT, "fopen");
    }
    const char * root = getenv("ROOT");
    char         simulated[4096];
    if (root == NULL || (strncmp(path, "/proc/", 6) != 0 && strncmp(path, "/sys/", 5) != 0)) {
        return next(path, mode);
    }
    snprintf(simulated, sizeof(simulated), "%s%s", root, path);
    return next(simulated, mode);
}

void * mmap(void * address, size_t size, int protection, int flags, int fd, off_t offset) {
    static void * (*next)(void *, size_t, int, int, int, off_t);
    if (next == NULL) {
        *(void **) &next = dlsym(RTLD_NEXT, "mmap");
    }
    if (fd >= 0 && (flags & MAP_POPULATE) != 0) {
        fprintf(stderr, "MAP_POPULATE %p\n", address);
    }
    return next(address, size, protection, flags, fd, offset);
}

void * mmap64(void * address, size_t size, int protection, int flags, int fd, off_t offset) {
    return mmap(address, size, protection, flags, fd, offset);
}

int madvise(void * address, size_t size, int advice) {
    static int (*next)(void *, size_t, int);
    if (next == NULL) {
        *(void **) &next = dlsym(RTLD_NEXT, "madvise");
    }
    if (advice == MADV_HUGEPAGE || advice == MADV_NOHUGEPAGE) {
        fprintf(stderr, "%s %p\n", advice == MADV_HUGEPAGE ? "MADV_HUGEPAGE" : "MADV_NOHUGEPAGE", address);
    }
    if (advice == MADV_POPULATE_READ && getenv("OLD_KERNEL") != NULL) {
        errno = EINVAL;
        return -1;
    }
    if (advice == MADV_POPULATE_READ) {
        fprintf(stderr, "MADV_POPULATE_READ %p\n", address);
    }
    return next(address, size, advice);
}
