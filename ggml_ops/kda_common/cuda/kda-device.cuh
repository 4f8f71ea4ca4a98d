#pragma once

// What the CUDA kernels of KDA_CONV and KDA_SCAN share: which states they read and write, gates, sums over a warp,
// vectors of four.

#include "kda-params.cuh"

#include <cmath>

namespace kda_cuda {

constexpr int      WARP      = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The state that sequence s continues, or nullptr for zeros.
static __device__ __forceinline__ const float * state_found(const states & st, int s) {
    const int32_t row = st.rows[s];
    return row == st.zero_row ? nullptr : st.cache + row * st.row_stride;
}

// Do the new states go straight to the cache? Only where no sequence reads a row that another one writes; the rows are
// looked at on the device, so a captured graph stays right whatever they hold. For whole warps.
static __device__ __forceinline__ bool writes_to_cache(const states & st) {
    if (st.in_cache.data == nullptr || st.n_seqs == 1) {
        return st.in_cache.data != nullptr;
    }
    bool own = true;
    for (int s = threadIdx.x % WARP; s < st.n_seqs; s += WARP) {
        own = own && (st.rows[s] == st.zero_row || st.rows[s] == st.first_row + s);
    }
    return __all_sync(ALL_LANES, own);
}

static __device__ __forceinline__ state_dest choose_dest(const states & st) {
    return writes_to_cache(st) ? st.in_cache : st.result;
}

static __device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

// e^(log-gate), at most 1; x: the gate's input with dt_bias added
static __device__ __forceinline__ float decay_of(float x, float a, const gate_kind & kind) {
    if (kind.bounded) {
        return expf(kind.lower_bound * sigmoid(-a * x));
    }
    return expf(a * (fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)))));
}

// Sum over groups of LANES neighbouring lanes, the same in each of them.
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
