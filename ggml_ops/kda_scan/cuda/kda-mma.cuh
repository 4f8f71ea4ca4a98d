#pragma once

// Matrix products on tensor cores with float32's accuracy, and asynchronous copies: thin names for PTX.
//
// Each float32 factor is split into two bf16 numbers, x = hi + lo to 2^-17 of x; the product is hi*hi + hi*lo + lo*hi,
// summed in float32. bf16 has float32's range, so that nothing over- or underflows before the product does.
//
// Fragments of mma.sync m16n8k16, lane = 4*g + t:
//   a[0..3]: (row g, columns 2t 2t+1), (row g+8, the same), (row g, columns 2t+8 2t+9), (row g+8, the same)
//   b[0..1]: (rows 2t 2t+1, column g), (rows 2t+8 2t+9, column g)
//   c[0..3]: (row g, columns 2t, 2t+1), (row g+8, the same)

#include "kda-device.cuh"

#include <cuda_bf16.h>

namespace kda_cuda {

// Two neighbouring factors, split: the low half of each word is the first.
struct split2 {
    uint32_t hi, lo;
};

static __device__ __forceinline__ uint32_t pack_bf16(float x, float y) {
    const __nv_bfloat162 packed = __floats2bfloat162_rn(x, y);
    uint32_t             bits;
    memcpy(&bits, &packed, sizeof(bits));
    return bits;
}

static __device__ __forceinline__ split2 split(float x, float y) {
    const uint32_t hi = pack_bf16(x, y);
    return { hi, pack_bf16(x - __uint_as_float(hi << 16), y - __uint_as_float(hi & 0xffff0000u)) };
}

struct frag_a {
    uint32_t hi[4], lo[4];

    __device__ void set(int i, const split2 & x) {
        hi[i] = x.hi;
        lo[i] = x.lo;
    }
};

// In the order in which memory holds it, so that a lane's part is one 16-byte word.
struct alignas(16) frag_b {
    uint32_t hi[2], lo[2];

    __device__ void set(int i, const split2 & x) {
        hi[i] = x.hi;
        lo[i] = x.lo;
    }
};

static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();  // chunks_refused keeps older devices away
#endif
}

// c += a b
static __device__ __forceinline__ void mma_split(float (&c)[4], const frag_a & a, const frag_b & b) {
    mma(c, a.lo, b.hi);
    mma(c, a.hi, b.lo);
    mma(c, a.hi, b.hi);
}

constexpr int MMA_TOGETHER = 4;

// c[n] += a b[n] for neighbouring ones. The three products of each wait for one another, so they go in turns.
static __device__ __forceinline__ void mma_split(float (*c)[4], const frag_a & a, const frag_b (&b)[MMA_TOGETHER]) {
#pragma unroll
    for (int n = 0; n < MMA_TOGETHER; ++n) {
        mma(c[n], a.lo, b[n].hi);
    }
#pragma unroll
    for (int n = 0; n < MMA_TOGETHER; ++n) {
        mma(c[n], a.hi, b[n].lo);
    }
#pragma unroll
    for (int n = 0; n < MMA_TOGETHER; ++n) {
        mma(c[n], a.hi, b[n].hi);
    }
}

// The accumulators of two neighbouring 16x8 products as the left factor of another one.
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

// Fragments index, index + step, ..
static __device__ __forceinline__ void
load_frags(frag_b (&b)[MMA_TOGETHER], const void * fragments, int index, int step, int lane) {
#pragma unroll
    for (int n = 0; n < MMA_TOGETHER; ++n) {
        b[n] = load_frag(fragments, index + n * step, lane);
    }
}

static __device__ __forceinline__ void store_frag(void * fragments, int index, int lane, const frag_b & b) {
    static_cast<uint4 *>(fragments)[index * WARP + lane] = make_uint4(b.hi[0], b.hi[1], b.lo[0], b.lo[1]);
}

// 16 bytes from global to shared memory, both aligned to 16
static __device__ __forceinline__ void copy_async(void * shared, const void * global) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    const uint32_t to = __cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(global) : "memory");
#else
    __trap();
#endif
}

static __device__ __forceinline__ void commit_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits until all but the last PENDING groups of this thread's copies have arrived.
template <int PENDING> static __device__ __forceinline__ void wait_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
#endif
}

}  // namespace kda_cuda
