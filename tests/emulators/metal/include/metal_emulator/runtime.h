#pragma once

// What a compiled kernel and the emulated device know of each other. The device (device/) defines the functions; kernels
// are shared objects linked to it.

#include "emulator/place.h"

#include <cstddef>
#include <cstdint>

namespace metal_emulator {

using emulator::Place;

struct Size {
    uint32_t x = 1, y = 1, z = 1;

    uint64_t count() const { return uint64_t(x) * y * z; }
};

// A thread of the running threadgroup.
struct Position {
    Size threads_per_threadgroup, threadgroups_per_grid, threadgroup_position_in_grid, thread_position_in_threadgroup;
    uint32_t thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup;
};

Position position();
unsigned lane_index();  // thread_index_in_simdgroup

// Arguments of the running dispatch by index; nullptr if not set.
void * buffer_argument(unsigned index);
void * threadgroup_argument(unsigned index);

// A `threadgroup` array that is declared in a kernel; `key` is one address for each declaration.
void * threadgroup_array(const void * key, size_t bytes, size_t alignment, const char * name, Place place);

// threadgroup_barrier. orders_…: also a fence of threadgroup or device memory.
void wait_for_threadgroup(bool orders_threadgroup, bool orders_device, Place place);

// Waits until all living lanes of the simdgroup are here. The last one calls complete(lanes, alive), where lanes[i] is
// lane i's `mine`.
using Complete = void (*)(void * const * lanes, uint32_t alive);
void meet_simdgroup(void * mine, Complete complete, const char * what, Place place);

// An access of an atomic function: no race with other atomic accesses.
void see_atomic(const void * address, size_t bytes);

// Ends the dispatch with a Fault.
[[noreturn]] void fail_kernel(const char * text, Place place);

enum class ConstantType { boolean, int16, int32 };

// A kernel file's `constant T name [[function_constant(index)]]`.
struct FunctionConstant {
    unsigned                 index;
    ConstantType             type;
    void *                   value;
    const char *             name;
    const FunctionConstant * next;
};

// What a kernel's shared object exports as metal_emulator_kernel.
struct Kernel {
    void (*run_thread)();
    const FunctionConstant * const * constants;
    uint64_t                         buffers;  // indices of the arguments, as bits
};

}  // namespace metal_emulator
