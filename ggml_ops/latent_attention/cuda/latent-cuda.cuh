#pragma once

// Arguments of the CUDA kernels of latent attention: plain pointers and numbers, so that the kernels run without ggml.
//
// Input: queries with k_b absorbed, the cache in its layout in memory, a mask. Output: for each query and head the
// weighted mean of the first N_LATENT values of the visible rows.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace latent_cuda {

constexpr int N_LATENT = 512;  // values of a row that are both key and value
constexpr int N_ROPE   = 64;   // values of a row that are key only
constexpr int N_CACHE  = N_LATENT + N_ROPE;
constexpr int N_NOPE   = 128;  // expanded values of a key
constexpr int N_KEY    = N_NOPE + N_ROPE;
constexpr int N_VALUE  = 128;

enum class cache_type { f32, f16, bf16, q8_0, q4_0 };

// Calls f with the type as a compile-time constant.
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
    const float * q;  // [streams][queries][heads][N_CACHE]; strides in floats, even
    int64_t       q_stream, q_query, q_head;

    const void * cache;  // [streams][n_keys] rows; strides in bytes
    int64_t      cache_stream, cache_row;
    cache_type   type;

    const uint16_t * mask;  // [mask_streams][queries][n_keys] of half, -inf hides a key; nullptr: all keys are visible
    int64_t          mask_stream, mask_query;  // strides in values
    int              mask_streams;             // >= 1; stream s uses mask s % mask_streams

    float * out;  // [streams][queries][heads][N_LATENT]

    int   n_keys, n_queries, n_heads, n_streams;
    int   n_multiprocessors;  // of the device
    bool  half_sums;          // whether 32 weighted values may be added in halves (64 rows), as some devices do faster
    float scale;
};

// nullptr, or why the kernels do not support this layout of the sources.
const char * refused(const attention & args);

// Size of `work` in bytes, 0 if the keys are not split. `work` has to be 16-byte aligned.
size_t workspace(const attention & args);

// At most two launches. Requires compute capability 8.0.
void attend(const attention & args, void * work, cudaStream_t stream);

// The decompressed form: q [..][N_KEY] with any strides, out [..][N_VALUE], cache rows at any address that is aligned
// for their type. The heads of k_b and v_b are contiguous.
struct decompressed : attention {
    const float * k_b;      // [heads][N_LATENT][N_NOPE]
    const float * v_b;      // [heads][N_VALUE][N_LATENT]
    size_t        scratch;  // bytes available for expanded keys
    bool          exact;    // F16 and BF16 caches: as accurate as float32; false: one half per value
};

// Default of `scratch`; only tests change it. A constant, since the rounding of the result depends on it.
constexpr size_t SCRATCH = 64 << 20;

size_t workspace(const decompressed & args);

// Two launches, plus four for each run of keys that fits in the scratch.
void attend(const decompressed & args, void * work, cudaStream_t stream);

}  // namespace latent_cuda
