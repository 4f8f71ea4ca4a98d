#pragma once

// AVX-512 in plain C++ and AVX2, so that a processor without it can run the branches of ggml_ops for AVX-512 (F, BW,
// DQ, VL, VNNI, BF16), and with amx-emulated.h those for AMX: tests/platforms/test_other_processors.py. The compiler includes
// this file first (-include), with the flags of a processor with AVX2, F16C and FMA. It takes the place of <immintrin.h>
// and defines the macros of the instruction sets, the types and, by their own names, the intrinsics that ggml_ops and the
// headers of ggml-cpu use. Other intrinsics are not declared: if one is needed, the compiler names it, and it must be
// added here.
//
// Semantics: the operation of each intrinsic in Intel's Intrinsics Guide, and of VDPBF16PS in the Software Developer's
// Manual. If AVX2 has the instruction for 32 bytes, and it moves nothing between the halves of a vector, each half is
// computed by AVX2. Others are loops over lanes.
//
// Limits:
// - What is undefined has a fixed value here (bytes 0xa5 above a cast).
// - _mm512_rcp14_ps has the error that the instruction may have at most, 2^-14; processors have less.
// - Infinite exponents of _mm512_scalef_ps, and NaN in _mm512_reduce_max_ps, are not as on a processor.
// - Sums of the lanes of floats have GCC's order. Other compilers may have another.
// - Not tested: what compilers make of AVX-512, and speed.

// Instead of immintrin.h (GCC, Clang), which declares the same names. These are the parts that haswell has.
#define _IMMINTRIN_H_INCLUDED
#define __IMMINTRIN_H
#include <smmintrin.h>
// after SSE
#include <avxintrin.h>
// after AVX
#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>

#include "emulated-bf16.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AVX512F__    1
#define __AVX512BW__   1
#define __AVX512DQ__   1
#define __AVX512VL__   1
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1

#define AVX512_EMULATED 1  // no assembler code with operands of 64 bytes

typedef float     __m512 __attribute__((vector_size(64), may_alias));
typedef double    __m512d __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef short     __m512bh __attribute__((vector_size(64), may_alias));
typedef uint16_t  __mmask16;
typedef uint32_t  __mmask32;
typedef uint64_t  __mmask64;

