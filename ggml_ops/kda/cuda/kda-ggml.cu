// ggml's side of the KDA operators on CUDA: which nodes the kernels accept, their arguments, and the copy of the new
// states into the cache, which the kernels do themselves if it follows at once.
//
// Only the device knows whether a sequence reads a row that another one writes. If so, the kernels leave their states in
// the result and `copy_states` moves them. So the graph, captured or not, is right whatever the rows hold.
//
// Between operator and copy a graph may fill a row with zeros, gather rows and store them, for cells that follow the
// batch's. Fill and gather then run before the operator, which reads neither of their results; the store runs after it.

#include "kda-ggml.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

bool ggml_cuda_kda_supported(int, const ggml_tensor *) {
    return false;
}

void ggml_cuda_op_kda(ggml_backend_cuda_context &, ggml_tensor *) {
    GGML_ABORT("KDA operators have kernels for NVIDIA devices only");
}

int ggml_cuda_try_fuse_kda_copy(ggml_backend_cuda_context &, const ggml_cgraph *, int) {
    return 0;
}

#else

#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"
#include "kda-conv.cuh"
#include "kda-scan.cuh"

#include <algorithm>
#include <atomic>

// Kernels read and write 16 bytes at once.
constexpr size_t ALIGNMENT = 16;

static bool offset_aligned(const ggml_tensor * t) {
    return t->view_offs % ALIGNMENT == 0;
}

static bool rows_aligned(const ggml_tensor * t) {
    return t->nb[1] % ALIGNMENT == 0 && t->nb[2] % ALIGNMENT == 0 && t->nb[3] % ALIGNMENT == 0 && offset_aligned(t);
}

static int64_t in_floats(size_t bytes) {
    return bytes / sizeof(float);
}

static kda_cuda::rows rows_of(const ggml_tensor * t, int64_t head = 0) {
    return { (const float *) ((const char *) t->data + head * t->nb[1]), in_floats(t->nb[1]), in_floats(t->nb[2]),
             in_floats(t->nb[3]) };
}

// [channels, tokens, sequences], heads of head_size side by side
static kda_cuda::rows channels_of(const ggml_tensor * t, int64_t head_size) {
    return { (const float *) t->data, head_size, in_floats(t->nb[1]), in_floats(t->nb[2]) };
}

static const float * data_of(const ggml_tensor * t) {
    return (const float *) t->data;
}

namespace {

// What both operators say of their states.
struct state_sources {
    const ggml_tensor * cache;
    const ggml_tensor * rows;
    int32_t             zero_row;
    int                 n_snapshots;
    int64_t             n_tokens;

    int64_t n_seqs() const { return rows->ne[0]; }

    int64_t n_written() const { return std::min<int64_t>(n_tokens + 1, n_snapshots); }

    size_t offset(const ggml_tensor * op) const { return n_tokens * n_seqs() * op->nb[1]; }
};

}  // namespace

static state_sources sources_of(const ggml_tensor * op) {
    if (op->op == GGML_OP_KDA_CONV) {
        const ggml_kda_conv_params params = ggml_kda_conv_get_params(op);
        return { op->src[GGML_KDA_CONV_CACHE], op->src[GGML_KDA_CONV_ROWS], params.zero_row, params.n_snapshots,
                 op->src[GGML_KDA_CONV_Q]->ne[1] };
    }
    const ggml_kda_scan_params params = ggml_kda_scan_get_params(op);
    return { op->src[GGML_KDA_SCAN_CACHE], op->src[GGML_KDA_SCAN_ROWS], params.zero_row, params.n_snapshots,
             op->src[GGML_KDA_SCAN_F]->ne[2] };
}

