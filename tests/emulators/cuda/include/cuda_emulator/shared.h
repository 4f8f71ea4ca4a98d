#pragma once

// Shared memory. Every __shared__ array is between its own guards in one arena of 32-bit addresses, so that an
// out-of-bounds access is a fault even if it would hit another array on a device. At the start of each block all of
// it holds NaN.
//
// Input: the rewritten `__shared__ T name[N];` and `extern __shared__ T name[];`. Output: the memory.

#include "block.h"
#include "memory.h"

namespace cuda_emulator {

class SharedArena {
  public:
    static constexpr size_t ROOM  = 512 * 1024;  // for an array and its guards
    static constexpr size_t ROOMS = 4096;
    static constexpr size_t BYTES = ROOM * ROOMS;

    char * base = nullptr;  // nullptr until the first array

    // Returns room for another array.
    char * another() {
        if (used == ROOMS) {
            throw Fault("the emulator has no room for another shared array");
        }
        return begin() + ROOM * used++;
    }

    char * begin() {
        if (!base) {
            void * map = mmap(nullptr, BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (map == MAP_FAILED) {
                throw Fault("no address space for the emulator's shared memory");
            }
            base = static_cast<char *>(map);
        }
        return base;
    }

    bool contains(const void * address) { return address >= begin() && address < begin() + BYTES; }

  private:
    size_t used = 1;  // no array starts at address 0
};

inline SharedArena shared_arena;

// Shared memory of the running block, static and dynamic.
struct SharedUse {
    uint64_t block = 0;
    size_t   bytes = 0;
};

inline SharedUse shared_use;

class SharedArray {
  public:
    SharedArray(std::string name) : name(std::move(name)) { all().push_back(this); }
    SharedArray(const SharedArray &) = delete;

    // Fills with NaN, once per block; allocates again if the size or the placement has changed.
    char * begin_block(size_t bytes, size_t alignment) {
        if (block_number == block.number) {
            return memory.begin;
        }
        block_number = block.number;
        if (!memory.begin || memory.bytes != bytes || placement != options.placement) {
            room      = room ? room : shared_arena.another();
            placement = options.placement;
            memory.open(room, SharedArena::ROOM, bytes, alignment, placement);
        }
        memory.poison();
        shared_use = { block.number, bytes + (shared_use.block == block.number ? shared_use.bytes : 0) };
        if (shared_use.bytes > options.shared_limit) {
            fail(format("the block's shared memory reaches %zu bytes with '%s'; this device has %zu", shared_use.bytes,
                        name.c_str(), options.shared_limit));
        }
        return memory.begin;
    }

    // The array whose room contains the address.
    static SharedArray * find(const char * address) {
        for (SharedArray * array : all()) {
            if (array->room && address >= array->room && address < array->room + SharedArena::ROOM) {
                return array;
            }
        }
        return nullptr;
    }

    std::string where(const char * address) const {
        return memory.where(address, format("the shared array '%s' of %zu bytes", name.c_str(), memory.bytes));
    }

    static std::vector<SharedArray *> & all() {
        static std::vector<SharedArray *> arrays;
        return arrays;
    }

    Guarded memory;

  private:
    std::string name;
    char *      room         = nullptr;
    uint64_t    block_number = 0;
    Placement   placement    = Placement::end;
};

inline void require_kernel(const char * name) {
    if (!block.current) {
        fail(format("the shared array '%s' is declared outside of a kernel; declare it inside", name));
    }
}

// `__shared__ T name;`. A lambda as TAG distinguishes arrays of one type, and those of a template's instances.
template <class T, class TAG> T & shared_variable(const char * name, size_t alignment, TAG) {
    static SharedArray array(name);
    require_kernel(name);
    return *reinterpret_cast<T *>(array.begin_block(sizeof(T), alignment > alignof(T) ? alignment : alignof(T)));
}

// The dynamic shared memory of the launch.
struct DynamicShared {
    SharedArray array{ "dynamic" };
    size_t      bytes = 0;
};

inline DynamicShared dynamic_shared_memory;

// `extern __shared__ T name[];`
template <class T> T * dynamic_shared(const char * name) {
    require_kernel(name);
    return reinterpret_cast<T *>(dynamic_shared_memory.array.begin_block(dynamic_shared_memory.bytes, 16));
}

// Reports bytes that a kernel wrote outside its shared arrays without touching a guard; empty if none.
inline std::string shared_trespasses() {
    std::string text;
    for (SharedArray * array : SharedArray::all()) {
        const char * byte = array->memory.trespass();
        text              = byte ? "a write " + array->where(byte) : text;
    }
    return text;
}

}  // namespace cuda_emulator

inline size_t __cvta_generic_to_shared(const void * pointer) {
    if (!cuda_emulator::shared_arena.contains(pointer)) {
        cuda_emulator::fail("__cvta_generic_to_shared: the pointer is not one to shared memory");
    }
    return size_t(static_cast<const char *>(pointer) - cuda_emulator::shared_arena.begin());
}
