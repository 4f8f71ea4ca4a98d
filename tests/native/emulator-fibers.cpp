// Fibers that take turns: each finds its own values again after a switch. There are more values than registers that
// calls preserve, so that the compiler keeps values in each of these registers.

#include "emulator/fiber.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int FIBERS = 64, TURNS = 100, VALUES = 12;

volatile uint64_t integers[FIBERS][VALUES];
volatile double   numbers[FIBERS][VALUES];
char *            stacks;
void *            stack_pointers[FIBERS];
void *            host;
int               current, turns;

[[noreturn]] void fail(const char * what) {
    printf("fiber %d, turn %d: %s\n", current, turns, what);
    fflush(stdout);
    _Exit(1);
}

// The next fiber, and after the last turn the host.
[[gnu::noinline]] void yield() {
    void ** const self = &stack_pointers[current];
    if (turns == FIBERS * TURNS) {
        emulator_switch(self, host);
    }
    turns++;
    current = (current + 1) % FIBERS;
    emulator_switch(self, stack_pointers[current]);
}

void check_stack() {
    const char * const here = static_cast<const char *>(__builtin_frame_address(0));
    const char * const end  = stacks + (current + 1) * emulator::STACK_BYTES;
    if (reinterpret_cast<uintptr_t>(here) % 16) {
        fail("the stack is not aligned");
    }
    if (here < end - emulator::STACK_BYTES || here >= end) {
        fail("another stack");
    }
}

[[gnu::noinline]] void check(const uint64_t (&i)[VALUES], const double (&x)[VALUES]) {
    for (int n = 0; n < VALUES; n++) {
        if (i[n] != integers[current][n]) {
            fail("an integer is lost");
        }
        if (x[n] != numbers[current][n]) {
            fail("a number is lost");
        }
    }
}

// A function of its own, so that its registers contain these values only.
[[gnu::noinline]] void turn() {
    volatile uint64_t * i = integers[current];
    volatile double *   x = numbers[current];

    const uint64_t a = i[0], b = i[1], c = i[2], d = i[3], e = i[4], f = i[5], g = i[6], h = i[7], k = i[8], l = i[9],
                   m = i[10], n = i[11];
    const double   o = x[0], p = x[1], q = x[2], r = x[3], s = x[4], t = x[5], u = x[6], v = x[7], w = x[8], y = x[9],
                   z = x[10], last = x[11];
    check_stack();
    yield();
    check({ a, b, c, d, e, f, g, h, k, l, m, n }, { o, p, q, r, s, t, u, v, w, y, z, last });
}

void fiber() {
    while (true) {
        turn();
    }
}

}  // namespace

int main() {
    const size_t bytes = FIBERS * emulator::STACK_BYTES;
    stacks = static_cast<char *>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (int f = 0; f < FIBERS; f++) {
        for (int n = 0; n < VALUES; n++) {
            integers[f][n] = uint64_t(f * VALUES + n + 1) * 0x9e3779b97f4a7c15u;
            numbers[f][n]  = 1.0 / (f * VALUES + n + 1);
        }
        stack_pointers[f] = emulator::first_frame(stacks + (f + 1) * emulator::STACK_BYTES, size_t(f), fiber);
    }
    emulator_switch(&host, stack_pointers[0]);
    printf("%d turns\n", turns);
    return 0;
}
