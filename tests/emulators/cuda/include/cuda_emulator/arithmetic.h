#pragma once

// The device's arithmetic functions. The fast ones (__expf, ex2.approx …) are as far from the truth as the formula that
// the programming guide gives for them; the last bit of a device is not imitated.

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

namespace cuda_emulator {

// ex2.approx.ftz: subnormal results are zero.
inline float exp2_flushed(float x) {
    const float y = exp2f(x);
    return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}

// cvt.rna.tf32.f32: to 10 bits of mantissa, halves away from zero.
inline uint32_t to_tf32(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    return std::isfinite(x) ? (bits + 0x1000) & 0xffffe000 : bits;
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
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float __fadd_rn(float x, float y) { volatile float z = x + y; return z; }  // never part of an FMA
inline float __fsub_rn(float x, float y) { volatile float z = x - y; return z; }
inline float __fmul_rn(float x, float y) { volatile float z = x * y; return z; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __int_as_float(int x) { return cuda_emulator::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::bits_as<float>(x); }
inline int __float_as_int(float x) { return cuda_emulator::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_emulator::bits_as<unsigned>(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }
inline int __float2int_ru(float x) { return int(std::ceil(x)); }
inline unsigned __float2uint_rn(float x) { return unsigned(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline unsigned __float_to_tf32(float x) { return cuda_emulator::to_tf32(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
inline int __mulhi(int x, int y) { return int(int64_t(x) * y >> 32); }
// clang-format on

inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; i++) {
        result |= (x >> i & 1) << (31 - i);
    }
    return result;
}

// Byte i of the result is the one that nibble i of `selector` names of the eight bytes of x and y; its highest bit
// spreads the sign instead.
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

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return unsigned((uint64_t(high) << 32 | low) << (by & 31) >> 32);
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
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

// Byte by byte: differences; 0xff where they differ.
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

// Loads with a hint for the caches.
template <class T> T __ldg(const T * at) {
    return *at;
}

template <class T> T __ldcg(const T * at) {
    return *at;
}

template <class T> T __ldcs(const T * at) {
    return *at;
}

template <class T> T __ldca(const T * at) {
    return *at;
}

template <class T> void __stcg(T * at, T value) {
    *at = value;
}

template <class T> void __stcs(T * at, T value) {
    *at = value;
}

// Atomics: threads are never interrupted.
template <class T, class F> T cuda_emulator_exchange(T * at, F && become) {
    const T before = *at;
    *at            = become(before);
    return before;
}

template <class T, class V> T atomicAdd(T * at, V value) {
    return cuda_emulator_exchange(at, [&](T before) { return T(before + T(value)); });
}

template <class T, class V> T atomicSub(T * at, V value) {
    return cuda_emulator_exchange(at, [&](T before) { return T(before - T(value)); });
}

template <class T, class V> T atomicMax(T * at, V value) {
    return cuda_emulator_exchange(at, [&](T before) { return std::max(before, T(value)); });
}

template <class T, class V> T atomicMin(T * at, V value) {
    return cuda_emulator_exchange(at, [&](T before) { return std::min(before, T(value)); });
}

template <class T, class V> T atomicExch(T * at, V value) {
    return cuda_emulator_exchange(at, [&](T) { return T(value); });
}

template <class T, class V> T atomicOr(T * at, V value) {
    return cuda_emulator_exchange(at, [&](T before) { return T(before | T(value)); });
}

template <class T, class V> T atomicAnd(T * at, V value) {
    return cuda_emulator_exchange(at, [&](T before) { return T(before & T(value)); });
}

template <class T, class V> T atomicCAS(T * at, V expected, V value) {
    return cuda_emulator_exchange(at, [&](T before) { return before == T(expected) ? T(value) : before; });
}

inline void __threadfence() {}

inline void __threadfence_block() {}

inline void __threadfence_system() {}

inline void __nanosleep(unsigned) {}

[[noreturn]] inline void __trap(cuda_emulator::Place place = cuda_emulator::Place::here()) {
    cuda_emulator::fail("__trap", place);
}
