#pragma once

// One vector type for the operators on the CPU: AVX-512, AVX2 or NEON, depending on the build of ggml-cpu. Without
// any of them KIMI_SIMD is not defined and the plain scalar paths are used.

#include "ggml-cpu-impl.h"

#include <cstdint>

#if defined(__GNUC__)
#define KIMI_INLINE inline __attribute__((always_inline))
#else
#define KIMI_INLINE inline
#endif

#if defined(__clang__)
#define KIMI_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define KIMI_UNROLL _Pragma("GCC unroll 32")
#else
#define KIMI_UNROLL
#endif

namespace kimi_simd {

// Prefetches n floats that will be read, or written.
template <bool WRITE = false> static KIMI_INLINE void prefetch(const float * p, int64_t n) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < n; i += 16) {
        __builtin_prefetch(p + i, WRITE);
    }
#else
    GGML_UNUSED(p);
    GGML_UNUSED(n);
#endif
}

// This thread's part of the work buffer, aligned to a cache line; ggml_graph_plan adds a line per thread.
static inline float * thread_scratch(const ggml_compute_params * params, size_t floats_per_thread) {
    constexpr uintptr_t line = 64;
    return (float *) (((uintptr_t) params->wdata + line - 1) / line * line) + params->ith * floats_per_thread;
}

#if defined(__AVX512F__) && defined(__AVX512DQ__)

#define KIMI_SIMD

constexpr int VW = 16;  // floats per vector
using vf         = __m512;

// clang-format off
static KIMI_INLINE vf   v_load(const float * p)        { return _mm512_loadu_ps(p); }
static KIMI_INLINE void v_store(float * p, vf x)       { _mm512_storeu_ps(p, x); }
static KIMI_INLINE vf   v_set1(float x)                { return _mm512_set1_ps(x); }
static KIMI_INLINE vf   v_zero()                       { return _mm512_setzero_ps(); }
static KIMI_INLINE vf   v_add(vf a, vf b)              { return _mm512_add_ps(a, b); }
static KIMI_INLINE vf   v_sub(vf a, vf b)              { return _mm512_sub_ps(a, b); }
static KIMI_INLINE vf   v_mul(vf a, vf b)              { return _mm512_mul_ps(a, b); }
static KIMI_INLINE vf   v_div(vf a, vf b)              { return _mm512_div_ps(a, b); }
static KIMI_INLINE vf   v_max(vf a, vf b)              { return _mm512_max_ps(a, b); }
static KIMI_INLINE vf   v_abs(vf a)                    { return _mm512_abs_ps(a); }
static KIMI_INLINE vf   v_fma(vf a, vf b, vf c)        { return _mm512_fmadd_ps(a, b, c); }   // c + a*b
static KIMI_INLINE vf   v_fnma(vf a, vf b, vf c)       { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
static KIMI_INLINE vf   v_min(vf a, vf b)              { return _mm512_min_ps(a, b); }
static KIMI_INLINE vf   v_round(vf a)                  { return _mm512_roundscale_ps(a, 0); }
static KIMI_INLINE vf   v_scale2(vf a, vf n)           { return _mm512_scalef_ps(a, n); }     // a * 2^n
static KIMI_INLINE vf   v_sqrt(vf a)                   { return _mm512_sqrt_ps(a); }
static KIMI_INLINE float v_hsum(vf a)                  { return _mm512_reduce_add_ps(a); }
// clang-format on

// 1/a for 1 <= a < 2^126: 14 bits and one Newton step, half the time of a division
static KIMI_INLINE vf v_reciprocal(vf a) {
    const vf r = _mm512_rcp14_ps(a);
    return v_fma(v_fnma(a, r, v_set1(1.0f)), r, r);
}

// lane i of the result is the sum of r[i]
static KIMI_INLINE vf v_sum_rows(const vf r[VW]) {
    vf q[4];
    KIMI_UNROLL
    for (int i = 0; i < 4; ++i) {
        const vf ab = v_add(_mm512_unpacklo_ps(r[4 * i], r[4 * i + 1]), _mm512_unpackhi_ps(r[4 * i], r[4 * i + 1]));
        const vf cd =
            v_add(_mm512_unpacklo_ps(r[4 * i + 2], r[4 * i + 3]), _mm512_unpackhi_ps(r[4 * i + 2], r[4 * i + 3]));
        const __m512d x = _mm512_castps_pd(ab);
        const __m512d y = _mm512_castps_pd(cd);
        q[i]            = v_add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    const vf a = v_add(_mm512_shuffle_f32x4(q[0], q[1], 0x88), _mm512_shuffle_f32x4(q[0], q[1], 0xdd));
    const vf b = v_add(_mm512_shuffle_f32x4(q[2], q[3], 0x88), _mm512_shuffle_f32x4(q[2], q[3], 0xdd));
    return v_add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

static KIMI_INLINE void v_transpose(vf r[VW]) {
    vf t[VW];
    KIMI_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m512d ab_lo = _mm512_castps_pd(_mm512_unpacklo_ps(r[4 * i], r[4 * i + 1]));
        const __m512d ab_hi = _mm512_castps_pd(_mm512_unpackhi_ps(r[4 * i], r[4 * i + 1]));
        const __m512d cd_lo = _mm512_castps_pd(_mm512_unpacklo_ps(r[4 * i + 2], r[4 * i + 3]));
        const __m512d cd_hi = _mm512_castps_pd(_mm512_unpackhi_ps(r[4 * i + 2], r[4 * i + 3]));
        t[4 * i + 0]        = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_lo, cd_lo));
        t[4 * i + 1]        = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_lo, cd_lo));
        t[4 * i + 2]        = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_hi, cd_hi));
        t[4 * i + 3]        = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_hi, cd_hi));
    }
    KIMI_UNROLL
    for (int i = 0; i < 4; ++i) {
        const vf lo0 = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88);
        const vf hi0 = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
        const vf lo1 = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88);
        const vf hi1 = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
        r[i]         = _mm512_shuffle_f32x4(lo0, lo1, 0x88);
        r[4 + i]     = _mm512_shuffle_f32x4(hi0, hi1, 0x88);
        r[8 + i]     = _mm512_shuffle_f32x4(lo0, lo1, 0xdd);
        r[12 + i]    = _mm512_shuffle_f32x4(hi0, hi1, 0xdd);
    }
}

