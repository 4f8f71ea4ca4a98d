// Writes the new states of a KDA operator into the cache, instead of the ggml_cpy after it.
//
// The operator reads rows of the cache while it writes others, so this requires that each sequence writes the row that
// it reads, or reads none. The rows are checked when the graph runs; the graph is the same either way.

#include "kda-cpu.h"

#include "ggml-cpu-impl.h"
#include "ggml-kda-state.h"
#include "ops.h"

// Whether every sequence continues a row that no other sequence writes.
static bool reads_what_it_writes(const ggml_kda_states & states, const ggml_kda_state_copy & copy) {
    const int32_t * rows = (const int32_t *) states.rows->data;
    for (int64_t s = 0; s < states.rows->ne[0]; ++s) {
        if (rows[s] != states.zero_row && rows[s] != copy.first_row + s) {
            return false;
        }
    }
    return true;
}

// Whether the nodes between operator and copy may run after the copy: they must not read or write a row that it writes.
// `store` is known not to.
static bool may_follow(const ggml_kda_states & states, const ggml_kda_state_copy & copy) {
    if (copy.gather == nullptr) {
        return true;
    }
    const ggml_tensor * gathered = copy.gather->src[1];
    for (int64_t i = 0; i < gathered->ne[0]; ++i) {
        const int32_t row = *(const int32_t *) ((const char *) gathered->data + i * gathered->nb[0]);
        if (ggml_kda_state_copy_writes(&copy, row)) {
            return false;
        }
    }
    return copy.fill == nullptr || !ggml_kda_state_copy_writes(&copy, states.zero_row);
}

int ggml_kda_elide_state_copy(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params) {
    const ggml_kda_state_copy copy = ggml_kda_find_state_copy(cgraph, node_n);
    if (copy.to == nullptr) {
        return 0;
    }
    ggml_tensor *         op     = cgraph->nodes[node_n];
    const ggml_kda_states states = ggml_kda_get_states(op);
    if (!reads_what_it_writes(states, copy) || !may_follow(states, copy)) {
        return 0;
    }

    const ggml_kda_state_dest dest = { (char *) copy.to->data, copy.to->nb[1], copy.to->nb[2] };
    if (op->op == GGML_OP_KDA_CONV) {
        ggml_compute_forward_kda_conv(params, op, &dest);
    } else {
        ggml_compute_forward_kda_scan(params, op, &dest);
    }
    if (copy.fill != nullptr) {
        ggml_barrier(params->threadpool);
        ggml_compute_forward_fill(params, copy.fill);
    }
    if (copy.gather != nullptr) {
        ggml_barrier(params->threadpool);
        ggml_compute_forward_get_rows(params, copy.gather);
        ggml_barrier(params->threadpool);
        ggml_compute_forward_cpy(params, copy.store);
    }
    return copy.n_nodes;
}
