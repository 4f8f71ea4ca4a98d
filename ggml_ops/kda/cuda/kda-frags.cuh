#pragma once

// Matmuls on tensor cores with the accuracy of float32: each factor is the sum hi + lo of two bf16 numbers, accurate to
// 2^-17 relative; the product is hi*hi + hi*lo + lo*hi, summed in float32. bf16 has the range of float32, so nothing
// over- or underflows before the product does. Two products, with the right-hand factor as one F16 number, miss the limit of
// 1e-7 (NMSE up to 1e-5 with nearly parallel keys; computed in float64).

#include "kda-device.cuh"
#include "kimi-mma.cuh"

namespace kda_cuda {

// Splits x and y into bf16 hi + lo, packed in pairs.
static __device__ __forceinline__ terms<2> split(float x, float y) {
    return kimi_cuda::split<__nv_bfloat16, 2>(x, y);
}

// frag_b is in memory order, so that a lane's part is one 16-byte word.
template <int WORDS> struct alignas(WORDS == 2 ? 16 : 4) fragment {
    uint32_t hi[WORDS], lo[WORDS];

    __device__ void set(int i, const terms<2> & x) {
        hi[i] = x.term[0];
        lo[i] = x.term[1];
    }
};

using frag_a = fragment<4>;
using frag_b = fragment<2>;

// c += a b
static __device__ __forceinline__ void mma_split(float (&c)[4], const frag_a & a, const frag_b & b) {
    mma<__nv_bfloat16>(c, a.lo, b.hi);
    mma<__nv_bfloat16>(c, a.hi, b.lo);
    mma<__nv_bfloat16>(c, a.hi, b.hi);
}

constexpr int MMA_TOGETHER = 4;

// c[n] += a b[n] for neighbouring n. The three products of each n depend on one another, so they are interleaved.
static __device__ __forceinline__ void mma_split(float (*c)[4], const frag_a & a, const frag_b (&b)[MMA_TOGETHER]) {
#pragma unroll
    for (int n = 0; n < MMA_TOGETHER; ++n) {
        mma<__nv_bfloat16>(c[n], a.lo, b[n].hi);
    }
#pragma unroll
    for (int n = 0; n < MMA_TOGETHER; ++n) {
        mma<__nv_bfloat16>(c[n], a.hi, b[n].lo);
    }
#pragma unroll
    for (int n = 0; n < MMA_TOGETHER; ++n) {
        mma<__nv_bfloat16>(c[n], a.hi, b[n].hi);
    }
}

// The accumulators of two neighbouring 16x8 products as the left factor of another product.
static __device__ __forceinline__ frag_a as_factor(const float (&left)[4], const float (&right)[4]) {
    frag_a a;
    a.set(0, split(left[0], left[1]));
    a.set(1, split(left[2], left[3]));
    a.set(2, split(right[0], right[1]));
    a.set(3, split(right[2], right[3]));
    return a;
}

static __device__ __forceinline__ frag_b load_frag(const void * fragments, int index, int lane) {
    frag_b      b;
    const uint4 x = static_cast<const uint4 *>(fragments)[index * WARP + lane];
    b.hi[0]       = x.x;
    b.hi[1]       = x.y;
    b.lo[0]       = x.z;
    b.lo[1]       = x.w;
    return b;
}

// Fragments at(0), at(1), ..
template <typename F>
static __device__ __forceinline__ void
load_frags(frag_b (&b)[MMA_TOGETHER], const void * fragments, const F & at, int lane) {
#pragma unroll
    for (int n = 0; n < MMA_TOGETHER; ++n) {
        b[n] = load_frag(fragments, at(n), lane);
    }
}

static __device__ __forceinline__ void store_frag(void * fragments, int index, int lane, const frag_b & b) {
    static_cast<uint4 *>(fragments)[index * WARP + lane] = make_uint4(b.hi[0], b.hi[1], b.lo[0], b.lo[1]);
}

}  // namespace kda_cuda