#elif defined(__AVX2__) && defined(__FMA__)

#define KIMI_SIMD

constexpr int VW = 8;
using vf         = __m256;

// clang-format off
static KIMI_INLINE vf   v_load(const float * p)        { return _mm256_loadu_ps(p); }
static KIMI_INLINE void v_store(float * p, vf x)       { _mm256_storeu_ps(p, x); }
static KIMI_INLINE vf   v_set1(float x)                { return _mm256_set1_ps(x); }
static KIMI_INLINE vf   v_zero()                       { return _mm256_setzero_ps(); }
static KIMI_INLINE vf   v_add(vf a, vf b)              { return _mm256_add_ps(a, b); }
static KIMI_INLINE vf   v_sub(vf a, vf b)              { return _mm256_sub_ps(a, b); }
static KIMI_INLINE vf   v_mul(vf a, vf b)              { return _mm256_mul_ps(a, b); }
static KIMI_INLINE vf   v_div(vf a, vf b)              { return _mm256_div_ps(a, b); }
static KIMI_INLINE vf   v_max(vf a, vf b)              { return _mm256_max_ps(a, b); }
static KIMI_INLINE vf   v_abs(vf a)                    { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static KIMI_INLINE vf   v_fma(vf a, vf b, vf c)        { return _mm256_fmadd_ps(a, b, c); }
static KIMI_INLINE vf   v_fnma(vf a, vf b, vf c)       { return _mm256_fnmadd_ps(a, b, c); }
static KIMI_INLINE vf   v_min(vf a, vf b)              { return _mm256_min_ps(a, b); }
static KIMI_INLINE vf   v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static KIMI_INLINE vf   v_sqrt(vf a)                   { return _mm256_sqrt_ps(a); }
static KIMI_INLINE vf   v_reciprocal(vf a)             { return v_div(v_set1(1.0f), a); }
// clang-format on

// a * 2^n in two factors, so that results below the normal range are correct too
static KIMI_INLINE vf v_scale2(vf a, vf n) {
    const __m256i i    = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(i, 1);
    const __m256i one  = _mm256_set1_epi32(127);
    const __m256i x    = _mm256_slli_epi32(_mm256_add_epi32(half, one), 23);
    const __m256i y    = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), one), 23);
    return v_mul(v_mul(a, _mm256_castsi256_ps(x)), _mm256_castsi256_ps(y));
}

