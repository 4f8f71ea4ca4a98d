#pragma once

// KDA conv on CUDA. Specification: ggml_ops/kda/README.md.

#include "kda-params.cuh"

namespace kda_cuda {

// C = head_size*n_heads channels; rows of x have head stride head_size
struct conv_args {
    rows          x[3];  // q, k, v
    const float * w[3];  // [C, 4] taps, oldest first
    float *       out;   // [3*C, T, S]
    states        st;    // [9*C]
    int           head_size, n_heads, n_tokens, n_seqs;
    float         eps;
};

void conv(const conv_args & args, cudaStream_t stream);

}  // namespace kda_cuda