// to: the view of the cache that a copy taken over writes; nullptr: none
static kda_cuda::states states_of(const ggml_tensor * op, const ggml_tensor * to) {
    const state_sources src  = sources_of(op);
    const int64_t       size = src.cache->ne[0];
    float * const       tail = (float *) ((char *) op->data + src.offset(op));
    kda_cuda::states    st   = {};
    st.cache                 = data_of(src.cache);
    st.row_stride            = in_floats(src.cache->nb[1]);
    st.rows                  = (const int32_t *) src.rows->data;
    st.zero_row              = src.zero_row;
    st.n_seqs                = src.n_seqs();
    st.n_slots               = src.n_snapshots;
    st.result                = { tail, size, size * src.n_seqs() };
    if (to != nullptr) {
        st.in_cache  = { (float *) to->data, in_floats(to->nb[1]), in_floats(to->nb[2]) };
        st.first_row = ((const char *) to->data - (const char *) src.cache->data) / src.cache->nb[1];
    }
    return st;
}

static void compute_conv(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_tensor * to) {
    const ggml_kda_conv_params params = ggml_kda_conv_get_params(dst);
    const ggml_tensor *        q      = dst->src[GGML_KDA_CONV_Q];

    kda_cuda::conv_args args = {};
    for (int p = 0; p < 3; ++p) {
        args.x[p] = channels_of(dst->src[GGML_KDA_CONV_Q + p], params.head_size);
        args.w[p] = data_of(dst->src[GGML_KDA_CONV_WQ + p]);
    }
    args.out       = (float *) dst->data;
    args.st        = states_of(dst, to);
    args.head_size = params.head_size;
    args.n_heads   = q->ne[0] / params.head_size;
    args.n_tokens  = q->ne[1];
    args.n_seqs    = q->ne[2];
    args.eps       = params.eps;
    kda_cuda::conv(args, ctx.stream());
}

// Said once for each reason: long batches go token by token.
static void log_refusal(const char * reason) {
    static std::atomic<const char *> last(nullptr);
    if (last.exchange(reason) != reason) {
        GGML_LOG_WARN("kda: KDA_SCAN goes token by token in long batches too: %s\n", reason);
    }
}

static void compute_scan(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_tensor * to) {
    const ggml_kda_scan_params params = ggml_kda_scan_get_params(dst);
    const ggml_tensor *        qkv    = dst->src[GGML_KDA_SCAN_QKV];
    const ggml_tensor *        f      = dst->src[GGML_KDA_SCAN_F];
    const ggml_tensor *        beta   = dst->src[GGML_KDA_SCAN_BETA];
    const int64_t              H      = f->ne[1];

    kda_cuda::scan_args args = {};
    args.q                   = rows_of(qkv);
    args.k                   = rows_of(qkv, H);
    args.v                   = rows_of(qkv, 2 * H);
    args.f                   = rows_of(f);
    args.gate                = rows_of(dst->src[GGML_KDA_SCAN_GATE]);
    args.beta                = { data_of(beta), 1, in_floats(beta->nb[1]), in_floats(beta->nb[2]) };
    args.dt_bias             = data_of(dst->src[GGML_KDA_SCAN_DT_BIAS]);
    args.a                   = data_of(dst->src[GGML_KDA_SCAN_A]);
    args.norm                = data_of(dst->src[GGML_KDA_SCAN_NORM]);
    args.out                 = (float *) dst->data;
    args.st                  = states_of(dst, to);
    args.head_size           = f->ne[0];
    args.n_heads             = H;
    args.n_tokens            = f->ne[2];
    args.n_seqs              = f->ne[3];
    args.eps                 = params.eps;
    args.kind                = { params.lower_bound > -INFINITY, params.lower_bound };

    // of the code that runs, which may be older than the device
    const int capability = ggml_cuda_highest_compiled_arch(ggml_cuda_info().devices[ctx.device].cc) / 10;
    const int n_chunked  = kda_cuda::tokens_in_chunks(args.n_tokens, args.st.n_slots);

    ggml_cuda_pool_alloc<char> workspace(ctx.pool());
    if (n_chunked > 0) {
        const char * reason = kda_cuda::chunks_refused(args.head_size, capability);
        if (reason != nullptr) {
            log_refusal(reason);
        } else {
            workspace.alloc(kda_cuda::chunk_workspace(args, { 0, n_chunked }));
        }
    }
    kda_cuda::scan(args, capability, workspace.get(), ctx.stream());
}

