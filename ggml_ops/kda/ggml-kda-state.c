// Finds the copy of a KDA operator's new states that a backend can elide. Common to all backends.

#include "ggml-kda-state.h"

#include "ggml-impl.h"
#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"
#include "ggml-op-marks.h"

struct ggml_kda_states ggml_kda_get_states(const struct ggml_tensor * op) {
    struct ggml_kda_states states;
    if (op->op == GGML_OP_KDA_CONV) {
        const struct ggml_kda_conv_params params = ggml_kda_conv_get_params(op);

        states.cache       = op->src[GGML_KDA_CONV_CACHE];
        states.rows        = op->src[GGML_KDA_CONV_ROWS];
        states.zero_row    = params.zero_row;
        states.n_snapshots = params.n_snapshots;
        states.n_tokens    = op->src[GGML_KDA_CONV_Q]->ne[1];
    } else {
        const struct ggml_kda_scan_params params = ggml_kda_scan_get_params(op);

        states.cache       = op->src[GGML_KDA_SCAN_CACHE];
        states.rows        = op->src[GGML_KDA_SCAN_ROWS];
        states.zero_row    = params.zero_row;
        states.n_snapshots = params.n_snapshots;
        states.n_tokens    = op->src[GGML_KDA_SCAN_F]->ne[2];
    }
    states.n_written = MIN(states.n_tokens + 1, states.n_snapshots);
    states.offset    = states.n_tokens * states.rows->ne[0] * op->nb[1];
    return states;
}

// [state, sequences, slots], each state contiguous
static bool is_states(const struct ggml_tensor * t, const struct ggml_kda_states * states) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[0] == states->cache->ne[0] &&
           t->ne[1] == states->rows->ne[0] && t->ne[2] == states->n_written && t->ne[3] == 1;
}

// Whether each state of t occupies a row of the cache, and the states of a slot occupy adjacent rows.
static bool is_in_rows(const struct ggml_tensor * t, const struct ggml_tensor * cache) {
    const char * base = (const char *) cache->data;
    const char * data = (const char *) t->data;
    return data >= base && data < base + ggml_nbytes(cache) && (data - base) % cache->nb[1] == 0 &&
           t->nb[1] == cache->nb[1] && t->nb[2] % cache->nb[1] == 0;
}

static int64_t row_of(const struct ggml_tensor * t, const struct ggml_tensor * cache) {
    return ((const char *) t->data - (const char *) cache->data) / (int64_t) cache->nb[1];
}

static int next_node(const struct ggml_cgraph * cgraph, int n) {
    do {
        ++n;
    } while (n < cgraph->n_nodes && (ggml_op_is_empty(cgraph->nodes[n]->op) || ggml_is_empty(cgraph->nodes[n])));
    return n;
}

// Node n, if it has this operator, is computed and is not an output; otherwise NULL.
static struct ggml_tensor * node_of(const struct ggml_cgraph * cgraph, int n, enum ggml_op op) {
    struct ggml_tensor * node = n < cgraph->n_nodes ? cgraph->nodes[n] : NULL;
    const bool           is   = node != NULL && node->op == op && (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 &&
                                (node->flags & GGML_TENSOR_FLAG_OUTPUT) == 0;
    return is ? node : NULL;
}

// Number of nodes that use t, one of the nodes [n0, n1); -1 if it is not one of them.
static int count_uses(const struct ggml_cgraph * cgraph, int n0, int n1, const struct ggml_tensor * t) {
    for (int n = n0; n < n1; ++n) {
        if (cgraph->nodes[n] == t) {
            return ggml_node_get_use_count(cgraph, n);
        }
    }
    return -1;
}

static bool zeroes_row(const struct ggml_tensor * fill, const struct ggml_tensor * cache, int32_t row) {
    return fill->view_src == cache && ggml_is_contiguous(fill) && ggml_get_op_params_f32(fill, 0) == 0.0f &&
           ggml_nbytes(fill) == cache->nb[1] && fill->data == (char *) cache->data + row * cache->nb[1];
}

// Finds the nodes for cells outside the batch that start at node n. Returns the node after them; n: there are none.
static int find_extra_copies(const struct ggml_cgraph *     cgraph,
                             int                            n,
                             const struct ggml_kda_states * states,
                             struct ggml_kda_state_copy *   copy) {
    const struct ggml_tensor * cache = states->cache;

    int                  i    = n;
    struct ggml_tensor * fill = node_of(cgraph, i, GGML_OP_FILL);
    if (fill != NULL) {
        if (!zeroes_row(fill, cache, states->zero_row)) {
            return n;
        }
        i = next_node(cgraph, i);
    }
    struct ggml_tensor * gather = node_of(cgraph, i, GGML_OP_GET_ROWS);
    if (gather == NULL || gather->src[0] != cache || !ggml_is_contiguous(cache) || !ggml_is_vector(gather->src[1]) ||
        ggml_node_get_use_count(cgraph, i) != 1) {
        return n;
    }
    i                          = next_node(cgraph, i);
    struct ggml_tensor * store = node_of(cgraph, i, GGML_OP_CPY);
    if (store == NULL || store->src[0] != gather || store->view_src != cache || store->type != GGML_TYPE_F32 ||
        !ggml_is_contiguous(store)) {
        return n;
    }
    copy->fill   = fill;
    copy->gather = gather;
    copy->store  = store;
    return next_node(cgraph, i);
}

bool ggml_kda_state_copy_writes(const struct ggml_kda_state_copy * copy, int64_t row) {
    for (int64_t slot = 0; slot < copy->to->ne[2]; ++slot) {
        const int64_t s = row - copy->first_row - slot * (int64_t) (copy->to->nb[2] / copy->to->nb[1]);
        if (s >= 0 && s < copy->to->ne[1]) {
            return true;
        }
    }
    return false;
}

struct ggml_kda_state_copy ggml_kda_find_state_copy(const struct ggml_cgraph * cgraph, int node_n) {
    const struct ggml_kda_state_copy none   = { NULL, 0, NULL, NULL, NULL, 0 };
    const struct ggml_tensor *       op     = cgraph->nodes[node_n];
    const struct ggml_kda_states     states = ggml_kda_get_states(op);

    struct ggml_kda_state_copy copy = none;

    const int                  n    = find_extra_copies(cgraph, next_node(cgraph, node_n), &states, &copy);
    const struct ggml_tensor * node = node_of(cgraph, n, GGML_OP_CPY);
    if (node == NULL || (op->flags & GGML_TENSOR_FLAG_OUTPUT) != 0 || ggml_op_has_mark(op, GGML_OP_MARK_KEEP_COPY)) {
        return none;
    }
    const struct ggml_tensor * from = node->src[0];
    struct ggml_tensor *       to   = node->src[1];

    // no other node reads the states from the result: their view has one user, and the only other view is the output
    const bool whole = from->view_src == op && from->view_offs == states.offset && is_states(from, &states) &&
                       ggml_is_contiguous(from) && count_uses(cgraph, node_n + 1, n, from) == 1 &&
                       ggml_node_get_use_count(cgraph, node_n) <= 2;
    if (!whole || !is_states(to, &states) || !is_in_rows(to, states.cache)) {
        return none;
    }
    copy.to        = to;
    copy.first_row = row_of(to, states.cache);
    copy.n_nodes   = n - node_n;

    const int64_t n_stored = copy.store != NULL ? ggml_nbytes(copy.store) / states.cache->nb[1] : 0;
    for (int64_t i = 0; i < n_stored; ++i) {
        if (ggml_kda_state_copy_writes(&copy, row_of(copy.store, states.cache) + i)) {
            return none;
        }
    }
    return copy;
}
