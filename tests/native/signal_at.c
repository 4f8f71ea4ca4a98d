// Preloaded into a server. Raises SIGTERM once in its main thread, at the place SIGNAL_AT. `sigaction`: right after the
// server installs its handler, before it waits for requests. `pthread_cond_broadcast`: where it notifies the threads that
// wait for its queue after a decode, while it holds the queue's mutex.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static atomic_bool handled;  // SIGTERM has a handler
static atomic_bool sent;

static void signal_at(const char * place) {
    const char * chosen = getenv("SIGNAL_AT");
    if (chosen && strcmp(chosen, place) == 0 && handled && gettid() == getpid() && !atomic_exchange(&sent, 1)) {
        raise(SIGTERM);
    }
}

int sigaction(int number, const struct sigaction * action, struct sigaction * old) {
    int (*next)(int, const struct sigaction *, struct sigaction *);
    *(void **) &next = dlsym(RTLD_NEXT, "sigaction");
    const int result = next(number, action, old);
    if (number == SIGTERM && action && action->sa_handler != SIG_DFL) {
        handled = 1;
        signal_at("sigaction");
    }
    return result;
}

int pthread_cond_broadcast(pthread_cond_t * condition) {
    int (*next)(pthread_cond_t *);
    *(void **) &next = dlsym(RTLD_NEXT, "pthread_cond_broadcast");
    signal_at("pthread_cond_broadcast");
    return next(condition);
}