static void compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_tensor * to) {
    if (dst->op == GGML_OP_KDA_CONV) {
        compute_conv(ctx, dst, to);
    } else {
        compute_scan(ctx, dst, to);
    }
    CUDA_CHECK(cudaGetLastError());
}

// [state, sequences, slots] with whole states packed
static bool is_states(const ggml_tensor * t, const state_sources & src) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[0] == src.cache->ne[0] &&
           t->ne[1] == src.n_seqs() && t->ne[2] == src.n_written() && t->ne[3] == 1;
}

// Does it lie in whole rows of the cache, a sequence behind the other?
static bool is_in_cache(const ggml_tensor * to, const ggml_tensor * cache) {
    const char * base = (const char *) cache->data;
    const char * data = (const char *) to->data;
    return data >= base && data < base + ggml_nbytes(cache) && (data - base) % cache->nb[1] == 0 &&
           to->nb[1] == cache->nb[1] && to->nb[2] % cache->nb[1] == 0;
}

namespace {

// What may stand between operator and copy; all nullptr: nothing.
struct extra_copies {
    ggml_tensor * fill;    // of one row with zeros; nullptr: none
    ggml_tensor * gather;  // rows of the cache
    ggml_tensor * store;   // into others, one behind the other
};

}  // namespace

// Does t lie in rows that the copy of the new states, into `to`, writes?
static bool meets(const ggml_tensor * t, const ggml_tensor * to, const ggml_tensor * cache) {
    const auto row = [&](const ggml_tensor * x) {
        return ((const char *) x->data - (const char *) cache->data) / (int64_t) cache->nb[1];
    };
    const int64_t n = (ggml_nbytes(t) + cache->nb[1] - 1) / cache->nb[1];
    for (int64_t slot = 0; slot < to->ne[2]; ++slot) {
        const int64_t first = row(to) + slot * (int64_t) (to->nb[2] / cache->nb[1]);
        if (row(t) < first + to->ne[1] && row(t) + n > first) {
            return true;
        }
    }
    return false;
}

