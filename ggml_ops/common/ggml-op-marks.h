#pragma once

// Marks on the nodes of a graph. The builder of the graph sets them, or ggml-verify.cpp before a device computes it. Each
// mark disables a code path in a backend.
//
// A mark is a bit in the operator's last parameter, which upstream does not read for these operators, so a backend that
// does not know the marks computes the node as usual. Marks belong to the graph: contexts of one process may use
// different marks, and a reused graph keeps its marks.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_OP_MARK_PARAM (GGML_MAX_OP_PARAMS / (int) sizeof(int32_t) - 1)

enum ggml_op_mark {
    GGML_OP_MARK_UPSTREAM = 1,  // MUL_MAT, MUL_MAT_ID, FLASH_ATTN_EXT: use upstream's kernels
    GGML_OP_MARK_UNFUSED  = 2,  // do not start a fused run of nodes here

    // MUL_MAT, MUL_MAT_ID: use only code paths whose choice and order of summation do not depend on the number of columns
    GGML_OP_MARK_INVARIANT = 4,

    GGML_OP_MARK_KEEP_COPY = 8,  // KDA_CONV, KDA_SCAN: do not elide the copy of the new states

    // LATENT_ATTN, and on CUDA FLASH_ATTN_EXT over a latent cache: the most accurate kernels, also where others are
    // faster
    GGML_OP_MARK_EXACT = 16,
};

// The operators on which GGML_OP_MARK_UNFUSED has an effect: node-fusion.cpp; ggml-metal-fuse.cpp; on CUDA norm.cu,
// latent-store.cu, matvec.cu and graph_optimize.
static inline bool ggml_op_starts_fused_run(enum ggml_op op) {
    return op == GGML_OP_MUL_MAT || op == GGML_OP_UNARY || op == GGML_OP_MUL || op == GGML_OP_ADD ||
           op == GGML_OP_RMS_NORM;
}

static inline void ggml_op_set_mark(struct ggml_tensor * node, enum ggml_op_mark mark) {
    node->op_params[GGML_OP_MARK_PARAM] |= mark;
}

static inline bool ggml_op_has_mark(const struct ggml_tensor * node, enum ggml_op_mark mark) {
    return (node->op_params[GGML_OP_MARK_PARAM] & mark) != 0;
}

#ifdef __cplusplus
}
#endif
