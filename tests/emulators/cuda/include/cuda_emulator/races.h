#pragma once

// Races in shared memory. In programs compiled for it (compile_objects' `races`) the compiler inserts a call at every
// memory access, as for its own thread sanitizer. These functions check shared memory only; no sanitizer runtime is
// linked.
//
// Two accesses of one byte, one of them a write, by two threads of a block need a barrier of the block between them;
// within a warp __syncwarp is enough. As specified by CUDA, a shuffle does not order memory accesses. Violations are
// Faults that name both lines, in whatever order the threads ran.

#include "block.h"
#include "launch.h"
#include "shared.h"

#if defined(__SANITIZE_THREAD__)
#define CUDA_EMULATOR_RACES 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CUDA_EMULATOR_RACES 1
#endif
#endif

#if !defined(CUDA_EMULATOR_RACES)
#define CUDA_EMULATOR_UNSEEN
#else
#define CUDA_EMULATOR_UNSEEN __attribute__((no_sanitize("thread")))

namespace cuda_emulator {

// The place of an access: an instruction or, with a line, the name of a file.
struct Site {
    const void * at   = nullptr;
    int          line = 0;
};

// Time and thread of an access; times are those of Block::time and Warp::time.
struct Stamp {
    uint32_t block_time = 0, warp_time = 0;
    uint16_t thread = 0;
    bool     lanes = false, warps = false;  // several lanes of a warp, several warps, since those times
    Site     site;
};

struct Cell {
    Stamp written, read;
};

// One for each byte of the arena, in address space that is only backed by memory where used.
inline Cell * cells() {
    static Cell * const all = [] {
        void * map = mmap(nullptr, SharedArena::BYTES * sizeof(Cell), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return map == MAP_FAILED ? nullptr : static_cast<Cell *>(map);
    }();
    return all;
}

inline Cell * const race_cells = cells();

inline std::string text_of(const Site & site) {
    return site.line ? text_of(Place{ static_cast<const char *>(site.at), site.line }) : symbol(site.at).second;
}

[[noreturn]] inline void
fail_race(const char * byte, const char * now, const Stamp & before, const char * then, const Site & site) {
    const SharedArray * array = SharedArray::find(byte);
    fail(text_of(site) + ": a race: this thread " + now + " " + (array ? array->where(byte) : "shared memory") +
         ", which " + name_of(block.threads[before.thread]) + (before.lanes || before.warps ? " and others " : " ") +
         then + " at " + text_of(before.site) + " without a barrier between");
}

// Whether an access with that stamp may be concurrent with one of this thread now.
CUDA_EMULATOR_UNSEEN inline bool meets(const Stamp & stamp, uint32_t block_time, uint32_t warp_time, unsigned thread) {
    if (stamp.block_time != block_time) {
        return false;
    }
    if (stamp.warps || stamp.thread / 32 != thread / 32) {
        return true;
    }
    return stamp.warp_time == warp_time && (stamp.lanes || stamp.thread != thread);
}

CUDA_EMULATOR_UNSEEN inline void see(const void * address, size_t count, bool write, Site site) {
    char * const byte = static_cast<char *>(const_cast<void *>(address));
    if (block.current && !block.current->waited) {
        block.current->waited = true;  // the next line's own accesses come here too
        if (device_memory.find(address)) {
            fail(text_of(site) + ": this kernel is launched early and accesses a buffer before griddepcontrol.wait");
        }
        block.current->waited = false;
    }
    if (!block.current || size_t(byte - shared_arena.base) >= SharedArena::BYTES) {
        return;
    }
    const Warp &   warp       = *block.current->warp;
    const unsigned thread     = 32 * warp.number + block.current->lane;
    const uint32_t block_time = block.time, warp_time = warp.time;
    for (size_t i = 0; i < count; i++) {
        Cell & cell = race_cells[byte + i - shared_arena.base];
        if (meets(cell.written, block_time, warp_time, thread)) {
            fail_race(byte + i, write ? "writes" : "reads", cell.written, "wrote", site);
        }
        if (write) {
            if (meets(cell.read, block_time, warp_time, thread)) {
                fail_race(byte + i, "writes", cell.read, "read", site);
            }
            cell.written.block_time = block_time;
            cell.written.warp_time  = warp_time;
            cell.written.thread     = uint16_t(thread);
            cell.written.site       = site;
        } else {
            Stamp &    read  = cell.read;
            const bool now   = read.block_time == block_time;
            const bool warps = now && (read.warps || read.thread / 32 != thread / 32);
            const bool lanes = now && read.warp_time == warp_time && (read.lanes || read.thread != thread);
            read.warps       = warps;
            read.lanes       = lanes;
            read.block_time  = block_time;
            read.warp_time   = warp_time;
            read.thread      = uint16_t(thread);
            read.site        = site;
        }
    }
}

// The call with this return address.
CUDA_EMULATOR_UNSEEN inline Site caller(const void * returns_to) {
    return { static_cast<const char *>(returns_to) - 1, 0 };
}

}  // namespace cuda_emulator

// The compilers' names: __tsan_read4(address), …
#define CUDA_EMULATOR_SEEN(NAME, BYTES, WRITE)                                                                         \
    extern "C" CUDA_EMULATOR_UNSEEN __attribute__((weak)) void NAME(void * address) {                                  \
        cuda_emulator::see(address, BYTES, WRITE, cuda_emulator::caller(__builtin_return_address(0)));                 \
    }
#define CUDA_EMULATOR_SEEN_BOTH(BYTES)                                                                                 \
    CUDA_EMULATOR_SEEN(__tsan_read##BYTES, BYTES, false)                                                               \
    CUDA_EMULATOR_SEEN(__tsan_write##BYTES, BYTES, true)                                                               \
    CUDA_EMULATOR_SEEN(__tsan_unaligned_read##BYTES, BYTES, false)                                                     \
    CUDA_EMULATOR_SEEN(__tsan_unaligned_write##BYTES, BYTES, true)

CUDA_EMULATOR_SEEN_BOTH(1)
CUDA_EMULATOR_SEEN_BOTH(2)
CUDA_EMULATOR_SEEN_BOTH(4)
CUDA_EMULATOR_SEEN_BOTH(8)
CUDA_EMULATOR_SEEN_BOTH(16)

extern "C" {

CUDA_EMULATOR_UNSEEN __attribute__((weak)) void __tsan_read_range(void * address, size_t count) {
    cuda_emulator::see(address, count, false, cuda_emulator::caller(__builtin_return_address(0)));
}

CUDA_EMULATOR_UNSEEN __attribute__((weak)) void __tsan_write_range(void * address, size_t count) {
    cuda_emulator::see(address, count, true, cuda_emulator::caller(__builtin_return_address(0)));
}

__attribute__((weak)) void __tsan_init() {}

__attribute__((weak)) void __tsan_func_entry(void *) {}

__attribute__((weak)) void __tsan_func_exit() {}

__attribute__((weak)) void __tsan_vptr_update(void *, void *) {}

__attribute__((weak)) void __tsan_vptr_read(void *) {}

// From the host's standard library; a program has one thread.
CUDA_EMULATOR_UNSEEN __attribute__((weak)) int __tsan_atomic32_load(const volatile int * at, int) {
    return *at;
}

CUDA_EMULATOR_UNSEEN __attribute__((weak)) void __tsan_atomic32_store(volatile int * at, int value, int) {
    *at = value;
}

CUDA_EMULATOR_UNSEEN __attribute__((weak)) int __tsan_atomic32_fetch_add(volatile int * at, int value, int) {
    const int before = *at;
    *at              = before + value;
    return before;
}

}  // extern "C"

#endif

namespace cuda_emulator {

// Records an access of the emulator itself to shared memory on behalf of this thread.
CUDA_EMULATOR_UNSEEN inline void see_access([[maybe_unused]] const void * address,
                                            [[maybe_unused]] size_t       count,
                                            [[maybe_unused]] bool         write,
                                            [[maybe_unused]] Place        place) {
#if defined(CUDA_EMULATOR_RACES)
    see(address, count, write, { place.file, place.line });
#endif
}

}  // namespace cuda_emulator
