#pragma once

// Inline PTX other than tensor cores: the rewriter converts each statement to a call of a function in this
// file, or of `unknown_ptx`.

#include "arithmetic.h"
#include "async_copy.h"
#include "tensor_core.h"
#include "warp.h"

namespace cuda_emulator {

[[noreturn]] inline void unknown_ptx(Place place, const char * statement) {
    fail(format("PTX that the emulator does not know: \"%s\"; add it to tests/emulators/cuda/ptx.py", statement),
         place);
}

template <class T> char * global_pointer(T operand) {
    return (char *) uintptr_t(operand);
}

// The address in `[%0 + 16]`, before the offset.
template <class T> uintptr_t address_of(T operand) {
    return uintptr_t(operand);
}

template <class To, class From> void cp_async(Place place, To to, From from, unsigned count, unsigned given) {
    async_copy(shared_pointer(to), global_pointer(from), count, given, place);
}

template <class To, class From> void cp_async(Place place, To to, From from, unsigned count) {
    cp_async(place, to, from, count, count);
}

inline void cp_async_wait_all(Place place) {
    cp_async_commit(place);
    cp_async_wait(place, 0);
}

template <class T> void special_register(Place, T & to, unsigned value) {
    to = T(value);
}

inline void nothing(Place) {}

inline void grid_dependency_wait(Place) {
    block.current->waited = true;
}

}  // namespace cuda_emulator