static bool is_computed(const ggml_tensor * t) {
    return (t->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 && (t->flags & GGML_TENSOR_FLAG_OUTPUT) == 0;
}

static int next_node(const ggml_cgraph * cgraph, int n) {
    do {
        ++n;
    } while (n < cgraph->n_nodes && (ggml_op_is_empty(cgraph->nodes[n]->op) || ggml_is_empty(cgraph->nodes[n])));
    return n;
}

// Those that begin at node n, which is moved behind them.
static extra_copies find_extra_copies(const ggml_cgraph * cgraph, const state_sources & src, int & n) {
    const ggml_tensor * cache = src.cache;
    const auto          is    = [&](int i, ggml_op op) {
        return i < cgraph->n_nodes && cgraph->nodes[i]->op == op && is_computed(cgraph->nodes[i]);
    };
    extra_copies extra = {};
    int          i     = n;
    if (is(i, GGML_OP_FILL)) {
        extra.fill      = cgraph->nodes[i];
        const bool zero = ggml_get_op_params_f32(extra.fill, 0) == 0.0f;
        if (extra.fill->view_src != cache || !ggml_is_contiguous(extra.fill) || !zero ||
            extra.fill->data != (char *) cache->data + src.zero_row * cache->nb[1] ||
            ggml_nbytes(extra.fill) != cache->nb[1]) {
            return {};
        }
        i = next_node(cgraph, i);
    }
    if (!is(i, GGML_OP_GET_ROWS) || cgraph->nodes[i]->src[0] != cache || !ggml_is_contiguous(cache) ||
        !ggml_is_vector(cgraph->nodes[i]->src[1]) || ggml_node_get_use_count(cgraph, i) != 1) {
        return {};
    }
    extra.gather = cgraph->nodes[i];
    i            = next_node(cgraph, i);
    if (!is(i, GGML_OP_CPY) || cgraph->nodes[i]->src[0] != extra.gather || cgraph->nodes[i]->view_src != cache ||
        cgraph->nodes[i]->type != GGML_TYPE_F32 || !ggml_is_contiguous(cgraph->nodes[i])) {
        return {};
    }
    extra.store = cgraph->nodes[i];
    n           = next_node(cgraph, i);
    return extra;
}

// How many nodes use t, one of the nodes [n0, n1); -1 when it is not among them.
static int count_uses(const ggml_cgraph * cgraph, int n0, int n1, const ggml_tensor * t) {
    for (int n = n0; n < n1; ++n) {
        if (cgraph->nodes[n] == t) {
            return ggml_node_get_use_count(cgraph, n);
        }
    }
    return -1;
}

bool ggml_cuda_kda_supported(int device, const ggml_tensor * op) {
    if (ggml_cuda_info().devices[device].cc < GGML_CUDA_CC_VOLTA) {
        return false;
    }
    const state_sources src = sources_of(op);
    if (!rows_aligned(src.cache)) {
        return false;
    }
    if (op->op == GGML_OP_KDA_CONV) {
        for (int i = GGML_KDA_CONV_Q; i <= GGML_KDA_CONV_V; ++i) {
            if (!rows_aligned(op->src[i]) || !offset_aligned(op->src[GGML_KDA_CONV_WQ + i])) {
                return false;
            }
        }
        return ggml_kda_head_size_supported(ggml_kda_conv_get_params(op).head_size);
    }
    for (const int i : { GGML_KDA_SCAN_QKV, GGML_KDA_SCAN_F, GGML_KDA_SCAN_GATE }) {
        if (!rows_aligned(op->src[i])) {
            return false;
        }
    }
    return ggml_kda_head_size_supported(op->src[GGML_KDA_SCAN_F]->ne[0]);
}

void ggml_cuda_op_kda(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    compute(ctx, dst, nullptr);
}

int ggml_cuda_try_fuse_kda_copy(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    ggml_tensor *       op  = cgraph->nodes[i];
    const state_sources src = sources_of(op);

    int                n     = next_node(cgraph, i);
    const extra_copies extra = find_extra_copies(cgraph, src, n);
    if (n >= cgraph->n_nodes || cgraph->nodes[n]->op != GGML_OP_CPY || (op->flags & GGML_TENSOR_FLAG_OUTPUT) ||
        (cgraph->nodes[n]->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return 0;
    }
    const ggml_tensor * from = cgraph->nodes[n]->src[0];
    const ggml_tensor * to   = cgraph->nodes[n]->src[1];

    // the copy moves exactly the new states, and nothing else reads them: their view is used once, and besides it only
    // one of the output is there
    const bool whole = from->view_src == op && from->view_offs == src.offset(op) && is_states(from, src) &&
                       ggml_is_contiguous(from) && count_uses(cgraph, i + 1, n, from) == 1 &&
                       ggml_node_get_use_count(cgraph, i) <= 2;
    if (!whole || !is_states(to, src) || !is_in_cache(to, src.cache)) {
        return 0;
    }
    if (extra.gather == nullptr) {
        compute(ctx, op, to);
        return n - i;
    }
    if (meets(extra.store, to, src.cache)) {
        return 0;
    }
    const int64_t               size   = src.cache->ne[0];
    const int64_t               n_rows = ggml_nelements(extra.gather->src[1]);
    ggml_cuda_pool_alloc<float> gathered(ctx.pool(), size * n_rows);
    if (extra.fill) {
        CUDA_CHECK(cudaMemsetAsync(extra.fill->data, 0, ggml_nbytes(extra.fill), ctx.stream()));
    }
    kda_cuda::gather_states(data_of(src.cache), (const int32_t *) extra.gather->src[1]->data, n_rows, size,
                            gathered.get(), ctx.stream());
    compute(ctx, op, to);
    CUDA_CHECK(cudaMemcpyAsync(extra.store->data, gathered.get(), size * n_rows * sizeof(float),
                               cudaMemcpyDeviceToDevice, ctx.stream()));
    return n - i;
}

#endif
