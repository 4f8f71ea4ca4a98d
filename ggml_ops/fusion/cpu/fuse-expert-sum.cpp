// The end of a mixture of experts: the result of each selected expert times its weight, and the sum over the experts in
// order. One MUL, k views, k - 1 ADDs; the weighted results themselves are not written.

#include "node-fusion-impl.h"

#include <algorithm>

// a product and its sum are rounded separately, as in separate nodes
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace node_fusion {

constexpr int     MAX_EXPERTS_USED = 15;
constexpr int64_t COLUMNS          = 64;  // summed together

// Number of experts summed by the run that starts at node n; 0 if there is none.
static int experts_summed(const ggml_cgraph * cgraph, int n) {
    const ggml_tensor * weighted = cgraph->nodes[n];
    const ggml_tensor * results  = weighted->src[0];
    const ggml_tensor * weights  = weighted->src[1];
    const int           k        = (int) weighted->ne[1];
    if (k < 2 || k > MAX_EXPERTS_USED || weighted->ne[3] != 1 || !is_f32(weighted) || !is_f32(results) ||
        !is_f32(weights) || weights->ne[0] != 1 || weights->ne[1] != k || weights->ne[2] != weighted->ne[2] ||
        weights->ne[3] != 1) {
        return 0;
    }

    const int count = 2 * k;
    ggml_op   ops[2 * MAX_EXPERTS_USED];
    std::fill(ops, ops + count, GGML_OP_ADD);
    ops[0] = GGML_OP_MUL;
    std::fill(ops + 1, ops + 1 + k, GGML_OP_VIEW);
    const int last = n + count - 1;
    if (!ggml_can_fuse_subgraph(cgraph, n, count, ops, &last, 1)) {
        return 0;
    }

    ggml_tensor * const * view = cgraph->nodes + n + 1;
    ggml_tensor * const * add  = view + k;
    for (int i = 0; i < k; ++i) {
        const bool one = view[i]->src[0] == weighted && view[i]->view_offs == i * weighted->nb[1] &&
                         view[i]->ne[0] == weighted->ne[0] && view[i]->ne[1] == weighted->ne[2] &&
                         view[i]->nb[1] == weighted->nb[2] && view[i]->ne[2] == 1 && view[i]->ne[3] == 1;
        if (!one) {
            return 0;
        }
    }
    for (int i = 0; i + 1 < k; ++i) {
        const ggml_tensor * so_far = i == 0 ? view[0] : add[i - 1];
        if (add[i]->src[0] != so_far || add[i]->src[1] != view[i + 1] || !is_f32(add[i])) {
            return 0;
        }
    }
    return k;
}

// columns [c0, c1) of one token
static void
sum_token(const float * results, const float * weights, int64_t n, int k, int64_t c0, int64_t c1, float * out) {
    for (int64_t c = c0; c < c1; c += COLUMNS) {
        const int64_t width = std::min(COLUMNS, c1 - c);
        float         sum[COLUMNS];
        for (int64_t i = 0; i < width; ++i) {
            sum[i] = results[c + i] * weights[0];
        }
        for (int e = 1; e < k; ++e) {
            const float * x = results + e * n + c;
            for (int64_t i = 0; i < width; ++i) {
                const float weighted = x[i] * weights[e];
                sum[i] += weighted;
            }
        }
        std::copy(sum, sum + width, out + c);
    }
}

// The weights of tokens [t0, t1), by token; copied to this thread's part of the work buffer if the sums overwrite them
// (for the allocator they are free after the MUL). nullptr: the work buffer is too small.
static const float * weights_of(
    const ggml_tensor * weights, const ggml_tensor * out, int64_t t0, int64_t t1, const ggml_compute_params * params) {
    const int64_t k     = weights->ne[1];
    const float * first = (const float *) weights->data + t0 * k;
    if (!overlap(out, weights)) {
        return first;
    }
    const size_t size = k * weights->ne[2] * sizeof(float);
    if (params->wsize < params->nth * size) {
        return nullptr;
    }
    float * copy = (float *) ((char *) params->wdata + params->ith * size);
    std::copy(first, first + (t1 - t0) * k, copy);
    ggml_barrier(params->threadpool);
    return copy;
}

int expert_sum(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params) {
    const int k = experts_summed(cgraph, node_n);
    if (k == 0) {
        return 0;
    }
    const ggml_tensor * results = cgraph->nodes[node_n]->src[0];
    ggml_tensor *       out     = cgraph->nodes[node_n + 2 * k - 1];
    if (overlap(out, results)) {
        return 0;
    }

    const int64_t n      = results->ne[0];
    const int64_t T      = results->ne[2];
    const int64_t blocks = (n + COLUMNS - 1) / COLUMNS;  // per token
    const share   mine(params, blocks * T);
    const int64_t t0      = mine.first / blocks;
    const int64_t t1      = std::min(T, mine.last / blocks + 1);
    const float * weights = weights_of(cgraph->nodes[node_n]->src[1], out, t0, t1, params);
    if (weights == nullptr) {
        return 0;
    }
    for (int64_t b = mine.first; b < mine.last;) {
        const int64_t t    = b / blocks;
        const int64_t last = std::min(mine.last, (t + 1) * blocks);
        sum_token((const float *) results->data + t * k * n, weights + (t - t0) * k, n, k, b % blocks * COLUMNS,
                  std::min(n, (last - t * blocks) * COLUMNS), (float *) out->data + t * n);
        b = last;
    }
    return 2 * k - 1;
}

}  // namespace node_fusion
