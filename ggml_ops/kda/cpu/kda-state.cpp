// Writing the new states of a KDA operator straight into the cache, in place of the ggml_cpy that follows it.
//
// The operator reads rows of the cache while it writes others, so this is done only where each sequence's row
// is the one it writes (or is not read at all): no sequence can then meet another's new state. The rows are
// looked at when the graph runs, so the graph itself is the same either way.
//
// Between operator and copy may stand what cells behind the batch's take over from other rows (a row filled with
// zeros, rows gathered, and stored). It still runs, behind the operator, where it neither reads nor writes a row of
// the new states.

#include "kda-state.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"
#include "kda-conv.h"
#include "kda-scan.h"
#include "ops.h"

#include <algorithm>

namespace kda {

struct operator_states {
    const ggml_tensor * cache;
    const ggml_tensor * rows;
    int32_t             zero_row;
    int64_t             n_written;  // slots
    size_t              offset;     // of the states in the result, bytes
};

static operator_states states_of(const ggml_tensor * op) {
    if (op->op == GGML_OP_KDA_CONV) {
        const ggml_kda_conv_params params = ggml_kda_conv_get_params(op);
        const ggml_tensor *        q      = op->src[GGML_KDA_CONV_Q];
        return { op->src[GGML_KDA_CONV_CACHE], op->src[GGML_KDA_CONV_ROWS], params.zero_row,
                 std::min<int64_t>(q->ne[1] + 1, params.n_snapshots), q->ne[1] * q->ne[2] * op->nb[1] };
    }
    const ggml_kda_scan_params params = ggml_kda_scan_get_params(op);
    const ggml_tensor *        f      = op->src[GGML_KDA_SCAN_F];
    return { op->src[GGML_KDA_SCAN_CACHE], op->src[GGML_KDA_SCAN_ROWS], params.zero_row,
             std::min<int64_t>(f->ne[2] + 1, params.n_snapshots), f->ne[2] * f->ne[3] * op->nb[1] };
}

// [state, sequences, slots] with whole states packed
static bool is_states(const ggml_tensor * t, int64_t state, int64_t n_seqs, int64_t n_slots) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[0] == state && t->ne[1] == n_seqs &&
           t->ne[2] == n_slots && t->ne[3] == 1;
}

// How many nodes use t, one of the nodes [n0, n1); -1 when it is not among them.
static int count_uses(const ggml_cgraph * cgraph, int n0, int n1, const ggml_tensor * t) {
    for (int i = n0; i < n1; ++i) {
        if (cgraph->nodes[i] == t) {
            return ggml_node_get_use_count(cgraph, i);
        }
    }
    return -1;
}

// The rows of the cache that a copy [state, sequences, slots] into it writes.
struct written_rows {
    const ggml_tensor * cache;
    const ggml_tensor * to;

    bool within() const {
        const char * base = (const char *) cache->data;
        const char * data = (const char *) to->data;
        return data >= base && data < base + ggml_nbytes(cache) && (data - base) % cache->nb[1] == 0 &&
               to->nb[1] == cache->nb[1] && to->nb[2] % cache->nb[1] == 0;
    }

    int64_t first() const { return ((const char *) to->data - (const char *) cache->data) / cache->nb[1]; }

    bool holds(int64_t row) const {
        for (int64_t slot = 0; slot < to->ne[2]; ++slot) {
            const int64_t s = row - first() - slot * (int64_t) (to->nb[2] / cache->nb[1]);
            if (s >= 0 && s < to->ne[1]) {
                return true;
            }
        }
        return false;
    }
};

// What may stand between operator and copy; all nullptr: nothing.
struct extra_copies {
    ggml_tensor * fill;    // of one row with zeros; nullptr: none
    ggml_tensor * gather;  // rows of the cache
    ggml_tensor * store;   // into others
};

static int next_node(const ggml_cgraph * cgraph, int n) {
    do {
        ++n;
    } while (n < cgraph->n_nodes && ggml_op_is_empty(cgraph->nodes[n]->op));
    return n;
}