namespace avx512 {

// The lanes of a vector.
template <typename T, typename V> inline std::array<T, sizeof(V) / sizeof(T)> lanes(const V & x) {
    std::array<T, sizeof(V) / sizeof(T)> result;
    memcpy(&result, &x, sizeof(x));
    return result;
}

// A vector whose lane i is f(i), or its lower bits.
template <typename T, typename V = __m512i, typename F> inline V vector(const F & f) {
    std::array<T, sizeof(V) / sizeof(T)> result;
    for (size_t i = 0; i < result.size(); i++) {
        result[i] = (T) f(i);
    }
    V x;
    memcpy(&x, &result, sizeof(x));
    return x;
}

// A mask whose bit i is f(i).
template <typename Mask, typename F> inline Mask mask(const F & f) {
    Mask result = 0;
    for (size_t i = 0; i < 8 * sizeof(Mask); i++) {
        result |= (Mask) f(i) << i;
    }
    return result;
}

// Lane i of x if bit i is set, else of `otherwise`.
template <typename T, typename V, typename Mask> inline V choose(Mask bits, V x, V otherwise) {
    static_assert(8 * sizeof(Mask) == sizeof(V) / sizeof(T), "a bit per lane");
    const auto a = lanes<T>(x);
    const auto b = lanes<T>(otherwise);
    return vector<T, V>([&](size_t i) { return bits >> i & 1 ? a[i] : b[i]; });
}

template <typename Half, typename V> inline Half half(const V & x, int i) {
    static_assert(2 * sizeof(Half) == sizeof(V), "half of a vector");
    Half result;
    memcpy(&result, (const char *) &x + i * sizeof(result), sizeof(result));
    return result;
}

// f of the lower halves, and f of the upper ones.
template <typename Result, typename Half, typename F, typename... V>
inline Result by_halves(const F & f, const V &... x) {
    const auto low  = f(half<Half>(x, 0)...);
    const auto high = f(half<Half>(x, 1)...);
    static_assert(sizeof(low) + sizeof(high) == sizeof(Result), "two halves");
    Result result;
    memcpy(&result, &low, sizeof(low));
    memcpy((char *) &result + sizeof(low), &high, sizeof(high));
    return result;
}

// x as a wider vector, with the given byte above it.
template <typename V> inline __m512i extended(const V & x, int above) {
    __m512i result;
    memset(&result, above, sizeof(result));
    memcpy(&result, &x, sizeof(x));
    return result;
}

template <typename V> inline V load(const void * p) {
    V x;
    memcpy(&x, p, sizeof(x));
    return x;
}

inline void check_aligned(const void * p) {
    if ((uintptr_t) p % 64 != 0) {
        abort();  // as the processor's fault
    }
}

// Quarters of 16 bytes: two of x, two of y, each selected by two bits of n.
template <typename V> inline V shuffle_quarters(const V & x, const V & y, int n) {
    using Quarter = std::array<char, 16>;
    const auto a  = lanes<Quarter>(x);
    const auto b  = lanes<Quarter>(y);
    return vector<Quarter, V>([&](size_t i) { return (i < 2 ? a : b)[n >> 2 * i & 3]; });
}

// Bit by bit: bit 4a + 2b + c of the table n.
template <typename V> inline V ternary(const V & x, const V & y, const V & z, int n) {
    const auto a = lanes<uint64_t>(x);
    const auto b = lanes<uint64_t>(y);
    const auto c = lanes<uint64_t>(z);
    return vector<uint64_t, V>([&](size_t i) {
        uint64_t result = 0;
        for (int k = 0; k < 8; k++) {
            const uint64_t here = (k & 4 ? a[i] : ~a[i]) & (k & 2 ? b[i] : ~b[i]) & (k & 1 ? c[i] : ~c[i]);
            result |= n >> k & 1 ? here : 0;
        }
        return result;
    });
}

// The upper half onto the lower one, until one lane is left.
template <typename T, typename V, typename F> inline T reduce(const V & x, const F & f) {
    auto a = lanes<T>(x);
    for (size_t n = a.size() / 2; n > 0; n /= 2) {
        for (size_t i = 0; i < n; i++) {
            a[i] = f(a[i], a[i + n]);
        }
    }
    return a[0];
}

}  // namespace avx512

// clang-format off

