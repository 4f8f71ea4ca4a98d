#pragma once

// Common to the project's CUDA kernels: matmul on tensor cores, floats as sums of 16-bit numbers for it, and
// asynchronous copies. The PTX requires compute capability 8.0; kernels do not call these functions on older devices.
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

// On older devices no kernel calls some of these functions: suppress the warning about unused functions.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#pragma nv_diag_suppress 177
#endif

namespace kimi_cuda {

constexpr int      WARP      = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Packs two neighbouring values into a word, the first in its low half. T: __half or __nv_bfloat16
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

// Products of two pairs of halves, each rounded.
static __device__ __forceinline__ uint32_t multiply_halves(uint32_t a, uint32_t b) {
    __half2 x, y;
    memcpy(&x, &a, sizeof(x));
    memcpy(&y, &b, sizeof(y));
    const __half2 product = __hmul2(x, y);
    uint32_t      bits;
    memcpy(&bits, &product, sizeof(bits));
    return bits;
}

// The first value of a packed word; second_of returns the second.
template <typename T> static __device__ __forceinline__ float first_of(uint32_t bits) {
    if constexpr (std::is_same_v<T, __half>) {
        return __half2float(__ushort_as_half(bits & 0xffff));
    } else {
        return __uint_as_float(bits << 16);
    }
}

template <typename T> static __device__ __forceinline__ float second_of(uint32_t bits) {
    if constexpr (std::is_same_v<T, __half>) {
        return __half2float(__ushort_as_half(bits >> 16));
    } else {
        return __uint_as_float(bits & 0xffff0000u);
    }
}

// Two floats, each as the sum of up to two 16-bit numbers. The relative error of two bf16 is 2^-17, with float32's
// range; that of two halves is 2^-22, within the range of halves.
template <int TERMS> struct terms {
    uint32_t term[TERMS];
};

template <typename T, int TERMS> static __device__ __forceinline__ terms<TERMS> split(float x, float y) {
    const uint32_t high = pack<T>(x, y);
    if constexpr (TERMS == 2) {
        return { high, pack<T>(x - first_of<T>(high), y - second_of<T>(high)) };
    } else {
        return { high };
    }
}

// c += a b
template <typename T>
static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// c += a b, where c is halves: (row g, columns 2t 2t+1), (row g+8, the same)
static __device__ __forceinline__ void mma(uint32_t (&c)[2], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ __forceinline__ uint32_t shared_address(const void * shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Loads four 8 x 8 matrices of 16-bit values; lane 8*i + j passes the address of row j of matrix i. Lane 4*g + t gets
// (row g, columns 2t 2t+1) of each matrix; transposed, (rows 2t 2t+1, column g).
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

// Copies 16 or 4 bytes from global to shared memory; both addresses must be aligned to this size. With `given`, only
// that many bytes are read and the rest becomes zero.
static __device__ __forceinline__ void copy_16_async(void * shared, const void * global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared_address(shared)), "l"(global) : "memory");
}

static __device__ __forceinline__ void copy_16_async(void * shared, const void * global, int given) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(given)
                 : "memory");
}

static __device__ __forceinline__ void copy_4_async(void * shared, const void * global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(shared_address(shared)), "l"(global) : "memory");
}

static __device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" : : : "memory");
}

// Waits until all but the last PENDING groups of this thread's copies have arrived.
template <int PENDING> static __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// Waits until all of this thread's copies have arrived.
static __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_all;" : : : "memory");
}

}  // namespace kimi_cuda
