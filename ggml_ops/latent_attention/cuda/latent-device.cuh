#pragma once

// What the kernels of latent attention share on the device, beside the products: exact powers of two.

#include "kimi-mma.cuh"

namespace latent_cuda {

using namespace kimi_cuda;

constexpr float LOG2_E = 1.4426950408889634f;

// 2^(exponent - 127), for an exponent in [1, 254].
static __device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(static_cast<uint32_t>(exponent) << 23);
}

static __device__ __forceinline__ int exponent_of(float x) {
    return __float_as_uint(x) >> 23 & 0xff;
}

}  // namespace latent_cuda
