// The router: ggml-router-nodes.h.

#include "ggml-router-nodes.h"
#include "node-fusion-impl.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace node_fusion {

// Sorts ids of experts by score, the best first, in the order of ggml's ARGSORT; the order after the first k is not
// determined. Equal scores and NaN have the order in which std::sort leaves them. Where none of the best k + 1 are equal
// there is only one order, and choosing them is faster than sorting all.
static void sort_best(const float * score, int32_t * id, int64_t experts, int64_t k) {
    int32_t best[GGML_ROUTER_MAX_EXPERTS];
    int64_t n        = 0;
    bool    ordinary = k < experts;
    for (int64_t e = 0; e < experts && ordinary; ++e) {
        ordinary = !std::isnan(score[e]);
        if (n == k + 1 && score[e] <= score[best[k]]) {
            continue;
        }
        int64_t i = n < k + 1 ? n++ : k;
        for (; i > 0 && score[best[i - 1]] < score[e]; --i) {
            best[i] = best[i - 1];
        }
        best[i] = e;
    }
    for (int64_t i = 0; i < k && ordinary; ++i) {
        ordinary = score[best[i]] > score[best[i + 1]];
    }
    std::iota(id, id + experts, 0);
    if (!ordinary) {
        std::sort(id, id + experts, [&](int32_t i, int32_t j) { return score[i] > score[j]; });
        return;
    }
    for (int64_t i = 0; i < k; ++i) {
        std::swap(id[i], *std::find(id + i, id + experts, best[i]));
    }
}

int router(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params) {
    if (!ggml_is_router(cgraph, node_n)) {
        return 0;
    }
    ggml_tensor * const * node   = cgraph->nodes + node_n;
    const ggml_tensor *   logits = node[GGML_ROUTER_SCORES]->src[0];
    const ggml_tensor *   bias   = node[GGML_ROUTER_BIASED]->src[1];
    // one token is read completely before its results are written; with more, a thread could overwrite another's input
    const bool one_token = logits->ne[1] == 1;
    for (const ggml_tensor * written : { node[GGML_ROUTER_SORTED], node[GGML_ROUTER_WEIGHTS] }) {
        if ((!one_token && overlap(written, logits)) || overlap(written, bias)) {
            return 0;
        }
    }
    if (overlap(node[GGML_ROUTER_SORTED], node[GGML_ROUTER_WEIGHTS])) {
        return 0;
    }

    const int64_t experts = logits->ne[0];
    const int64_t k       = node[GGML_ROUTER_CHOSEN]->ne[0];
    const float   least   = ggml_get_op_params_f32(node[GGML_ROUTER_CLAMPED], 0);
    const float   most    = ggml_get_op_params_f32(node[GGML_ROUTER_CLAMPED], 1);
    const float   scale   = ggml_get_op_params_f32(node[GGML_ROUTER_WEIGHTS], 0);

    const share tokens(params, logits->ne[1]);
    for (int64_t t = tokens.first; t < tokens.last; ++t) {
        const float * x  = (const float *) logits->data + t * experts;
        const float * b  = (const float *) bias->data;
        int32_t *     id = (int32_t *) ((char *) node[GGML_ROUTER_SORTED]->data + t * node[GGML_ROUTER_SORTED]->nb[1]);
        float *       w  = (float *) node[GGML_ROUTER_WEIGHTS]->data + t * k;

        float p[GGML_ROUTER_MAX_EXPERTS];
        float score[GGML_ROUTER_MAX_EXPERTS];
        for (int64_t e = 0; e < experts; ++e) {
            p[e]     = 1.0f / (1.0f + expf(-x[e]));
            score[e] = p[e] + b[e];
        }
        sort_best(score, id, experts, k);

        double sum = 0;
        for (int64_t i = 0; i < k; ++i) {
            sum += (double) p[id[i]];
        }
        const float divisor = std::max(std::min((float) sum, most), least);
        for (int64_t i = 0; i < k; ++i) {
            w[i] = p[id[i]] / divisor * scale;
        }
    }
    return GGML_ROUTER_N_NODES - 1;
}

}  // namespace node_fusion