// Those that begin at node n, which is moved behind them.
static extra_copies find_extra_copies(const ggml_cgraph * cgraph, const ggml_tensor * cache, int & n) {
    const auto is = [&](int i, ggml_op op) {
        return i < cgraph->n_nodes && cgraph->nodes[i]->op == op &&
               (cgraph->nodes[i]->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
    };
    extra_copies extra = { nullptr, nullptr, nullptr };
    int          i     = n;
    if (is(i, GGML_OP_FILL) && cgraph->nodes[i]->view_src == cache) {
        extra.fill = cgraph->nodes[i];
        i          = next_node(cgraph, i);
    }
    if (!is(i, GGML_OP_GET_ROWS) || cgraph->nodes[i]->src[0] != cache) {
        return { nullptr, nullptr, nullptr };
    }
    extra.gather = cgraph->nodes[i];
    i            = next_node(cgraph, i);
    if (!is(i, GGML_OP_CPY) || cgraph->nodes[i]->src[0] != extra.gather || cgraph->nodes[i]->view_src != cache) {
        return { nullptr, nullptr, nullptr };
    }
    extra.store = cgraph->nodes[i];
    n           = next_node(cgraph, i);
    return extra;
}

// Does it give the same to run them behind the copy of the new states, which they stand in front of?
static bool may_follow(const extra_copies & extra, const written_rows & written) {
    if (extra.gather == nullptr) {
        return true;
    }
    const size_t        row  = written.cache->nb[1];
    const char *        base = (const char *) written.cache->data;
    const ggml_tensor * from = extra.gather->src[1];
    for (int64_t i = 0; i < from->ne[0]; ++i) {
        if (written.holds(*(const int32_t *) ((const char *) from->data + i * from->nb[0]))) {
            return false;
        }
    }
    for (int64_t i = 0; i < from->ne[0]; ++i) {
        if (written.holds(((const char *) extra.store->data - base) / row + i)) {
            return false;
        }
    }
    return extra.fill == nullptr || !written.holds(((const char *) extra.fill->data - base) / row);
}

}  // namespace kda

int ggml_kda_try_fuse_copy(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params) {
    using namespace kda;

    ggml_tensor *         op     = cgraph->nodes[node_n];
    const operator_states states = states_of(op);

    int                n     = next_node(cgraph, node_n);
    const extra_copies extra = find_extra_copies(cgraph, states.cache, n);
    if (n >= cgraph->n_nodes || cgraph->nodes[n]->op != GGML_OP_CPY || (op->flags & GGML_TENSOR_FLAG_OUTPUT)) {
        return 0;
    }

    const ggml_tensor * copy   = cgraph->nodes[n];
    const ggml_tensor * from   = copy->src[0];
    const ggml_tensor * to     = copy->src[1];
    const int64_t       n_seqs = states.rows->ne[0];
    const int64_t       size   = states.cache->ne[0];

    const bool whole = from->view_src == op && from->view_offs == states.offset &&
                       is_states(from, size, n_seqs, states.n_written) && ggml_is_contiguous(from) &&
                       (copy->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
    // the states in the result are read by nobody else: one use of their view, and besides it one of the output
    if (!whole || !is_states(to, size, n_seqs, states.n_written) || count_uses(cgraph, node_n + 1, n, from) != 1 ||
        ggml_node_get_use_count(cgraph, node_n) > 2) {
        return 0;
    }

    const written_rows written = { states.cache, to };
    if (!written.within() || !may_follow(extra, written)) {
        return 0;
    }
    const int32_t * rows = (const int32_t *) states.rows->data;
    for (int64_t s = 0; s < n_seqs; ++s) {
        if (rows[s] != states.zero_row && rows[s] != written.first() + s) {
            return 0;
        }
    }

    const ggml_kda_state_dest dest = { (char *) to->data, to->nb[1], to->nb[2] };
    if (op->op == GGML_OP_KDA_CONV) {
        ggml_compute_forward_kda_conv(params, op, &dest);
    } else {
        ggml_compute_forward_kda_scan(params, op, &dest);
    }
    if (extra.fill) {
        ggml_barrier(params->threadpool);
        ggml_compute_forward_fill(params, extra.fill);
    }
    if (extra.gather) {
        ggml_barrier(params->threadpool);
        ggml_compute_forward_get_rows(params, extra.gather);
        ggml_barrier(params->threadpool);
        ggml_compute_forward_cpy(params, extra.store);
    }
    return n - node_n;
}
