#pragma once

// The device's arithmetic functions. The error of the fast ones (__expf, ex2.approx …) is that of the formula in the
// programming guide; the last bit of a device is not emulated.

#include "block.h"
#include "half.h"

#include <algorithm>
#include <climits>
#include <cmath>

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// For arguments of two types that promote to int.
inline int min(int x, int y) {
    return y < x ? y : x;
}

namespace cuda_emulator {

// ex2.approx.ftz: subnormal results are zero.
inline float exp2_flushed(float x) {
    const float y = exp2f(x);
    return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}

}  // namespace cuda_emulator

// clang-format off
inline float __expf(float x) { return cuda_emulator::exp2_flushed(x * 1.44269504f); }
inline float __exp10f(float x) { return cuda_emulator::exp2_flushed(x * 3.32192809f); }
inline float __logf(float x) { return log2f(x) * 0.693147181f; }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return cuda_emulator::exp2_flushed(y * log2f(x)); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float x, float y) { return x * (1.0f / y); }  // y: up to 2^126
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_emulator::bits_as<unsigned>(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
// clang-format on

// Byte i of the result is the one of the eight bytes of x and y that nibble i of `selector` selects; its highest bit
// replicates the sign instead.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes  = uint64_t(y) << 32 | x;
    unsigned       result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned nibble = selector >> 4 * i & 15;
        const unsigned byte   = unsigned(bytes >> 8 * (nibble & 7)) & 255;
        result |= (nibble & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return result;
}

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) {
        c += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
    }
    return c;
}

inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) {
        c += uint8_t(a >> 8 * i) * uint8_t(b >> 8 * i);
    }
    return c;
}

// Difference of each byte; 0xff if they differ.
inline unsigned __vsub4(unsigned a, unsigned b) {
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        out |= unsigned(uint8_t((a >> 8 * i) - (b >> 8 * i))) << 8 * i;
    }
    return out;
}

inline unsigned __vcmpne4(unsigned a, unsigned b) {
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        out |= uint8_t(a >> 8 * i) != uint8_t(b >> 8 * i) ? 0xffu << 8 * i : 0;
    }
    return out;
}

[[noreturn]] inline void __trap(cuda_emulator::Place place = cuda_emulator::Place::here()) {
    cuda_emulator::fail("__trap", place);
}