static KIMI_INLINE float v_hsum(vf a) {
    const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 y = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

static KIMI_INLINE vf v_sum_rows(const vf r[VW]) {
    const vf a = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
    const vf b = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
    return v_add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

static KIMI_INLINE void v_transpose(vf r[VW]) {
    vf t[VW];
    KIMI_UNROLL
    for (int i = 0; i < 2; ++i) {
        const vf ab_lo = _mm256_unpacklo_ps(r[4 * i], r[4 * i + 1]);
        const vf ab_hi = _mm256_unpackhi_ps(r[4 * i], r[4 * i + 1]);
        const vf cd_lo = _mm256_unpacklo_ps(r[4 * i + 2], r[4 * i + 3]);
        const vf cd_hi = _mm256_unpackhi_ps(r[4 * i + 2], r[4 * i + 3]);
        t[4 * i + 0]   = _mm256_shuffle_ps(ab_lo, cd_lo, 0x44);
        t[4 * i + 1]   = _mm256_shuffle_ps(ab_lo, cd_lo, 0xee);
        t[4 * i + 2]   = _mm256_shuffle_ps(ab_hi, cd_hi, 0x44);
        t[4 * i + 3]   = _mm256_shuffle_ps(ab_hi, cd_hi, 0xee);
    }
    KIMI_UNROLL
    for (int i = 0; i < 4; ++i) {
        r[i]     = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
        r[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
    }
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

#define KIMI_SIMD

constexpr int VW = 4;
using vf         = float32x4_t;

// clang-format off
static KIMI_INLINE vf   v_load(const float * p)        { return vld1q_f32(p); }
static KIMI_INLINE void v_store(float * p, vf x)       { vst1q_f32(p, x); }
static KIMI_INLINE vf   v_set1(float x)                { return vdupq_n_f32(x); }
static KIMI_INLINE vf   v_zero()                       { return vdupq_n_f32(0.0f); }
static KIMI_INLINE vf   v_add(vf a, vf b)              { return vaddq_f32(a, b); }
static KIMI_INLINE vf   v_sub(vf a, vf b)              { return vsubq_f32(a, b); }
static KIMI_INLINE vf   v_mul(vf a, vf b)              { return vmulq_f32(a, b); }
static KIMI_INLINE vf   v_div(vf a, vf b)              { return vdivq_f32(a, b); }
static KIMI_INLINE vf   v_max(vf a, vf b)              { return vmaxq_f32(a, b); }
static KIMI_INLINE vf   v_abs(vf a)                    { return vabsq_f32(a); }
static KIMI_INLINE vf   v_fma(vf a, vf b, vf c)        { return vfmaq_f32(c, a, b); }
static KIMI_INLINE vf   v_fnma(vf a, vf b, vf c)       { return vfmsq_f32(c, a, b); }
static KIMI_INLINE vf   v_min(vf a, vf b)              { return vminq_f32(a, b); }
static KIMI_INLINE vf   v_round(vf a)                  { return vrndnq_f32(a); }
static KIMI_INLINE vf   v_sqrt(vf a)                   { return vsqrtq_f32(a); }
static KIMI_INLINE vf   v_reciprocal(vf a)             { return v_div(v_set1(1.0f), a); }
static KIMI_INLINE float v_hsum(vf a)                  { return vaddvq_f32(a); }
// clang-format on

// a * 2^n in two factors, so that results below the normal range are correct too
static KIMI_INLINE vf v_scale2(vf a, vf n) {
    const int32x4_t i    = vcvtq_s32_f32(n);
    const int32x4_t half = vshrq_n_s32(i, 1);
    const int32x4_t one  = vdupq_n_s32(127);
    const int32x4_t x    = vshlq_n_s32(vaddq_s32(half, one), 23);
    const int32x4_t y    = vshlq_n_s32(vaddq_s32(vsubq_s32(i, half), one), 23);
    return v_mul(v_mul(a, vreinterpretq_f32_s32(x)), vreinterpretq_f32_s32(y));
}

static KIMI_INLINE vf v_sum_rows(const vf r[VW]) {
    return vpaddq_f32(vpaddq_f32(r[0], r[1]), vpaddq_f32(r[2], r[3]));
}

static KIMI_INLINE void v_transpose(vf r[VW]) {
    const float32x4x2_t ab = vtrnq_f32(r[0], r[1]);
    const float32x4x2_t cd = vtrnq_f32(r[2], r[3]);
    r[0]                   = vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0]));
    r[1]                   = vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1]));
    r[2]                   = vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0]));
    r[3]                   = vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1]));
}

