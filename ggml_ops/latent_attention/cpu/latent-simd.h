#pragma once

// The vector type of the latent attention kernels: vf, LANES floats wide. With AVX-512, AVX2 or NEON it is that of the
// KDA operators (kda-simd.h); otherwise it is four plain floats, which the compiler may vectorize.

// GCC before 13 warns about the undefined registers in its own AVX-512 intrinsics.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "kda-simd.h"
#include "vec.h"

namespace latent {

#if defined(KDA_SIMD)

using kda::v_add;
using kda::v_fma;
using kda::v_load;
using kda::v_max;
using kda::v_mul;
using kda::v_store;
using kda::v_sub;
using kda::v_transpose;
using kda::vf;

constexpr int LANES = kda::VW;
// Accumulators of a register block, out of 32 registers (AVX2: 16), and the vectors per row of the block.
constexpr int N_ACCUMULATORS = LANES == 8 ? 12 : 24;
constexpr int MAX_COLUMNS    = LANES == 8 ? 2 : 4;

static inline vf v_set(float x) {
    return kda::v_set1(x);
}
// ggml's own, so that the weights equal those of its softmax; with SVE it is defined for another type
static inline vf v_exp(vf a) {
#if defined(__ARM_FEATURE_SVE)
    return kda::v_exp(a);
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
