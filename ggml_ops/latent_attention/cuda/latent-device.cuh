#pragma once

// Device functions common to the kernels of latent attention: exact powers of two, reductions over lanes.

#include "kimi-device.cuh"
#include "kimi-mma.cuh"

namespace latent_cuda {

using namespace kimi_cuda;

constexpr float LOG2_E = 1.4426950408889634f;

constexpr int MAX_SHARED_BYTES = 99 * 1024;  // of a block, on devices of capability 8.6, 8.9 and 12.0

#if defined(__CUDA_ARCH__)
constexpr int ARCHITECTURE = __CUDA_ARCH__;
#else
constexpr int ARCHITECTURE = 0;  // the host
#endif

// Whether tensor cores add products of halves as fast in float32 as in halves; for the host: ggml_cuda_latent_fast_sums.
constexpr bool FAST_SUMS = is_data_centre(ARCHITECTURE);

// threadIdx.x, read again. The compiler cannot know that it is the same, so it does not keep in registers what was derived
// from the first read.
static __device__ __forceinline__ int thread_again() {
#if defined(__CUDA_ARCH__)
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
#else
    return threadIdx.x;
#endif
}

// 2^(exponent - 127), for an exponent in [1, 254].
static __device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(static_cast<uint32_t>(exponent) << 23);
}

static __device__ __forceinline__ int exponent_of(float x) {
    return __float_as_uint(x) >> 23 & 0xff;
}

// The maximum of x over groups of LANES neighbouring lanes, returned in each of them.
template <int LANES = WARP> static __device__ __forceinline__ float max_lanes(float x) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, mask));
    }
    return x;
}

// The sum of x over such groups.
template <int LANES = WARP> static __device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, mask);
    }
    return x;
}

}  // namespace latent_cuda
