#pragma once

// Matmuls of quantized weights on the CPU, MUL_MAT and MUL_MAT_ID: GEMM for many activation rows, row by row for few.
// The folder's README specifies the computation, the supported types and layouts, and the error.

#include "ggml-cpu-impl.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// The layout of the weights: rows of the type, or interleaved as in upstream's repack buffer type
// (ggml-cpu/repack.cpp: 8 rows interleaved by 8 bytes).
enum quant_gemm_layout {
    QUANT_GEMM_ROWS,
    QUANT_GEMM_8X8,
    QUANT_GEMM_OTHER,
};

// Bytes of params->wdata required for this MUL_MAT or MUL_MAT_ID node; 0 if ggml's own path computes it.
// Depends on shapes and types only, so it can be called before memory is allocated.
size_t ggml_quant_gemm_work_size(const struct ggml_tensor * dst, int n_tasks, enum quant_gemm_layout layout);

// Whether weights of this MUL_MAT or MUL_MAT_ID are used as rows, so that a repack buffer type should refuse them. The
// environment variable KIMI_REPACK=1, which --repack sets, requests interleaved copies where they are multiplied faster.
bool ggml_quant_gemm_prefers_rows(const struct ggml_tensor * op);

// Computes the node and returns true, or returns false (nothing touched) if ggml's own path has to compute it: other
// types, layouts and shapes, a CPU without these kernels, use_ref, or a marked node (ggml-op-marks.h).
bool ggml_compute_forward_quant_gemm(const struct ggml_compute_params * params,
                                     struct ggml_tensor *               dst,
                                     enum quant_gemm_layout             layout);

// If node_n and the next node are gate and up of the SwiGLU after them, computes all three as one and returns 2.
// Returns 0, nothing touched, if they are not or if one of the matmuls is not supported here. The results are
// bit-identical to those of the single nodes.
int ggml_quant_gemm_gated(const struct ggml_cgraph * cgraph, int node_n, const struct ggml_compute_params * params);

#ifdef __cplusplus
}

// The layout of the weights of a matmul; QUANT_GEMM_OTHER if they are in another kind of buffer.
quant_gemm_layout ggml_quant_gemm_layout(const ggml_tensor * product);

// The matmuls of ggml_quant_gemm_gated, of the same shape, type and layout, and of the same activations.
bool ggml_compute_forward_quant_gemm_gated(const ggml_compute_params * params,
                                           const ggml_tensor *         gate,
                                           const ggml_tensor *         up,
                                           ggml_tensor *               swiglu,
                                           quant_gemm_layout           layout);
#endif
