#pragma once

// What the CUDA kernels of latent attention are told: plain pointers and numbers, so that they run without ggml.
//
// In: queries folded into the space of the cache, the cache as it lies in memory, a mask. Out: for each query and head
// the weighted mean of the first N_LATENT values of the rows that it sees.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace latent_cuda {

constexpr int N_LATENT = 512;  // values of a row that are both key and value
constexpr int N_ROPE   = 64;   // and those that are key alone
constexpr int N_CACHE  = N_LATENT + N_ROPE;
constexpr int N_NOPE   = 128;  // values of a key that are expanded
constexpr int N_KEY    = N_NOPE + N_ROPE;
constexpr int N_VALUE  = 128;

enum class cache_type { f32, f16, bf16, q8_0, q4_0 };

// Calls f with the type as a constant.
template <typename F> void with_cache_type(cache_type type, const F & f) {
    switch (type) {
    case cache_type::f32:
        return f(std::integral_constant<cache_type, cache_type::f32>());
    case cache_type::f16:
        return f(std::integral_constant<cache_type, cache_type::f16>());
    case cache_type::bf16:
        return f(std::integral_constant<cache_type, cache_type::bf16>());
    case cache_type::q8_0:
        return f(std::integral_constant<cache_type, cache_type::q8_0>());
    case cache_type::q4_0:
        return f(std::integral_constant<cache_type, cache_type::q4_0>());
    }
}

template <typename T> constexpr T divide_up(T a, T b) {
    return (a + b - 1) / b;
}

struct attention {
    const float * q;  // [streams][queries][heads][N_CACHE] by these strides in floats, which are even
    int64_t       q_stream, q_query, q_head;

    const void * cache;  // [streams][n_keys] rows; strides in bytes
    int64_t      cache_stream, cache_row;
    cache_type   type;

    const uint16_t * mask;  // [mask_streams][queries][n_keys] of half, -inf hides a key; nullptr: all is seen
    int64_t          mask_stream, mask_query;  // in values
    int              mask_streams;             // 1 or more: stream s has the mask of s % mask_streams

    float * out;  // [streams][queries][heads][N_LATENT]

    int   n_keys, n_queries, n_heads, n_streams;
    float scale;
};

// nullptr, or why the kernels cannot read sources that lie so.
const char * refused(const attention & args);

// Bytes of `work`, whose alignment must be 16; 0 where the keys are in one piece.
size_t workspace(const attention & args);

// Two launches at most. Compute capability 8.0 at least.
void attend(const attention & args, void * work, cudaStream_t stream);

// The decompressed form: q [..][N_KEY] by any strides, out [..][N_VALUE], rows of the cache at any address that its type
// allows. Of k_b and v_b all heads, one behind the other.
struct decompressed : attention {
    const float * k_b;      // [heads][N_LATENT][N_NOPE]
    const float * v_b;      // [heads][N_VALUE][N_LATENT]
    size_t        scratch;  // bytes that expanded keys may take
};

// Of `scratch`, but in tests; a constant, since the result depends on it, if by rounding alone.
constexpr size_t SCRATCH = 64 << 20;

size_t workspace(const decompressed & args);

// Two launches, and four for each run of keys that fits the scratch.
void attend(const decompressed & args, void * work, cudaStream_t stream);

}  // namespace latent_cuda