#endif

#if defined(KIMI_SIMD)

// e^x = 2^n e^r, |r| <= ln(2)/2, e^r by its series to r^7 (relative error 5e-9); 0 below -104, e^87 above 87
static KIMI_INLINE vf v_exp(vf x) {
    x           = v_min(v_set1(87.0f), v_max(v_set1(-105.0f), x));
    const vf n  = v_round(v_mul(x, v_set1(0x1.715476p+0f)));
    const vf r  = v_fnma(n, v_set1(-0x1.05c61p-29f), v_fnma(n, v_set1(0x1.62e43p-1f), x));
    const vf r2 = v_mul(r, r);
    const vf a  = v_add(v_set1(1.0f), r);
    const vf b  = v_fma(v_set1(1.0f / 6), r, v_set1(1.0f / 2));
    const vf c  = v_fma(v_set1(1.0f / 120), r, v_set1(1.0f / 24));
    const vf d  = v_fma(v_set1(1.0f / 5040), r, v_set1(1.0f / 720));
    return v_scale2(v_fma(v_fma(v_fma(d, r2, c), r2, b), r2, a), n);
}

static KIMI_INLINE vf v_sigmoid(vf x) {
    return v_reciprocal(v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), x))));
}

// log(1 + e^x) = max(x, 0) + log1p(u), u = e^-|x|; log1p(u) = u + u^2 p(u) on [0, 1], where p is the minimax polynomial
// of the relative error, 5e-9 (Lawson's iteration on Chebyshev nodes)
static KIMI_INLINE vf v_softplus(vf x) {
    const vf u  = v_exp(v_sub(v_zero(), v_abs(x)));
    const vf u2 = v_mul(u, u);
    const vf u4 = v_mul(u2, u2);
    const vf a  = v_fma(v_set1(0x1.554c80p-2f), u, v_set1(-0x1.ffffbep-2f));
    const vf b  = v_fma(v_set1(0x1.92f68cp-3f), u, v_set1(-0x1.ff0f86p-3f));
    const vf c  = v_fma(v_set1(0x1.b252fcp-4f), u, v_set1(-0x1.397544p-3f));
    const vf d  = v_fma(v_set1(0x1.453e3cp-6f), u, v_set1(-0x1.d29c04p-5f));
    const vf cd = v_fma(v_set1(-0x1.a931f0p-9f), u4, v_fma(d, u2, c));
    const vf p  = v_fma(cd, u4, v_fma(b, u2, a));
    return v_add(v_fma(p, u2, u), v_max(x, v_zero()));
}

#endif

}  // namespace kimi_simd
