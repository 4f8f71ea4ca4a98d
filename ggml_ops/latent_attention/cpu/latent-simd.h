#pragma once

// The vector type of the latent attention kernels: vf, LANES floats wide.
// Chosen at compile time, as ggml builds one CPU backend per instruction set; everything else gets four plain floats,
// which compilers turn into whatever vectors there are.

// GCC before 13 warns of the undefined registers in its own AVX-512 intrinsics.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "ggml-cpu-impl.h"
#include "vec.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(__ARM_FEATURE_SVE)
#include <arm_neon.h>
#endif

namespace latent {

#if defined(__AVX512F__) && defined(__AVX512DQ__)

using vf                     = __m512;
constexpr int LANES          = 16;
constexpr int N_ACCUMULATORS = 24;  // of 32 registers
constexpr int MAX_COLUMNS    = 4;   // vectors side by side in one register block

static inline vf v_load(const float * x) {
    return _mm512_loadu_ps(x);
}
static inline void v_store(float * x, vf a) {
    _mm512_storeu_ps(x, a);
}
static inline vf v_set(float x) {
    return _mm512_set1_ps(x);
}
static inline vf v_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}  // a*b + c
static inline vf v_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
static inline vf v_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
static inline vf v_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
static inline vf v_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
static inline vf v_exp(vf a) {
    return ggml_v_expf(a);
}

#elif defined(__AVX2__) && defined(__FMA__)

using vf                     = __m256;
constexpr int LANES          = 8;
constexpr int N_ACCUMULATORS = 12;  // of 16 registers
constexpr int MAX_COLUMNS    = 2;

static inline vf v_load(const float * x) {
    return _mm256_loadu_ps(x);
}
static inline void v_store(float * x, vf a) {
    _mm256_storeu_ps(x, a);
}
static inline vf v_set(float x) {
    return _mm256_set1_ps(x);
}
static inline vf v_fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
static inline vf v_mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
static inline vf v_add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
static inline vf v_sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
static inline vf v_max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}
static inline vf v_exp(vf a) {
    return ggml_v_expf(a);
}

#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(__ARM_FEATURE_SVE)

using vf                     = float32x4_t;
constexpr int LANES          = 4;
constexpr int N_ACCUMULATORS = 24;  // of 32 registers
constexpr int MAX_COLUMNS    = 4;

static inline vf v_load(const float * x) {
    return vld1q_f32(x);
}
static inline void v_store(float * x, vf a) {
    vst1q_f32(x, a);
}
static inline vf v_set(float x) {
    return vdupq_n_f32(x);
}
static inline vf v_fma(vf a, vf b, vf c) {
    return vfmaq_f32(c, a, b);
}
static inline vf v_mul(vf a, vf b) {
    return vmulq_f32(a, b);
}
static inline vf v_add(vf a, vf b) {
    return vaddq_f32(a, b);
}
static inline vf v_sub(vf a, vf b) {
    return vsubq_f32(a, b);
}
static inline vf v_max(vf a, vf b) {
    return vmaxq_f32(a, b);
}
static inline vf v_exp(vf a) {
    return ggml_v_expf(a);
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

#endif

// Before a loop with a constant number of rounds, or one that may be cut into such.
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

// Memory that will be wanted soon. It is asked for a few cache lines at a time, while the arithmetic goes on.
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
