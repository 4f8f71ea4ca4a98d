#pragma once

// Stacks of the fibers that run the threads of a threadgroup, in one region of address space: arrays of lanes, then
// stacks between guard pages. They are reused by the next threadgroup.

#include "emulator.h"
#include "emulator/fiber.h"

namespace metal_emulator {

class Stacks {
  public:
    static constexpr size_t GUARD = emulator::STACK_GUARD;
    static constexpr size_t BYTES = emulator::STACK_BYTES;
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
        return emulator::first_frame(begin + LANES + (number + 1) * (GUARD + BYTES), number, entry);
    }

  private:
    static constexpr size_t TOTAL = LANES + MAX_THREADS * (GUARD + BYTES);

    char * begin;
    size_t guarded = 0;
};

}  // namespace metal_emulator
