#pragma once

// Fibers: each runs one emulated thread. A switch saves only the callee-saved registers of the C calling convention (no
// signal mask, no floating-point modes), so that it takes a few nanoseconds.

#include <sys/mman.h>

#include <cstddef>
#include <cstring>

// Stores the stack pointer in `save` and continues at `load`.
extern "C" void emulator_switch(void ** save, void * load);

#if defined(__x86_64__)
asm(R"(
.text
.weak emulator_switch
.type emulator_switch, @function
emulator_switch:
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
.size emulator_switch, .-emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.weak emulator_switch
.type emulator_switch, %function
emulator_switch:
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
.size emulator_switch, .-emulator_switch
)");
#else
#error "the emulators have no fiber switch for this processor: add one to fiber.h"
#endif

namespace emulator {

constexpr size_t STACK_GUARD = 64 * 1024;
constexpr size_t STACK_BYTES = 128 * 1024;

// Returns a stack pointer to switch to: it starts `entry`, which never returns, on the stack that ends at `top`. `number`
// is that of the stack. It moves the start, because stacks that start at the same offset of a page would share a few sets
// of the L1 cache.
inline void * first_frame(char * top, size_t number, void (*entry)()) {
    void ** slot = reinterpret_cast<void **>(top - (number * 9 % 64) * 64);
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

}  // namespace emulator
