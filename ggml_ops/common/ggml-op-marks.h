#pragma once

// Marks that the builder of a graph leaves on nodes: what a backend must not use for them.
//
// A mark is a bit in the last of the operator's parameters, which upstream reads for none of the operators marked: a
// backend that does not know the marks computes the node as usual. Marks belong to the graph, so contexts of one
// process may differ in them, and a graph that is reused keeps its own.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_OP_MARK_PARAM (GGML_MAX_OP_PARAMS / (int) sizeof(int32_t) - 1)

enum ggml_op_mark {
    GGML_OP_MARK_UPSTREAM = 1,  // MUL_MAT, MUL_MAT_ID, FLASH_ATTN_EXT: use upstream's kernels
    GGML_OP_MARK_UNFUSED  = 2,  // do not start a fused run of nodes here
};

static inline void ggml_op_set_mark(struct ggml_tensor * node, enum ggml_op_mark mark) {
    node->op_params[GGML_OP_MARK_PARAM] |= mark;
}

static inline bool ggml_op_has_mark(const struct ggml_tensor * node, enum ggml_op_mark mark) {
    return (node->op_params[GGML_OP_MARK_PARAM] & mark) != 0;
}

#ifdef __cplusplus
}
#endif
