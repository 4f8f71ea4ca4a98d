#pragma once

// The router after its matmul, as built by build_moe_ffn for sigmoid scores with a selection bias:
//
//   p = sigmoid(logits)    chosen = the first k of argsort(p + bias), descending
//   w = p[chosen]          weights = w / clamp(sum w) * scale
//
// Twelve nodes, of which only the selected ids (the first k of the ARGSORT's row) and the weights are written.

#include "ggml-impl.h"

constexpr int64_t GGML_ROUTER_MAX_EXPERTS = 1024;
constexpr int64_t GGML_ROUTER_MAX_CHOSEN  = 32;

// the nodes in order
enum ggml_router_node {
    GGML_ROUTER_SCORES,
    GGML_ROUTER_SCORES_BY_EXPERT,  // reshaped
    GGML_ROUTER_BIASED,
    GGML_ROUTER_SORTED,
    GGML_ROUTER_CHOSEN,  // view
    GGML_ROUTER_PICKED,
    GGML_ROUTER_PICKED_BY_TOKEN,  // reshaped
    GGML_ROUTER_SUM,
    GGML_ROUTER_CLAMPED,
    GGML_ROUTER_NORMED,
    GGML_ROUTER_NORMED_BY_EXPERT,  // reshaped
    GGML_ROUTER_WEIGHTS,
    GGML_ROUTER_N_NODES,
};

static inline bool ggml_is_router(const ggml_cgraph * cgraph, int n) {
    const bool run = ggml_can_fuse_subgraph(cgraph, n,
                                            { GGML_OP_UNARY, GGML_OP_RESHAPE, GGML_OP_ADD, GGML_OP_ARGSORT,
                                              GGML_OP_VIEW, GGML_OP_GET_ROWS, GGML_OP_RESHAPE, GGML_OP_SUM_ROWS,
                                              GGML_OP_CLAMP, GGML_OP_DIV, GGML_OP_RESHAPE, GGML_OP_SCALE },
                                            { n + GGML_ROUTER_CHOSEN, n + GGML_ROUTER_WEIGHTS }) &&
                     ggml_check_edges(cgraph, n,
                                      { { GGML_ROUTER_SCORES_BY_EXPERT, 0, GGML_ROUTER_SCORES },
                                        { GGML_ROUTER_BIASED, 0, GGML_ROUTER_SCORES },
                                        { GGML_ROUTER_SORTED, 0, GGML_ROUTER_BIASED },
                                        { GGML_ROUTER_CHOSEN, 0, GGML_ROUTER_SORTED },
                                        { GGML_ROUTER_PICKED, 0, GGML_ROUTER_SCORES_BY_EXPERT },
                                        { GGML_ROUTER_PICKED, 1, GGML_ROUTER_CHOSEN },
                                        { GGML_ROUTER_PICKED_BY_TOKEN, 0, GGML_ROUTER_PICKED },
                                        { GGML_ROUTER_SUM, 0, GGML_ROUTER_PICKED_BY_TOKEN },
                                        { GGML_ROUTER_CLAMPED, 0, GGML_ROUTER_SUM },
                                        { GGML_ROUTER_NORMED, 0, GGML_ROUTER_PICKED_BY_TOKEN },
                                        { GGML_ROUTER_NORMED, 1, GGML_ROUTER_CLAMPED },
                                        { GGML_ROUTER_NORMED_BY_EXPERT, 0, GGML_ROUTER_NORMED },
                                        { GGML_ROUTER_WEIGHTS, 0, GGML_ROUTER_NORMED_BY_EXPERT } });
    if (!run) {
        return false;
    }
    ggml_tensor * const * node    = cgraph->nodes + n;
    const ggml_tensor *   logits  = node[GGML_ROUTER_SCORES]->src[0];
    const ggml_tensor *   bias    = node[GGML_ROUTER_BIASED]->src[1];
    const ggml_tensor *   chosen  = node[GGML_ROUTER_CHOSEN];
    const int64_t         experts = logits->ne[0];
    const int64_t         tokens  = logits->ne[1];
    const int64_t         k       = chosen->ne[0];

    const auto is_f32 = [](const ggml_tensor * t) { return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t); };
    const auto shape  = [](const ggml_tensor * t, int64_t a, int64_t b, int64_t c) {
        return t->ne[0] == a && t->ne[1] == b && t->ne[2] == c && t->ne[3] == 1;
    };
    return ggml_get_unary_op(node[GGML_ROUTER_SCORES]) == GGML_UNARY_OP_SIGMOID && is_f32(logits) && is_f32(bias) &&
           shape(logits, experts, tokens, 1) && shape(bias, experts, 1, 1) && experts <= GGML_ROUTER_MAX_EXPERTS &&
           ggml_get_op_params_i32(node[GGML_ROUTER_SORTED], 0) == GGML_SORT_ORDER_DESC &&
           is_f32(node[GGML_ROUTER_SCORES]) && shape(chosen, k, tokens, 1) &&
           chosen->nb[1] == node[GGML_ROUTER_SORTED]->nb[1] && chosen->view_offs == 0 && k <= GGML_ROUTER_MAX_CHOSEN &&
           shape(node[GGML_ROUTER_SCORES_BY_EXPERT], 1, experts, tokens) &&
           shape(node[GGML_ROUTER_PICKED_BY_TOKEN], k, tokens, 1) && shape(node[GGML_ROUTER_SUM], 1, tokens, 1) &&
           shape(node[GGML_ROUTER_WEIGHTS], 1, k, tokens) && is_f32(node[GGML_ROUTER_WEIGHTS]) &&
           ggml_get_op_params_f32(node[GGML_ROUTER_WEIGHTS], 1) == 0.0f;
}
