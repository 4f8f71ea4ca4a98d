#pragma once

// Products of quantised weights on the CPU, MUL_MAT and MUL_MAT_ID: many activation rows as matrix products, few row by
// row.
// What is computed, for which types and layouts, and with which error is said in the folder's README.

#include "ggml-cpu-impl.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// How the weights lie in memory: the type's own rows, or interleaved as upstream's repack buffer type does it
// (ggml-cpu/repack.cpp: 8 rows side by side, 8 bytes of each in turn).
enum quant_gemm_layout {
    QUANT_GEMM_ROWS,
    QUANT_GEMM_8X8,
    QUANT_GEMM_OTHER,
};

// Bytes of params->wdata wanted for this MUL_MAT or MUL_MAT_ID node; 0 where ggml's own path serves it.
// Looks at shapes and types alone, so that it may be asked before memory is assigned.
size_t ggml_quant_gemm_work_size(const struct ggml_tensor * dst, int n_tasks, enum quant_gemm_layout layout);

// Computes the node and returns true, or returns false (nothing touched) where ggml's own path has to serve: other
// types, layouts and shapes, an instruction set without VNNI, use_ref, or a node marked so (ggml-op-marks.h).
bool ggml_compute_forward_quant_gemm(const struct ggml_compute_params * params,
                                     struct ggml_tensor *               dst,
                                     enum quant_gemm_layout             layout);

// Node node_n and the one after it are gate and up of the SwiGLU behind them: computes all three as one and returns 2;
// or returns 0, nothing touched, where they are not, or one of the products is not served here. The results are those of
// the single nodes to the last bit.
int ggml_quant_gemm_gated(const struct ggml_cgraph * cgraph, int node_n, const struct ggml_compute_params * params);

#ifdef __cplusplus
}

// How the weights of a product lie; QUANT_GEMM_OTHER where they are in a buffer of another kind.
quant_gemm_layout ggml_quant_gemm_layout(const ggml_tensor * product);

// The products of ggml_quant_gemm_gated, of one shape, type and layout, and of the same activations.
bool ggml_compute_forward_quant_gemm_gated(const ggml_compute_params * params,
                                           const ggml_tensor *         gate,
                                           const ggml_tensor *         up,
                                           ggml_tensor *               swiglu,
                                           quant_gemm_layout           layout);
#endif
