#pragma once

// The vector type of the latent attention kernels: vf, LANES floats wide. With AVX-512, AVX2 or NEON it is that of
// kimi-simd.h; otherwise it is four plain floats, which the compiler may vectorize.

// GCC before 13 warns about the undefined registers in its own AVX-512 intrinsics.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "kimi-simd.h"
#include "vec.h"

namespace latent {

#if defined(KIMI_SIMD)

using kimi_simd::v_abs;
using kimi_simd::v_add;
using kimi_simd::v_div;
using kimi_simd::v_fma;
using kimi_simd::v_hsum;
using kimi_simd::v_load;
using kimi_simd::v_max;
using kimi_simd::v_min;
using kimi_simd::v_mul;
using kimi_simd::v_round;
using kimi_simd::v_sqrt;
using kimi_simd::v_store;
using kimi_simd::v_sub;
using kimi_simd::v_transpose;
using kimi_simd::vf;

constexpr int LANES = kimi_simd::VW;
// Accumulators of a register block, out of 32 registers (AVX2: 16), and the vectors per row of the block.
constexpr int N_ACCUMULATORS = LANES == 8 ? 12 : 24;
constexpr int MAX_COLUMNS    = LANES == 8 ? 2 : 4;

static inline vf v_set(float x) {
    return kimi_simd::v_set1(x);
}
// ggml's own, so that the weights equal those of its softmax; with SVE it is defined for another type
static inline vf v_exp(vf a) {
#if defined(__ARM_FEATURE_SVE)
    return kimi_simd::v_exp(a);
#else
    return ggml_v_expf(a);
#endif
}

#else

constexpr int LANES          = 4;
constexpr int N_ACCUMULATORS = 8;
constexpr int MAX_COLUMNS    = 2;

struct vf {
    float x[LANES];
};

template <typename F> static inline vf v_map(F f) {
    vf r;
    for (int i = 0; i < LANES; ++i) {
        r.x[i] = f(i);
    }
    return r;
}

static inline vf v_load(const float * x) {
    return v_map([=](int i) { return x[i]; });
}
static inline void v_store(float * x, const vf & a) {
    for (int i = 0; i < LANES; ++i) {
        x[i] = a.x[i];
    }
}
static inline vf v_set(float x) {
    return v_map([=](int) { return x; });
}
static inline vf v_fma(const vf & a, const vf & b, const vf & c) {
    return v_map([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
}
static inline vf v_mul(const vf & a, const vf & b) {
    return v_map([&](int i) { return a.x[i] * b.x[i]; });
}
static inline vf v_add(const vf & a, const vf & b) {
    return v_map([&](int i) { return a.x[i] + b.x[i]; });
}
static inline vf v_sub(const vf & a, const vf & b) {
    return v_map([&](int i) { return a.x[i] - b.x[i]; });
}
static inline vf v_max(const vf & a, const vf & b) {
    return v_map([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
static inline vf v_exp(const vf & a) {
    return v_map([&](int i) { return expf(a.x[i]); });
}
static inline void v_transpose(vf r[LANES]) {
    for (int i = 0; i < LANES; ++i) {
        for (int j = 0; j < i; ++j) {
            const float x = r[i].x[j];
            r[i].x[j]     = r[j].x[i];
            r[j].x[i]     = x;
        }
    }
}

#endif

// Vectors of 32-bit integers, and of pairs of 16-bit ones, on processors that multiply such pairs faster than float32.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)

#define LATENT_PAIRS 1

using vi = __m512i;

static inline vi v_load(const int32_t * x) {
    return _mm512_loadu_si512(x);
}
static inline void v_store(int32_t * x, vi a) {
    _mm512_storeu_si512(x, a);
}
static inline vi v_set(int32_t x) {
    return _mm512_set1_epi32(x);
}
// in each lane: c + low(a) * low(b) + high(a) * high(b)
static inline vi v_fma(vi a, vi b, vi c) {
#if defined(__GNUC__) && !defined(__clang__)
    asm("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));  // with the intrinsic, GCC 12 copies the accumulators
    return c;
#else
    return _mm512_dpwssd_epi32(c, a, b);
#endif
}
static inline vf v_float(vi a) {
    return _mm512_cvtepi32_ps(a);
}
// rounded to the nearest integers: low[i] and high[i] in lane i
static inline vi v_pair(vf low, vf high) {
    constexpr __mmask32 UPPER_HALVES = 0xaaaaaaaa;
    return _mm512_mask_blend_epi16(UPPER_HALVES, _mm512_cvtps_epi32(low),
                                   _mm512_slli_epi32(_mm512_cvtps_epi32(high), 16));
}
// y where x > 0, otherwise 0
static inline vf v_if_positive(vf x, vf y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), y);
}
static inline float v_hmax(vf a) {
    return _mm512_reduce_max_ps(a);
}

#elif defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)

#define LATENT_PAIRS 1

using vi = __m256i;

static inline vi v_load(const int32_t * x) {
    return _mm256_loadu_si256((const vi *) x);
}
static inline void v_store(int32_t * x, vi a) {
    _mm256_storeu_si256((vi *) x, a);
}
static inline vi v_set(int32_t x) {
    return _mm256_set1_epi32(x);
}
static inline vi v_fma(vi a, vi b, vi c) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(c, a, b);
#else
    return _mm256_add_epi32(c, _mm256_madd_epi16(a, b));
#endif
}
static inline vf v_float(vi a) {
    return _mm256_cvtepi32_ps(a);
}
static inline vi v_pair(vf low, vf high) {
    return _mm256_blend_epi16(_mm256_cvtps_epi32(low), _mm256_slli_epi32(_mm256_cvtps_epi32(high), 16), 0xaa);
}
static inline vf v_if_positive(vf x, vf y) {
    return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ), y);
}
static inline float v_hmax(vf a) {
    const __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 y = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

#else
#define LATENT_PAIRS 0
#endif

// For loops with a constant number of iterations, or that can be split into such loops.
#if defined(__clang__)
#define LATENT_UNROLL _Pragma("clang loop unroll_count(16)")
#elif defined(__GNUC__)
#define LATENT_UNROLL _Pragma("GCC unroll 16")
#else
#define LATENT_UNROLL
#endif

static inline void prefetch(const char * x) {
#if defined(__GNUC__)
    __builtin_prefetch(x, 0, 2);
#elif defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
    _mm_prefetch(x, _MM_HINT_T1);
#else
    GGML_UNUSED(x);
#endif
}

// Memory to prefetch, a few cache lines at a time, during the computation.
struct Ahead {
    static constexpr int64_t LINE       = 64;
    static constexpr int     LINES_ONCE = 24;

    const char * at;
    const char * end;

    void touch() {
        for (int i = 0; i < LINES_ONCE && at < end; ++i, at += LINE) {
            prefetch(at);
        }
    }
};

constexpr int64_t pad_lanes(int64_t n) {
    return (n + LANES - 1) / LANES * LANES;
}

}  // namespace latent
