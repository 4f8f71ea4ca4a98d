#pragma once

// __half and __nv_bfloat16: 16-bit values computed in float and rounded to nearest even after each operation, as on a
// device.

#include "vector_types.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace cuda_emulator {

template <class To, class From> To bits_as(const From & from) {
    static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<From>);
    To to;
    memcpy(static_cast<void *>(&to), &from, sizeof(to));
    return to;
}

struct HalfFormat {
#if defined(__F16C__)  // as assembly: immintrin.h would take a third of the time to compile a kernel
    using FourFloats [[gnu::vector_size(16)]]  = float;
    using EightHalves [[gnu::vector_size(16)]] = uint16_t;
#endif

    static float widen(uint16_t bits) {
#if defined(__F16C__)
        FourFloats wide;
        asm("vcvtph2ps %1, %0" : "=x"(wide) : "x"(EightHalves{ bits }));
        return wide[0];
#else
        const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
        if (rest >= 0x7c00) {  // infinity or NaN
            return bits_as<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
        }
        if (rest < 0x400) {  // subnormal: a multiple of 2^-24
            return bits_as<float>(sign | bits_as<uint32_t>(float(rest) * 0x1p-24f));
        }
        return bits_as<float>(sign | ((rest << 13) + (112 << 23)));
#endif
    }

    static uint16_t round(float value) {
#if defined(__F16C__)
        EightHalves narrow;
        asm("vcvtps2ph $0, %1, %0" : "=x"(narrow) : "x"(FourFloats{ value }));
        return narrow[0];
#else
        const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
        if (rest > 0x7f800000) {
            return uint16_t(sign | 0x7fff);
        }
        if (rest >= 0x477ff000) {  // 65520: half way between the largest half and the next value
            return uint16_t(sign | 0x7c00);
        }
        if (rest < 0x38800000) {  // subnormal: adding 0.5 rounds to the last bit of a half
            return uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000));
        }
        return uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1)) >> 13) - 0x1c000);
#endif
    }
};

