#pragma once

// Matrix products on tensor cores and asynchronous copies: thin names for PTX of compute capability 8.0, which kernels
// of older devices must not call; and exact powers of two.
//
// Fragments of mma.sync m16n8k16, lane = 4*g + t:
//   a[0..3]: (row g, columns 2t 2t+1), (row g+8, the same), (row g, columns 2t+8 2t+9), (row g+8, the same)
//   b[0..1]: (rows 2t 2t+1, column g), (rows 2t+8 2t+9, column g)
//   c[0..3]: (row g, columns 2t, 2t+1), (row g+8, the same)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace latent_cuda {

constexpr int      WARP      = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float    LOG2_E    = 1.4426950408889634f;

// 2^(exponent - 127), for an exponent in [1, 254].
static __device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(static_cast<uint32_t>(exponent) << 23);
}

static __device__ __forceinline__ int exponent_of(float x) {
    return __float_as_uint(x) >> 23 & 0xff;
}

// Two neighbouring values in a word, the first in its low half.
template <typename T> static __device__ __forceinline__ uint32_t pack(float x, float y) {
    uint32_t bits;
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(x, y);
        memcpy(&bits, &pair, sizeof(bits));
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
        memcpy(&bits, &pair, sizeof(bits));
    }
    return bits;
}

template <typename T> static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    if constexpr (std::is_same_v<T, __half>) {
        __half2 pair;
        memcpy(&pair, &bits, sizeof(bits));
        return __half22float2(pair);
    } else {
        return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
    }
}

// Two floats, each as the sum of up to two 16-bit numbers.
template <int TERMS> struct terms {
    uint32_t term[TERMS];
};

template <typename T, int TERMS> static __device__ __forceinline__ terms<TERMS> split(float x, float y) {
    terms<TERMS> out;
    out.term[0] = pack<T>(x, y);
    if constexpr (TERMS == 2) {
        const float2 high = unpack<T>(out.term[0]);
        out.term[1]       = pack<T>(x - high.x, y - high.y);
    }
    return out;
}

// c += a b
template <typename T>
static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

static __device__ __forceinline__ uint32_t shared_address(const void * shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8 x 8 matrices of 16-bit values; lane 8*i + j gives the address of row j of matrix i. Lane 4*g + t gets of each
// matrix (row g, columns 2t 2t+1), and transposed (rows 2t 2t+1, column g).
static __device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void * row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

static __device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void * row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 or 4 bytes from global to shared memory, both so aligned; the first `given` of them are read, the rest is zero.
static __device__ __forceinline__ void copy_16_async(void * shared, const void * global, int given) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(given)
                 : "memory");
}

static __device__ __forceinline__ void copy_4_async(void * shared, const void * global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(shared_address(shared)), "l"(global) : "memory");
}

// Waits until all of this thread's copies have arrived.
static __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_all;" : : : "memory");
}

}  // namespace latent_cuda
