#pragma once

// Fused runs of nodes, each in its own file. Each function returns the number of nodes after the first one that it
// computed; 0: the nodes do not match, and nothing was computed.

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

namespace node_fusion {

// SIGMOID of the router's logits ... SCALE of the chosen experts' weights
int router(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params);

// MUL of the experts' results by their weights, ADDs over the experts
int expert_sum(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params);

// MUL_MATs of the same activations
int products(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params);

// Whether a and b share memory. A fused run must not overwrite its own inputs.
static inline bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * a0 = (const char *) a->data;
    const char * b0 = (const char *) b->data;
    return a0 < b0 + ggml_nbytes(b) && b0 < a0 + ggml_nbytes(a);
}

static inline bool is_f32(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t);
}

// This thread's share [first, last) of n items.
struct share {
    int64_t first, last;

    share(const ggml_compute_params * params, int64_t n) :
        first(n * params->ith / params->nth), last(n * (params->ith + 1) / params->nth) {}
};

}  // namespace node_fusion
