#pragma once

// Stacks of the fibers that run CUDA threads, between guard pages; they are reused by the next block.

#include "emulator/fiber.h"
#include "options.h"

#include <unistd.h>

#include <vector>

namespace cuda_emulator {

class Stacks {
  public:
    static constexpr size_t GUARD = emulator::STACK_GUARD;
    static constexpr size_t BYTES = emulator::STACK_BYTES;

    // Returns a stack pointer that starts `entry` on the stack of that number.
    void * start(size_t number, void (*entry)()) {
        while (tops.size() <= number) {
            tops.push_back(make());
        }
        return emulator::first_frame(tops[number], number, entry);
    }

    bool is_guard(const char * address) const {
        for (const char * top : tops) {
            if (address < top - BYTES && address >= top - BYTES - GUARD) {
                return true;
            }
        }
        return false;
    }

  private:
    std::vector<char *> tops;

    static char * make() {
        void * map =
            mmap(nullptr, GUARD + BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED || mprotect(map, GUARD, PROT_NONE) != 0) {
            throw Fault("no memory for the stack of another emulated thread");
        }
        return static_cast<char *>(map) + GUARD + BYTES;
    }
};

}  // namespace cuda_emulator
