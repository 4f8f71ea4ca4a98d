#pragma once

// The recurrence of Kimi Delta Attention with its gates and its output norm, as one operator.
// Specification: README.md next to this file in its source repository.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// X(n) for each supported head size
#define GGML_KDA_HEAD_SIZES(X) X(32) X(64) X(96) X(128) X(256)

// With fewer tokens, a sequence has the same bits on the CPU as its tokens decoded one after the other. From this number
// on, it is computed in chunks.
#define GGML_KDA_SCAN_CHUNKED_FROM 32

// the sources in order, and the parameters in the layout of op_params
enum ggml_kda_scan_src {
    GGML_KDA_SCAN_QKV,
    GGML_KDA_SCAN_F,
    GGML_KDA_SCAN_DT_BIAS,
    GGML_KDA_SCAN_A,
    GGML_KDA_SCAN_BETA,
    GGML_KDA_SCAN_GATE,
    GGML_KDA_SCAN_NORM,
    GGML_KDA_SCAN_CACHE,
    GGML_KDA_SCAN_ROWS,
    GGML_KDA_SCAN_N_SRC,
};

struct ggml_kda_scan_params {
    int32_t n_snapshots;
    int32_t zero_row;
    float   eps;
    float   lower_bound;
};

// D head size, H heads, T tokens per sequence, S sequences, R rows of the cache; float32 except rows
//
//   qkv     [D, 3*H, T, S]  q heads, then k, then v: the result of ggml_kda_conv
//   f       [D, H, T, S]    forget gate before dt_bias and softplus
//   dt_bias [D*H]
//   a       [H]             -exp(A_log); any shape of H elements
//   beta    [H, T, S]       before the sigmoid
//   gate    [D, H, T, S]    output gate before the sigmoid
//   norm    [D]             weight of the output's RMS norm
//   cache   [D*D*H, R]      states, s[j*D + i] = S[i][j]
//   rows    [S] int32       the row of the cache that each sequence continues
//
//   n_snapshots  states kept per sequence: slot s of the result is the state s tokens before the end
//   zero_row     sequences that continue this row start from zero, and the row is not read; -1: none
//   eps          of the output's RMS norm
//   lower_bound  -INFINITY: log-gate = a * softplus(f + dt_bias)
//                finite:    log-gate = lower_bound * sigmoid(-a * (f + dt_bias))
//
// result: [D*H, T*S + D*S*n_snapshots]: the gated output [D, H, T, S], then the states
// [D*D*H, S, n_snapshots], of which slots 0..min(T, n_snapshots-1) are written;
// slot T is the state before the first token
GGML_API struct ggml_tensor * ggml_kda_scan(struct ggml_context *       ctx,
                                            struct ggml_tensor * const  sources[GGML_KDA_SCAN_N_SRC],
                                            struct ggml_kda_scan_params params);

GGML_API struct ggml_kda_scan_params ggml_kda_scan_get_params(const struct ggml_tensor * op);

GGML_API bool ggml_kda_head_size_supported(int64_t head_size);

#ifdef __cplusplus
}
#endif
