#pragma once

// Rows of floats that kernels read and write four at a time, and tensors that share memory.

#include "common.cuh"

namespace kimi_cuda {

constexpr int VALUES_PER_LANE = 4;

static __device__ __forceinline__ float4 load4(const float * from) {
    return *reinterpret_cast<const float4 *>(from);
}

static __device__ __forceinline__ void store4(float * to, float4 x) {
    *reinterpret_cast<float4 *>(to) = x;
}

// Whether load4 and store4 may be used from this address on.
inline bool is_aligned4(const void * data) {
    return reinterpret_cast<uintptr_t>(data) % sizeof(float4) == 0;
}

// One row of n_values floats for load4.
inline bool is_row(const ggml_tensor * t, int64_t n_values) {
    return t->type == GGML_TYPE_F32 && t->ne[0] == n_values && n_values % VALUES_PER_LANE == 0 && ggml_nrows(t) == 1 &&
           ggml_is_contiguous(t) && is_aligned4(t->data);
}

inline bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * first  = static_cast<const char *>(a->data);
    const char * second = static_cast<const char *>(b->data);
    return first < second + ggml_nbytes(b) && second < first + ggml_nbytes(a);
}

}  // namespace kimi_cuda
