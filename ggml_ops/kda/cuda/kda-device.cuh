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

// Whether a sequence reads a row of the cache that another one writes. If so, the new states are written to the result
// first, and copied to the cache when all old ones have been read. The rows are read on the device, so a captured graph
// is correct for any rows. Call it with whole warps.
static __device__ __forceinline__ bool rows_conflict(const states & st) {
    if (st.in_cache.data == nullptr || st.n_seqs == 1) {
        return false;
    }
    bool own = true;
    for (int s = threadIdx.x % WARP; s < st.n_seqs; s += WARP) {
        const int32_t  row    = st.rows[s];
        const uint32_t at     = row - st.first_row;  // large before the first one
        const uint32_t slots  = st.n_slots * st.slot_rows;
        const int      writer = at < slots ? at % st.slot_rows : st.n_seqs;  // this sequence writes it, if it exists
        own                   = own && (row == st.zero_row || writer == s || writer >= st.n_seqs);
    }
    return !__all_sync(ALL_LANES, own);
}

// Where the new states are written.
static __device__ __forceinline__ const state_dest & dest_of(const states & st, bool conflict) {
    return conflict || st.in_cache.data == nullptr ? st.result : st.in_cache;
}

// The sequences that a block computes: its own one; if rows conflict, the block of the first sequence computes all, one
// after the other, and then copies their states.
struct seqs_of_block {
    int  begin, end;
    bool conflict;
};

static __device__ __forceinline__ seqs_of_block choose_seqs(const states & st, int s) {
    if (rows_conflict(st)) {
        return { 0, s == 0 ? st.n_seqs : 0, true };
    }
    return { s, s + 1, false };
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
    float       p         = fmaf(r, 1.0f / 720, 1.0f / 120);
    p                     = fmaf(p, r, 1.0f / 24);
    p                     = fmaf(p, r, 1.0f / 6);
    p                     = fmaf(p, r, 0.5f);
    p                     = fmaf(p, r, 1.0f);
    p                     = fmaf(p, r, 1.0f);
    return p * __uint_as_float(__float_as_uint(t) << 23);  // n = -127: p * 0
}

// log(1 + t) for 0 <= t <= 1, relative error 2.4e-7, also for small t: 2 artanh(t / (2 + t)) as a series.
static __device__ __forceinline__ float log_1_plus(float t) {
    const float s = __fdividef(t, 2.0f + t);
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
        x[i] = decay_exp(a * (fmaxf(x[i], 0.0f) + log_1_plus(__expf(-fabsf(x[i])))));
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

static __device__ __forceinline__ void store4(float * p, float4 x) {
    *reinterpret_cast<float4 *>(p) = x;
}

static __device__ __forceinline__ float dot4(const float4 & x, const float4 & y) {
    return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}

static __device__ __forceinline__ float4 mul4(const float4 & x, const float4 & y) {
    return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w);
}

}  // namespace kda_cuda
