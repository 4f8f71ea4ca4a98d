#pragma once

// Device functions common to the CUDA kernels of KDA_CONV and KDA_SCAN: source and destination of the states, gates,
// warp reductions, vectors of four.

#include "kda-params.cuh"
#include "kimi-mma.cuh"

#include <cmath>

namespace kda_cuda {

using namespace kimi_cuda;

// The state that sequence s continues, or nullptr for zeros.
static __device__ __forceinline__ const float * state_found(const states & st, int s) {
    const int32_t row = st.rows[s];
    return row == st.zero_row ? nullptr : st.cache + row * st.row_stride;
}

// Whether the new states are written directly to the cache: only if no sequence reads a row that another one writes.
// The rows are read on the device, so a captured graph is correct for any rows. Call it with whole warps.
static __device__ __forceinline__ bool writes_to_cache(const states & st) {
    if (st.in_cache.data == nullptr || st.n_seqs == 1) {
        return st.in_cache.data != nullptr;
    }
    const int64_t slot_rows = st.in_cache.slot / st.row_stride;
    bool          own       = true;
    for (int s = threadIdx.x % WARP; s < st.n_seqs; s += WARP) {
        const int64_t row    = st.rows[s] - st.first_row;  // written by sequence `writer`, if it exists
        const int64_t writer = row >= 0 && row < st.n_slots * slot_rows ? row % slot_rows : st.n_seqs;
        own                  = own && (st.rows[s] == st.zero_row || writer == s || writer >= st.n_seqs);
    }
    return __all_sync(ALL_LANES, own);
}

static __device__ __forceinline__ state_dest choose_dest(const states & st) {
    return writes_to_cache(st) ? st.in_cache : st.result;
}

static __device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

// e^x for x <= 0, accurate to rounding near 0 whatever the compiler makes of expf: a decay of nearly 1 applies over
// thousands of tokens, and so would the error of the fast version. 0 where float32 has no normal numbers.
static __device__ __forceinline__ float decay_exp(float x) {
    constexpr float ROUND = 12582912.0f + 127;  // 1.5 * 2^23: a sum with it ends in the bits of n + 127
    x                     = fmaxf(x, -88.0f);
    const float t         = fmaf(x, 1.44269504f, ROUND);
    const float n         = t - ROUND;
    const float r         = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, x));  // x - n ln 2, ln 2 in two parts
    float       p = fmaf(r, 1.0f / 720, 1.0f / 120);
    p             = fmaf(p, r, 1.0f / 24);
    p             = fmaf(p, r, 1.0f / 6);
    p             = fmaf(p, r, 0.5f);
    p             = fmaf(p, r, 1.0f);
    p             = fmaf(p, r, 1.0f);
    return p * __uint_as_float(__float_as_uint(t) << 23);  // n = -127: p * 0
}

// log(1 + t) for 0 <= t <= 1, relative error 2.4e-7, also for small t: 2 artanh(t / (2 + t)) as a series.
static __device__ __forceinline__ float log_1_plus(float t) {
    const float s = t / (2.0f + t);
    const float z = s * s;
    float       p = fmaf(z, 0.280244656f, 0.279991390f);
    p             = fmaf(p, z, 0.400216990f);
    p             = fmaf(p, z, 0.666664140f);
    p             = fmaf(p, z, 2.0f);
    return p * s;
}

// Converts inputs of the gates, with dt_bias added, to e^(log-gate), at most 1.
template <int N> static __device__ __forceinline__ void decays_of(float (&x)[N], float a, const gate_kind & kind) {
    if (kind.bounded) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = decay_exp(kind.lower_bound * sigmoid(-a * x[i]));
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = decay_exp(a * (fmaxf(x[i], 0.0f) + log_1_plus(expf(-fabsf(x[i])))));
    }
}

// Sum over groups of LANES neighbouring lanes, returned in each of them.
template <int LANES> static __device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, mask);
    }
    return x;
}

static __device__ __forceinline__ float4 load4(const float * p) {
    return *reinterpret_cast<const float4 *>(p);
}

static __device__ __forceinline__ void store4(float * p, const float4 & x) {
    *reinterpret_cast<float4 *>(p) = x;
}

static __device__ __forceinline__ float dot4(const float4 & x, const float4 & y) {
    return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}

static __device__ __forceinline__ float4 mul4(const float4 & x, const float4 & y) {
    return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w);
}

}  // namespace kda_cuda
