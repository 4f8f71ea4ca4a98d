#pragma once

// Inline PTX other than tensor cores and copies: the rewriter converts each statement to a call of a function in this
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

inline void cvt_tf32(Place, Out<1> to, const In<1> & from) {
    const uint32_t bits = to_tf32(bits_as<float>(from.bits[0]));
    put(to, &bits);
}

// The first source goes to the upper half.
template <class FORMAT> void cvt_pair(Place, Out<1> to, const In<1> & upper, const In<1> & lower) {
    const uint32_t bits =
        uint32_t(FORMAT::round(bits_as<float>(upper.bits[0]))) << 16 | FORMAT::round(bits_as<float>(lower.bits[0]));
    put(to, &bits);
}

template <float (*FUNCTION)(float)> void unary(Place, Out<1> to, const In<1> & from) {
    const uint32_t bits = bits_as<uint32_t>(FUNCTION(bits_as<float>(from.bits[0])));
    put(to, &bits);
}

inline float reciprocal(float x) {
    return 1.0f / x;
}

inline float tanh_approx(float x) {
    return tanhf(x);
}

inline void prmt(Place, Out<1> to, const In<1> & a, const In<1> & b, const In<1> & selector) {
    const uint32_t bits = __byte_perm(a.bits[0], b.bits[0], selector.bits[0]);
    put(to, &bits);
}

// Bit i of `table` is the result if the bits of a, b, c form the number i.
inline void lop3(Place, Out<1> to, const In<1> & a, const In<1> & b, const In<1> & c, const In<1> & table) {
    uint32_t bits = 0;
    for (int i = 0; i < 8; i++) {
        if (table.bits[0] >> i & 1) {
            bits |=
                (i & 4 ? a.bits[0] : ~a.bits[0]) & (i & 2 ? b.bits[0] : ~b.bits[0]) & (i & 1 ? c.bits[0] : ~c.bits[0]);
        }
    }
    put(to, &bits);
}

inline void bar_sync(Place place, unsigned number, unsigned count = 0) {
    if (number >= Block::BARRIERS || count % 32 || count > block.threads.size()) {
        fail(format("bar.sync %u, %u: barriers have numbers below 16 and a multiple of 32 threads, those of the block "
                    "at most",
                    number, count),
             place);
    }
    wait_at_barrier(number, count, 0, "bar.sync", place);
}

inline void bar_warp_sync(Place place, unsigned mask) {
    meet_warp(mask, "bar.warp.sync", place);
}

template <class T> void special_register(Place, T & to, unsigned value) {
    to = T(value);
}

inline void nothing(Place) {}

inline void grid_dependency_wait(Place) {
    block.current->waited = true;
}

}  // namespace cuda_emulator
