#pragma once

// Fibers: each runs one thread of a threadgroup. A switch saves only the callee-saved registers of the C calling convention (no
// signal mask, no floating-point modes), so that it takes a few nanoseconds.
//
// Input: an entry function that never returns. Output: a stack pointer to switch to. Stacks are between guard pages and
// are reused by the next threadgroup.

#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <vector>

extern "C" void metal_emulator_switch(void ** save, void * load);

#if defined(__x86_64__)
asm(R"(
.text
.weak metal_emulator_switch
.type metal_emulator_switch, @function
metal_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size metal_emulator_switch, .-metal_emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.weak metal_emulator_switch
.type metal_emulator_switch, %function
metal_emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size metal_emulator_switch, .-metal_emulator_switch
)");
#else
#error "the Metal emulator has no fiber switch for this processor: add one to fiber.h"
#endif

namespace metal_emulator {

// One region of address space: arrays of lanes, then stacks with guards.
class Stacks {
  public:
    static constexpr size_t GUARD = 64 * 1024;
    static constexpr size_t BYTES = 128 * 1024;
    static constexpr size_t LANES = 64 * 1024;

    Stacks() {
        void * map = mmap(nullptr, TOTAL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED) {
            throw Fault("no memory for the stacks of the emulated threads");
        }
        begin = static_cast<char *>(map);
    }

    bool contains(const void * address) const { return size_t(static_cast<const char *>(address) - begin) < TOTAL; }

    // Room for the arguments of a simdgroup's lanes.
    void ** lanes(size_t simdgroup) { return reinterpret_cast<void **>(begin) + SIMDGROUP * simdgroup; }

    // Returns a stack pointer that starts `entry` on the stack of that number.
    void * start(size_t number, void (*entry)()) {
        while (guarded <= number) {
            mprotect(begin + LANES + guarded++ * (GUARD + BYTES), GUARD, PROT_NONE);
        }
        // Stacks that start at the same offset of a page would share a few sets of the L1 cache.
        char *  top  = begin + LANES + (number + 1) * (GUARD + BYTES) - (number * 9 % 64) * 64;
        void ** slot = reinterpret_cast<void **>(top);
#if defined(__x86_64__)
        slot -= 8;  // six registers, the return address; the stack is 8 bytes off 16-byte alignment, as after a call
        slot[6] = reinterpret_cast<void *>(entry);
        slot[7] = nullptr;
        for (int i = 0; i < 6; i++) {
            slot[i] = nullptr;
        }
#else
        slot -= 20;
        memset(slot, 0, 160);
        slot[11] = reinterpret_cast<void *>(entry);  // x30
#endif
        return slot;
    }

  private:
    static constexpr size_t TOTAL = LANES + MAX_THREADS * (GUARD + BYTES);

    char * begin;
    size_t guarded = 0;
};

}  // namespace metal_emulator
