// Adjacent matmuls with repacked weights, or of few columns, that do not depend on each other: q, k, v and the first
// halves of the low-rank gates; the second halves; gate and up of a dense layer or shared expert. All activations are
// packed first, once per format, then all rows are multiplied, with one barrier after each of the two steps.

#include "ggml-cpu.h"
#include "node-fusion-impl.h"
#include "packed-product.h"

#include <algorithm>

namespace node_fusion {

using ggml::cpu::packed_product;

constexpr int     MAX_PRODUCTS      = 8;
constexpr int64_t CHUNKS_PER_THREAD = 4;
constexpr size_t  ALIGNMENT         = 64;  // of packed activations in the work buffer

struct product {
    ggml_tensor *    op;
    packed_product * weights;
    size_t           packed;  // offset of its activations in the work buffer
    bool             shares;  // whether an earlier matmul has the same activations
    int64_t          chunk;   // rows
    int64_t          n_chunks;
};

struct group {
    product all[MAX_PRODUCTS];
    int     count = 0;
    size_t  used  = 0;  // bytes of the work buffer
};

static packed_product * packed_weights(const ggml_tensor * op) {
    const bool       plain   = op->op == GGML_OP_MUL_MAT && (op->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 &&
                               op->src[0]->ne[2] * op->src[0]->ne[3] == 1 && !ggml_is_empty(op);
    packed_product * weights = plain ? ggml::cpu::find_packed_product(op) : nullptr;
    return weights != nullptr && !weights->whole(op) ? weights : nullptr;
}

// Whether t, or the tensor it is a view of, is the result of a matmul of the group.
static bool made_by(const group & g, const ggml_tensor * t) {
    const ggml_tensor * origin = t->view_src ? t->view_src : t;
    return std::any_of(g.all, g.all + g.count, [&](const product & p) { return p.op == t || p.op == origin; });
}

// Adds op to the group; returns false if it cannot join.
static bool join(group & g, ggml_tensor * op, const ggml_compute_params * params) {
    packed_product * weights = packed_weights(op);
    if (weights == nullptr || g.count == MAX_PRODUCTS || made_by(g, op->src[1])) {
        return false;
    }
    product p = { op, weights, g.used, false, 0, 0 };
    for (int i = 0; i < g.count; ++i) {
        if (g.all[i].op->src[1] == op->src[1] && g.all[i].weights->format(g.all[i].op) == weights->format(op)) {
            p.packed = g.all[i].packed;
            p.shares = true;
        }
    }
    if (!p.shares) {
        const size_t size = weights->packed_size(op);
        if (g.used + size > params->wsize) {
            return false;
        }
        g.used += (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    const int64_t rows  = op->src[0]->ne[1];
    const int64_t step  = weights->row_step();
    const int64_t parts = ggml_is_numa() ? params->nth : CHUNKS_PER_THREAD * params->nth;
    p.chunk             = ((rows + parts - 1) / parts + step - 1) / step * step;
    p.n_chunks          = (rows + p.chunk - 1) / p.chunk;
    g.all[g.count++]    = p;
    return true;
}

// the parameters with which p's weights locate their activations
static ggml_compute_params params_of(const product & p, const ggml_compute_params * params) {
    ggml_compute_params product_params = *params;
    product_params.wdata               = (char *) params->wdata + p.packed;
    product_params.wsize               = params->wsize - p.packed;
    return product_params;
}

int products(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params) {
    group g;
    int   last = node_n;
    for (int n = node_n; n < cgraph->n_nodes; ++n) {
        if (ggml_op_is_empty(cgraph->nodes[n]->op)) {
            continue;
        }
        if (!join(g, cgraph->nodes[n], params)) {
            break;
        }
        last = n;
    }
    if (g.count < 2) {
        return 0;
    }

    for (int i = 0; i < g.count; ++i) {
        if (!g.all[i].shares) {
            ggml_compute_params product_params = params_of(g.all[i], params);
            g.all[i].weights->pack_activations(&product_params, g.all[i].op);
        }
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const bool stealing = !ggml_is_numa();  // otherwise a row is always read by the same thread, as in mul_mat
    int64_t    before   = 0;                // chunks of the matmuls before this one
    int64_t    chunk    = params->ith;
    for (int i = 0; i < g.count; ++i) {
        const product &     p              = g.all[i];
        ggml_compute_params product_params = params_of(p, params);
        while (chunk < before + p.n_chunks) {
            const int64_t row = (chunk - before) * p.chunk;
            p.weights->multiply_rows(&product_params, p.op, row, std::min(row + p.chunk, p.op->src[0]->ne[1]));
            chunk = stealing ? ggml_threadpool_chunk_add(params->threadpool, 1) : chunk + params->nth;
        }
        before += p.n_chunks;
    }
    return last - node_n;
}

}  // namespace node_fusion