struct BfloatFormat {
    static float widen(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

    static uint16_t round(float value) {
        const uint32_t bits = bits_as<uint32_t>(value);
        if ((bits & 0x7fffffff) > 0x7f800000) {
            return 0x7fff;
        }
        return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

template <class FORMAT> struct Narrow {
    using Format = FORMAT;
    uint16_t bits;

    Narrow() = default;
    Narrow(float value) : bits(FORMAT::round(value)) {}
    Narrow(double value) : bits(FORMAT::round(float(value))) {}
    template <class T, class = std::enable_if_t<std::is_integral_v<T>>> Narrow(T value) : Narrow(float(value)) {}

    operator float() const { return FORMAT::widen(bits); }

    Narrow & operator+=(Narrow other) { return *this = Narrow(float(*this) + float(other)); }
    Narrow & operator-=(Narrow other) { return *this = Narrow(float(*this) - float(other)); }
    Narrow & operator*=(Narrow other) { return *this = Narrow(float(*this) * float(other)); }
    Narrow & operator/=(Narrow other) { return *this = Narrow(float(*this) / float(other)); }

    friend Narrow operator+(Narrow a, Narrow b) { return a += b; }
    friend Narrow operator-(Narrow a, Narrow b) { return a -= b; }
    friend Narrow operator*(Narrow a, Narrow b) { return a *= b; }
    friend Narrow operator/(Narrow a, Narrow b) { return a /= b; }
    friend Narrow operator-(Narrow a) {
        a.bits ^= 0x8000;
        return a;
    }
    friend bool operator==(Narrow a, Narrow b) { return float(a) == float(b); }
    friend bool operator!=(Narrow a, Narrow b) { return float(a) != float(b); }
    friend bool operator<(Narrow a, Narrow b) { return float(a) < float(b); }
    friend bool operator>(Narrow a, Narrow b) { return float(a) > float(b); }
    friend bool operator<=(Narrow a, Narrow b) { return float(a) <= float(b); }
    friend bool operator>=(Narrow a, Narrow b) { return float(a) >= float(b); }
};

template <class FORMAT> struct alignas(4) NarrowPair {
    using Value = Narrow<FORMAT>;
    Value x, y;

    NarrowPair() = default;
    NarrowPair(Value x, Value y) : x(x), y(y) {}

    friend NarrowPair operator+(NarrowPair a, NarrowPair b) { return { a.x + b.x, a.y + b.y }; }
    friend NarrowPair operator-(NarrowPair a, NarrowPair b) { return { a.x - b.x, a.y - b.y }; }
    friend NarrowPair operator*(NarrowPair a, NarrowPair b) { return { a.x * b.x, a.y * b.y }; }
    friend NarrowPair operator/(NarrowPair a, NarrowPair b) { return { a.x / b.x, a.y / b.y }; }
    friend NarrowPair operator-(NarrowPair a) { return { -a.x, -a.y }; }
    NarrowPair &      operator+=(NarrowPair other) { return *this = *this + other; }
    NarrowPair &      operator-=(NarrowPair other) { return *this = *this - other; }
    NarrowPair &      operator*=(NarrowPair other) { return *this = *this * other; }
};

}  // namespace cuda_emulator

using __half         = cuda_emulator::Narrow<cuda_emulator::HalfFormat>;
using __half2        = cuda_emulator::NarrowPair<cuda_emulator::HalfFormat>;
using __nv_bfloat16  = cuda_emulator::Narrow<cuda_emulator::BfloatFormat>;
using __nv_bfloat162 = cuda_emulator::NarrowPair<cuda_emulator::BfloatFormat>;
using half           = __half;
using half2          = __half2;
using nv_bfloat16    = __nv_bfloat16;
using nv_bfloat162   = __nv_bfloat162;

// Intrinsics of both types.
// clang-format off
namespace cuda_emulator {

template <class F> Narrow<F> __hmax(Narrow<F> a, Narrow<F> b) { return Narrow<F>(std::fmax(float(a), float(b))); }
template <class F> NarrowPair<F> __hadd2(NarrowPair<F> a, NarrowPair<F> b) { return a + b; }
template <class F> NarrowPair<F> __hsub2(NarrowPair<F> a, NarrowPair<F> b) { return a - b; }
template <class F> NarrowPair<F> __hmul2(NarrowPair<F> a, NarrowPair<F> b) { return a * b; }
template <class F> NarrowPair<F> __hmax2(NarrowPair<F> a, NarrowPair<F> b) { return { __hmax(a.x, b.x), __hmax(a.y, b.y) }; }

}  // namespace cuda_emulator

// Of one type only. The functions above are found by argument-dependent lookup.
inline float         __half2float(__half a) { return float(a); }
inline __half        __float2half(float a) { return __half(a); }
inline __half        __float2half_rn(float a) { return __half(a); }
inline __half        __ushort_as_half(unsigned short a) { return cuda_emulator::bits_as<__half>(a); }
inline __half2       make_half2(__half x, __half y) { return { x, y }; }
inline __half2       __halves2half2(__half x, __half y) { return { x, y }; }
inline __half2       __half2half2(__half x) { return { x, x }; }
inline __half2       __floats2half2_rn(float x, float y) { return { x, y }; }
inline __half2       __float22half2_rn(float2 a) { return { a.x, a.y }; }
inline float2        __half22float2(__half2 a) { return { float(a.x), float(a.y) }; }
inline __half        __low2half(__half2 a) { return a.x; }
inline __half        __high2half(__half2 a) { return a.y; }
inline __half2       __lows2half2(__half2 a, __half2 b) { return { a.x, b.x }; }
inline __half2       __highs2half2(__half2 a, __half2 b) { return { a.y, b.y }; }
inline float         __low2float(__half2 a) { return float(a.x); }
inline float         __high2float(__half2 a) { return float(a.y); }

inline float         __bfloat162float(__nv_bfloat16 a) { return float(a); }
inline __nv_bfloat16 __float2bfloat16(float a) { return __nv_bfloat16(a); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return { x, y }; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return { a.x, a.y }; }
inline float2        __bfloat1622float2(__nv_bfloat162 a) { return { float(a.x), float(a.y) }; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
inline float         __low2float(__nv_bfloat162 a) { return float(a.x); }
inline float         __high2float(__nv_bfloat162 a) { return float(a.y); }
// clang-format on