// AVX2's instruction on each half
#define HALVES(V, HALF, NAME)                                                                                          \
    template <typename... Vs> inline V _mm512_##NAME(V x, const Vs &... y) {                                           \
        return avx512::by_halves<V, HALF>([](auto... each) { return _mm256_##NAME(each...); }, x, y...);               \
    }
#define INTS(NAME)    HALVES(__m512i, __m256i, NAME)
#define FLOATS(NAME)  HALVES(__m512, __m256, NAME)
#define DOUBLES(NAME) HALVES(__m512d, __m256d, NAME)

INTS(add_epi8)    INTS(add_epi16)   INTS(add_epi32)     INTS(sub_epi8)        INTS(sub_epi16)       INTS(sub_epi32)
INTS(mullo_epi16) INTS(mullo_epi32) INTS(madd_epi16)    INTS(sllv_epi32)      INTS(shuffle_epi8)
INTS(unpacklo_epi32)                INTS(unpackhi_epi32)                      INTS(unpacklo_epi64)  INTS(unpackhi_epi64)
FLOATS(add_ps)    FLOATS(sub_ps)    FLOATS(mul_ps)      FLOATS(div_ps)        FLOATS(max_ps)        FLOATS(min_ps)
FLOATS(fmadd_ps)  FLOATS(fmsub_ps)  FLOATS(fnmadd_ps)   FLOATS(sqrt_ps)       FLOATS(unpacklo_ps)   FLOATS(unpackhi_ps)
DOUBLES(unpacklo_pd)                DOUBLES(unpackhi_pd)

#undef HALVES
#undef INTS
#undef FLOATS
#undef DOUBLES

// Shifts of every lane by the same count
#define SHIFT(NAME, BY)                                                                                                \
    inline __m512i _mm512_##NAME(__m512i x, unsigned n) {                                                              \
        const __m128i count = _mm_cvtsi32_si128((int) n);                                                              \
        return avx512::by_halves<__m512i, __m256i>([=](__m256i each) { return _mm256_##BY(each, count); }, x);         \
    }
SHIFT(slli_epi16, sll_epi16) SHIFT(slli_epi32, sll_epi32) SHIFT(slli_epi64, sll_epi64)
SHIFT(srli_epi16, srl_epi16) SHIFT(srli_epi32, srl_epi32)
SHIFT(srai_epi16, sra_epi16) SHIFT(srai_epi32, sra_epi32)
#undef SHIFT

inline __m512 _mm512_cvtepi32_ps(__m512i x) {
    return avx512::by_halves<__m512, __m256i>([](__m256i each) { return _mm256_cvtepi32_ps(each); }, x);
}
inline __m512i _mm512_cvtps_epi32(__m512 x) {
    return avx512::by_halves<__m512i, __m256>([](__m256 each) { return _mm256_cvtps_epi32(each); }, x);
}
inline __m512 _mm512_cvtph_ps(__m256i x) {
    return avx512::by_halves<__m512, __m128i>([](__m128i each) { return _mm256_cvtph_ps(each); }, x);
}
inline __m256i _mm512_cvtps_ph(__m512 x, int rounding) {
    if (rounding != 0) {
        abort();  // only to nearest
    }
    return avx512::by_halves<__m256i, __m256>([](__m256 each) { return _mm256_cvtps_ph(each, 0); }, x);
}
inline __m512 _mm512_roundscale_ps(__m512 x, int scale_and_rounding) {
    if (scale_and_rounding != 0) {
        abort();  // only to the nearest integer
    }
    return avx512::by_halves<__m512, __m256>([](__m256 each) { return _mm256_round_ps(each, 0); }, x);
}

// Bitwise
inline __m512i _mm512_and_si512(__m512i x, __m512i y) { return x & y; }
inline __m512i _mm512_or_si512(__m512i x, __m512i y)  { return x | y; }
inline __m512i _mm512_xor_si512(__m512i x, __m512i y) { return x ^ y; }
inline __m512  _mm512_abs_ps(__m512 x)                { return (__m512) ((__m512i) x & 0x7fffffff7fffffffLL); }
inline __m512i _mm512_ternarylogic_epi32(__m512i x, __m512i y, __m512i z, int n) { return avx512::ternary(x, y, z, n); }
inline __m128i _mm_ternarylogic_epi32(__m128i x, __m128i y, __m128i z, int n)    { return avx512::ternary(x, y, z, n); }

// All lanes set
inline __m512i _mm512_set1_epi8(char x)       { return avx512::vector<int8_t>([=](size_t) { return x; }); }
inline __m512i _mm512_set1_epi16(short x)     { return avx512::vector<int16_t>([=](size_t) { return x; }); }
inline __m512i _mm512_set1_epi32(int x)       { return avx512::vector<int32_t>([=](size_t) { return x; }); }
inline __m512i _mm512_set1_epi64(long long x) { return avx512::vector<int64_t>([=](size_t) { return x; }); }
inline __m512  _mm512_set1_ps(float x)        { return avx512::vector<float, __m512>([=](size_t) { return x; }); }
inline __m512i _mm512_setzero_si512()         { return __m512i{}; }
inline __m512  _mm512_setzero_ps()            { return __m512{}; }
template <typename... Ints> inline __m512i _mm512_setr_epi32(Ints... x) {
    static_assert(sizeof...(x) == 16, "lanes");
    const int each[] = { x... };
    return avx512::load<__m512i>(each);
}
inline __m512i _mm512_set4_epi32(int d, int c, int b, int a) {
    return _mm512_setr_epi32(a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d);
}
inline __m512i _mm512_broadcast_i32x4(__m128i x) {
    const auto a = avx512::lanes<int32_t>(x);
    return avx512::vector<int32_t>([&](size_t i) { return a[i % 4]; });
}
inline __m512i _mm512_broadcast_i64x4(__m256i x) {
    const auto a = avx512::lanes<int64_t>(x);
    return avx512::vector<int64_t>([&](size_t i) { return a[i % 4]; });
}

// Memory
inline __m512i _mm512_loadu_si512(const void * p)          { return avx512::load<__m512i>(p); }
inline __m512  _mm512_loadu_ps(const void * p)             { return avx512::load<__m512>(p); }
inline __m512i _mm512_load_si512(const void * p)           { avx512::check_aligned(p); return _mm512_loadu_si512(p); }
inline void    _mm512_storeu_si512(void * p, __m512i x)    { memcpy(p, &x, sizeof(x)); }
inline void    _mm512_storeu_ps(void * p, __m512 x)        { memcpy(p, &x, sizeof(x)); }
inline void    _mm512_stream_ps(void * p, __m512 x)        { avx512::check_aligned(p); _mm512_storeu_ps(p, x); }
inline void    _mm512_store_si512(void * p, __m512i x)     { avx512::check_aligned(p); _mm512_storeu_si512(p, x); }

// Casts and parts
inline __m512  _mm512_castsi512_ps(__m512i x)              { return (__m512) x; }
inline __m512d _mm512_castps_pd(__m512 x)                  { return (__m512d) x; }
inline __m512  _mm512_castpd_ps(__m512d x)                 { return (__m512) x; }
inline __m512i _mm512_castsi128_si512(__m128i x)           { return avx512::extended(x, 0xa5); }
inline __m512i _mm512_castsi256_si512(__m256i x)           { return avx512::extended(x, 0xa5); }
inline __m512i _mm512_zextsi256_si512(__m256i x)           { return avx512::extended(x, 0); }
inline __m128i _mm512_castsi512_si128(__m512i x)           { return avx512::load<__m128i>(&x); }
inline __m256i _mm512_castsi512_si256(__m512i x)           { return avx512::load<__m256i>(&x); }
inline __m256i _mm512_extracti64x4_epi64(__m512i x, int n) { return avx512::half<__m256i>(x, n & 1); }
inline __m256  _mm512_castps512_ps256(__m512 x)            { return avx512::load<__m256>(&x); }
inline __m512i _mm512_inserti32x4(__m512i x, __m128i y, int n) { memcpy((char *) &x + 16 * (n & 3), &y, 16); return x; }
inline __m512i _mm512_inserti64x4(__m512i x, __m256i y, int n) { memcpy((char *) &x + 32 * (n & 1), &y, 32); return x; }

// Lanes of another width: extended by sign or zeros, truncated, saturated
#define CONVERT(NAME, TO, V_TO, FROM, V_FROM)                                                                          \
    inline V_TO _mm512_##NAME(V_FROM x) {                                                                              \
        const auto a = avx512::lanes<FROM>(x);                                                                         \
        return avx512::vector<TO, V_TO>([&](size_t i) { return a[i]; });                                               \
    }
CONVERT(cvtepi8_epi16, int16_t, __m512i, int8_t, __m256i)
CONVERT(cvtepu8_epi16, uint16_t, __m512i, uint8_t, __m256i)
CONVERT(cvtepi8_epi32, int32_t, __m512i, int8_t, __m128i)
CONVERT(cvtepi16_epi32, int32_t, __m512i, int16_t, __m256i)
CONVERT(cvtepu16_epi32, uint32_t, __m512i, uint16_t, __m256i)
CONVERT(cvtepu16_epi64, uint64_t, __m512i, uint16_t, __m128i)
CONVERT(cvtepi32_epi16, uint16_t, __m256i, uint32_t, __m512i)
#undef CONVERT
inline __m512i _mm512_cvtepu8_epi64(__m128i x) {  // of the lower 8 bytes
    const auto a = avx512::lanes<uint8_t>(x);
    return avx512::vector<uint64_t>([&](size_t i) { return a[i]; });
}
inline __m128i _mm512_cvtsepi32_epi8(__m512i x) {
    const auto a = avx512::lanes<int32_t>(x);
    return avx512::vector<int8_t, __m128i>([&](size_t i) { return std::min(127, std::max(-128, a[i])); });
}

// Shifts and rotations by lane; a count of the width or more leaves zeros
inline __m512i _mm512_sllv_epi16(__m512i x, __m512i n) {
    const auto a = avx512::lanes<uint16_t>(x), b = avx512::lanes<uint16_t>(n);
    return avx512::vector<uint16_t>([&](size_t i) { return b[i] > 15 ? 0 : a[i] << b[i]; });
}
inline __m512i _mm512_srlv_epi16(__m512i x, __m512i n) {
    const auto a = avx512::lanes<uint16_t>(x), b = avx512::lanes<uint16_t>(n);
    return avx512::vector<uint16_t>([&](size_t i) { return b[i] > 15 ? 0 : a[i] >> b[i]; });
}
inline __m512i _mm512_rolv_epi32(__m512i x, __m512i n) {
    const auto a = avx512::lanes<uint32_t>(x), b = avx512::lanes<uint32_t>(n);
    return avx512::vector<uint32_t>([&](size_t i) { return (uint64_t{ a[i] } << 32 | a[i]) << b[i] % 32 >> 32; });
}
inline __m512i _mm512_rol_epi32(__m512i x, int n) { return _mm512_rolv_epi32(x, _mm512_set1_epi32(n)); }
inline __m128i _mm_rorv_epi32(__m128i x, __m128i n) {
    const auto a = avx512::lanes<uint32_t>(x), b = avx512::lanes<uint32_t>(n);
    return avx512::vector<uint32_t, __m128i>([&](size_t i) { return (uint64_t{ a[i] } << 32 | a[i]) >> b[i] % 32; });
}

// Sums of products
inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i x, __m512i y) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(x, y));
}
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i x, __m512i y) {  // unsigned bytes times signed ones
    const __m512i even = _mm512_madd_epi16(x & 0x00ff00ff00ff00ffLL, _mm512_srai_epi16(_mm512_slli_epi16(y, 8), 8));
    const __m512i odd  = _mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(y, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh x, __m512bh y) {  // two fused multiply-adds, the odd one first
    const auto a = avx512::lanes<uint16_t>(x), b = avx512::lanes<uint16_t>(y);
    const auto s = avx512::lanes<float>(sum);
    return avx512::vector<float, __m512>([&](size_t i) {
        const auto add = [&](size_t j, float to) {
            return emulated::flushed(std::fma(emulated::from_bf16(a[j]), emulated::from_bf16(b[j]), to));
        };
        return add(2 * i, add(2 * i + 1, emulated::flushed(s[i])));
    });
}

// Other arithmetic on floats
inline __m512 _mm512_scalef_ps(__m512 x, __m512 n) {  // x * 2^floor(n)
    const auto a = avx512::lanes<float>(x), b = avx512::lanes<float>(n);
    return avx512::vector<float, __m512>([&](size_t i) {
        return b[i] == b[i] ? std::ldexp(a[i], (int) std::floor(std::min(1000.0f, std::max(-1000.0f, b[i])))) : b[i];
    });
}
inline __m512 _mm512_rcp14_ps(__m512 x) {  // of normal values: 14 bits of the fraction
    return (__m512) ((__m512i) (_mm512_set1_ps(1.0f) / x) & (long long) 0xfffffe00fffffe00ULL);
}
inline int _mm512_reduce_add_epi32(__m512i x) {
    return (int) avx512::reduce<uint32_t>(x, [](uint32_t a, uint32_t b) { return a + b; });
}
inline float _mm512_reduce_add_ps(__m512 x) {
    return avx512::reduce<float>(x, [](float a, float b) { return a + b; });
}
inline float _mm512_reduce_max_ps(__m512 x) {
    return avx512::reduce<float>(x, [](float a, float b) { return a > b ? a : b; });
}

// Masks
inline __mmask16 _mm512_cmp_ps_mask(__m512 x, __m512 y, int how) {
    const auto a = avx512::lanes<float>(x), b = avx512::lanes<float>(y);
    switch (how) {
        case _CMP_EQ_OQ: return avx512::mask<__mmask16>([&](size_t i) { return a[i] == b[i]; });
        case _CMP_GT_OQ: return avx512::mask<__mmask16>([&](size_t i) { return a[i] > b[i]; });
        case _CMP_LE_OQ: return avx512::mask<__mmask16>([&](size_t i) { return a[i] <= b[i]; });
        default: abort();
    }
}
inline __mmask16 _mm512_cmpeq_ps_mask(__m512 x, __m512 y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
inline __mmask16 _mm512_cmplt_epu32_mask(__m512i x, __m512i y) {
    const auto a = avx512::lanes<uint32_t>(x), b = avx512::lanes<uint32_t>(y);
    return avx512::mask<__mmask16>([&](size_t i) { return a[i] < b[i]; });
}
inline __mmask64 _mm512_test_epi8_mask(__m512i x, __m512i y) {
    const auto both = avx512::lanes<uint8_t>(x & y);
    return avx512::mask<__mmask64>([&](size_t i) { return both[i] != 0; });
}
inline int _mm512_kortestz(__mmask16 x, __mmask16 y) { return (x | y) == 0; }
inline __m512i _mm512_maskz_mov_epi8(__mmask64 m, __m512i x) {
    return avx512::choose<uint8_t>(m, x, __m512i{});
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 m, __m512 x) {
    return avx512::choose<float>(m, x, __m512{});
}
inline __m512i _mm512_maskz_set1_epi32(__mmask16 m, int x) {
    return avx512::choose<uint32_t>(m, _mm512_set1_epi32(x), __m512i{});
}
inline __m512 _mm512_maskz_div_ps(__mmask16 m, __m512 x, __m512 y) {
    return avx512::choose<float>(m, x / y, __m512{});
}
inline __m512i _mm512_mask_set1_epi32(__m512i from, __mmask16 m, int x) {
    return avx512::choose<uint32_t>(m, _mm512_set1_epi32(x), from);
}
inline __m512i _mm512_mask_mov_epi32(__m512i from, __mmask16 m, __m512i x) {
    return avx512::choose<uint32_t>(m, x, from);
}
inline __m512i _mm512_mask_add_epi8(__m512i from, __mmask64 m, __m512i x, __m512i y) {
    return avx512::choose<uint8_t>(m, _mm512_add_epi8(x, y), from);
}
inline __m512i _mm512_mask_blend_epi16(__mmask32 m, __m512i x, __m512i y) {
    return avx512::choose<uint16_t>(m, y, x);
}
inline __m512 _mm512_mask_blend_ps(__mmask16 m, __m512 x, __m512 y) {
    return avx512::choose<float>(m, y, x);
}
inline __m512 _mm512_maskz_compress_ps(__mmask16 m, __m512 x) {
    std::array<float, 16> result{};
    size_t                n = 0;
    for (size_t i = 0; i < result.size(); i++) {
        if (m >> i & 1) {
            result[n++] = x[i];
        }
    }
    return avx512::load<__m512>(&result);
}

// Permutations
constexpr int _MM_PERM_CDAB = 0xb1;  // lanes of a quarter: 1, 0, 3, 2
constexpr int _MM_PERM_AAAA = 0x00, _MM_PERM_BBBB = 0x55, _MM_PERM_CCCC = 0xaa, _MM_PERM_DDDD = 0xff;
inline __m512i _mm512_shuffle_epi32(__m512i x, int n) {
    const auto a = avx512::lanes<uint32_t>(x);
    return avx512::vector<uint32_t>([&](size_t i) { return a[i / 4 * 4 + (n >> 2 * (i % 4) & 3)]; });
}
inline __m512i _mm512_shuffle_i64x2(__m512i x, __m512i y, int n) { return avx512::shuffle_quarters(x, y, n); }
inline __m512i _mm512_shuffle_i32x4(__m512i x, __m512i y, int n) { return avx512::shuffle_quarters(x, y, n); }
inline __m512  _mm512_shuffle_f32x4(__m512 x, __m512 y, int n)   { return avx512::shuffle_quarters(x, y, n); }
inline __m512i _mm512_permutex2var_epi16(__m512i x, __m512i n, __m512i y) {
    const auto a = avx512::lanes<uint16_t>(x), b = avx512::lanes<uint16_t>(y), k = avx512::lanes<uint16_t>(n);
    return avx512::vector<uint16_t>([&](size_t i) { return (k[i] & 32 ? b : a)[k[i] % 32]; });
}
inline __m512i _mm512_permutex2var_epi32(__m512i x, __m512i n, __m512i y) {
    const auto a = avx512::lanes<uint32_t>(x), b = avx512::lanes<uint32_t>(y), k = avx512::lanes<uint32_t>(n);
    return avx512::vector<uint32_t>([&](size_t i) { return (k[i] & 16 ? b : a)[k[i] % 16]; });
}
inline __m512i _mm512_permutexvar_epi16(__m512i n, __m512i x) { return _mm512_permutex2var_epi16(x, n, x); }
inline __m512i _mm512_permutexvar_epi32(__m512i n, __m512i x) { return _mm512_permutex2var_epi32(x, n, x); }
inline __m512 _mm512_permutexvar_ps(__m512i n, __m512 x) {
    return (__m512) _mm512_permutexvar_epi32(n, (__m512i) x);
}
inline __m512i _mm512_maskz_permutexvar_epi16(__mmask32 m, __m512i n, __m512i x) {
    return avx512::choose<uint16_t>(m, _mm512_permutexvar_epi16(n, x), __m512i{});
}

// clang-format on

#include "amx-emulated.h"
