// The router after its matmul, as built by build_moe_ffn for sigmoid scores with a selection bias:
//
//   p = sigmoid(logits)    chosen = the first k of argsort(p + bias), descending
//   w = p[chosen]          weights = w / clamp(sum w) * scale
//
// Twelve nodes, of which only the selected ids (the first k of the ARGSORT's row) and the weights are written.

#include "node-fusion-impl.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace node_fusion {

constexpr int64_t MAX_EXPERTS = 1024;
constexpr int64_t MAX_CHOSEN  = 32;

// the nodes in order
enum {
    SCORES,
    SCORES_BY_EXPERT,  // reshaped
    BIASED,
    SORTED,
    CHOSEN,  // view
    PICKED,
    PICKED_BY_TOKEN,  // reshaped
    SUM,
    CLAMPED,
    NORMED,
    NORMED_BY_EXPERT,  // reshaped
    WEIGHTS,
    N_NODES,
};

static bool is_router(const ggml_cgraph * cgraph, int n) {
    const bool run = ggml_can_fuse_subgraph(cgraph, n,
                                            { GGML_OP_UNARY, GGML_OP_RESHAPE, GGML_OP_ADD, GGML_OP_ARGSORT,
                                              GGML_OP_VIEW, GGML_OP_GET_ROWS, GGML_OP_RESHAPE, GGML_OP_SUM_ROWS,
                                              GGML_OP_CLAMP, GGML_OP_DIV, GGML_OP_RESHAPE, GGML_OP_SCALE },
                                            { n + CHOSEN, n + WEIGHTS }) &&
                     ggml_check_edges(cgraph, n,
                                      { { SCORES_BY_EXPERT, 0, SCORES },
                                        { BIASED, 0, SCORES },
                                        { SORTED, 0, BIASED },
                                        { CHOSEN, 0, SORTED },
                                        { PICKED, 0, SCORES_BY_EXPERT },
                                        { PICKED, 1, CHOSEN },
                                        { PICKED_BY_TOKEN, 0, PICKED },
                                        { SUM, 0, PICKED_BY_TOKEN },
                                        { CLAMPED, 0, SUM },
                                        { NORMED, 0, PICKED_BY_TOKEN },
                                        { NORMED, 1, CLAMPED },
                                        { NORMED_BY_EXPERT, 0, NORMED },
                                        { WEIGHTS, 0, NORMED_BY_EXPERT } });
    if (!run) {
        return false;
    }
    ggml_tensor * const * node    = cgraph->nodes + n;
    const ggml_tensor *   logits  = node[SCORES]->src[0];
    const ggml_tensor *   bias    = node[BIASED]->src[1];
    const ggml_tensor *   chosen  = node[CHOSEN];
    const int64_t         experts = logits->ne[0];
    const int64_t         tokens  = logits->ne[1];
    const int64_t         k       = chosen->ne[0];

    const auto shape = [](const ggml_tensor * t, int64_t a, int64_t b, int64_t c) {
        return t->ne[0] == a && t->ne[1] == b && t->ne[2] == c && t->ne[3] == 1;
    };
    return ggml_get_unary_op(node[SCORES]) == GGML_UNARY_OP_SIGMOID && is_f32(logits) && is_f32(bias) &&
           shape(logits, experts, tokens, 1) && shape(bias, experts, 1, 1) && experts <= MAX_EXPERTS &&
           ggml_get_op_params_i32(node[SORTED], 0) == GGML_SORT_ORDER_DESC && is_f32(node[SCORES]) &&
           shape(chosen, k, tokens, 1) && chosen->nb[1] == node[SORTED]->nb[1] && chosen->view_offs == 0 &&
           k <= MAX_CHOSEN && shape(node[SCORES_BY_EXPERT], 1, experts, tokens) &&
           shape(node[PICKED_BY_TOKEN], k, tokens, 1) && shape(node[SUM], 1, tokens, 1) &&
           shape(node[WEIGHTS], 1, k, tokens) && is_f32(node[WEIGHTS]) &&
           ggml_get_op_params_f32(node[WEIGHTS], 1) == 0.0f;
}

int router(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params) {
    if (!is_router(cgraph, node_n)) {
        return 0;
    }
    ggml_tensor * const * node   = cgraph->nodes + node_n;
    const ggml_tensor *   logits = node[SCORES]->src[0];
    const ggml_tensor *   bias   = node[BIASED]->src[1];
    // one token is read completely before its results are written; with more, a thread could overwrite another's input
    const bool one_token = logits->ne[1] == 1;
    for (const ggml_tensor * written : { node[SORTED], node[WEIGHTS] }) {
        if ((!one_token && overlap(written, logits)) || overlap(written, bias)) {
            return 0;
        }
    }
    if (overlap(node[SORTED], node[WEIGHTS])) {
        return 0;
    }

    const int64_t experts = logits->ne[0];
    const int64_t k       = node[CHOSEN]->ne[0];
    const float   least   = ggml_get_op_params_f32(node[CLAMPED], 0);
    const float   most    = ggml_get_op_params_f32(node[CLAMPED], 1);
    const float   scale   = ggml_get_op_params_f32(node[WEIGHTS], 0);

    const share tokens(params, logits->ne[1]);
    for (int64_t t = tokens.first; t < tokens.last; ++t) {
        const float * x  = (const float *) logits->data + t * experts;
        const float * b  = (const float *) bias->data;
        int32_t *     id = (int32_t *) ((char *) node[SORTED]->data + t * node[SORTED]->nb[1]);
        float *       w  = (float *) node[WEIGHTS]->data + t * k;

        float p[MAX_EXPERTS];
        float score[MAX_EXPERTS];
        for (int64_t e = 0; e < experts; ++e) {
            p[e]     = 1.0f / (1.0f + expf(-x[e]));
            score[e] = p[e] + b[e];
        }
        std::iota(id, id + experts, 0);
        // the same sort as ggml's ARGSORT, so that the order of equal scores is the same
        std::sort(id, id + experts, [&](int32_t i, int32_t j) { return score[i] > score[j]; });

        double sum = 0;
        for (int64_t i = 0; i < k; ++i) {
            sum += (double) p[id[i]];
        }
        const float divisor = std::max(std::min((float) sum, most), least);
        for (int64_t i = 0; i < k; ++i) {
            w[i] = p[id[i]] / divisor * scale;
        }
    }
    return N_NODES - 1;
}

}  // namespace node_fusion
