#pragma once

// The short convolutions of Kimi Delta Attention with their activations and norms, as one operator.
// Specification: README.md next to this file in its source repository.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_KDA_CONV_WIDTH 4

// the sources in order, and the parameters in the layout of op_params
enum ggml_kda_conv_src {
    GGML_KDA_CONV_Q,
    GGML_KDA_CONV_K,
    GGML_KDA_CONV_V,
    GGML_KDA_CONV_WQ,
    GGML_KDA_CONV_WK,
    GGML_KDA_CONV_WV,
    GGML_KDA_CONV_CACHE,
    GGML_KDA_CONV_ROWS,
    GGML_KDA_CONV_N_SRC,
};

struct ggml_kda_conv_params {
    int32_t head_size;
    int32_t n_snapshots;
    int32_t zero_row;
    float   eps;
};

// C channels (head size times heads), T tokens per sequence, S sequences, R rows of the cache;
// float32 except rows
//
//   q, k, v    [C, T, S]   the projections
//   wq, wk, wv [4*C]       taps of each channel, oldest first; any shape of 4*C elements
//   cache      [9*C, R]    for q, then k, then v: the last three inputs of each channel, oldest first
//   rows       [S] int32   the row of the cache that each sequence continues
//
//   n_snapshots  states kept per sequence: slot s of the result is the state s tokens before the end
//   zero_row     sequences that continue this row start from zero, and the row is not read; -1: none
//   eps          of the L2 norm x / sqrt(sum x^2 + eps) of each head of q and of k
//
// result: [3*C, T*S + 3*S*n_snapshots]: silu(conv) of q (normalized, times head_size^-1/2), of k (normalized) and of
// v, [3*C, T, S], then the states [9*C, S, n_snapshots], of which slots 0..min(T, n_snapshots-1) are written;
// slot T is the state before the first token
GGML_API struct ggml_tensor * ggml_kda_conv(struct ggml_context *       ctx,
                                            struct ggml_tensor * const  sources[GGML_KDA_CONV_N_SRC],
                                            struct ggml_kda_conv_params params);

GGML_API struct ggml_kda_conv_params ggml_kda_conv_get_params(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
