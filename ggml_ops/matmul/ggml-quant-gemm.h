#pragma once

// MUL_MAT and MUL_MAT_ID: whether the CPU may take its own path (quant-gemm) for the node.
//
// The mark stands in the last of the operator's parameters, which no backend looks at: one that knows nothing of it
// computes the node as ever. It is set when a graph is built, so two graphs of one process may differ in it, and a
// graph that is used again keeps its own.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_QUANT_GEMM_PARAM (GGML_MAX_OP_PARAMS / (int) sizeof(int32_t) - 1)

// Leaves the product to the paths that upstream has for it.
static inline void ggml_quant_gemm_switch_off(struct ggml_tensor * product) {
    product->op_params[GGML_QUANT_GEMM_PARAM] = 1;
}

static inline bool ggml_quant_gemm_is_on(const struct ggml_tensor * product) {
    return product->op_params[GGML_QUANT_GEMM_PARAM] == 0;
}

#ifdef __cplusplus
}
#endif
