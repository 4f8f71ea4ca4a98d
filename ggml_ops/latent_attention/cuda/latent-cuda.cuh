#pragma once

// What the CUDA kernels of latent attention are told: plain pointers and numbers, so that they run without ggml.
//
// In: queries folded into the space of the cache, the cache as it lies in memory, a mask. Out: for each query and head
// the weighted mean of the first N_LATENT values of the rows that it sees.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace latent_cuda {

constexpr int N_LATENT = 512;  // values of a row that are both key and value
constexpr int N_ROPE   = 64;   // and those that are key alone
constexpr int N_CACHE  = N_LATENT + N_ROPE;

enum class cache_type { f32, f16, bf16, q8_0, q4_0 };

struct attention {
    const float * q;  // [streams][queries][heads][N_CACHE] by these strides in floats, which are even
    int64_t       q_stream, q_query, q_head;

    const void * cache;  // [streams][n_keys] rows; strides in bytes
    int64_t      cache_stream, cache_row;
    cache_type   type;

    const uint16_t * mask;  // [mask_streams][queries][n_keys] of half, -inf hides a key; nullptr: all is seen
    int64_t          mask_stream, mask_query;  // in values
    int              mask_streams;             // stream s has the mask of s % mask_streams

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

}  // namespace latent_cuda
