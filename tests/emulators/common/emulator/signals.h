#pragma once

// Signals of a running kernel: an access to a guard page, an integer division by zero.

#include <signal.h>

namespace emulator {

// During its lifetime these signals call `handler` on a separate stack. The handler may switch to another stack and never
// return.
class CaughtSignals {
  public:
    explicit CaughtSignals(void (*handler)(int, siginfo_t *, void *)) {
        static char stack[64 * 1024];
        stack_t     other = {};
        other.ss_sp       = stack;
        other.ss_size     = sizeof(stack);
        sigaltstack(&other, nullptr);
        struct sigaction action = {};
        action.sa_sigaction     = handler;
        action.sa_flags         = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; i++) {
            sigaction(SIGNALS[i], &action, &before[i]);
        }
    }

    ~CaughtSignals() {
        for (int i = 0; i < 3; i++) {
            sigaction(SIGNALS[i], &before[i], nullptr);
        }
    }

    CaughtSignals(const CaughtSignals &) = delete;

  private:
    static constexpr int SIGNALS[3] = { SIGSEGV, SIGBUS, SIGFPE };
    struct sigaction     before[3];
};

}  // namespace emulator
