// ggml's side of the KDA operators on CUDA: which nodes the kernels support, their arguments from tensors, and the copy
// of the new states into the cache, which the operator elides.
//
// Whether a sequence reads a row that another one writes is known only on the device. The kernels check it
// (kda-device.cuh), so a captured graph is correct for any rows.
//
// Of the nodes between operator and copy, fill and gather run before the operator, gather into memory of its own: the
// operator reads neither the filled row (a sequence that continues the row of zeros starts from zero) nor that memory.
// Store runs after the operator.

#include "kda-ggml.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

const char * ggml_cuda_kda_refused(int, const ggml_tensor *) {
    return "kernels for NVIDIA devices only";
}

void ggml_cuda_op_kda(ggml_backend_cuda_context &, ggml_tensor *) {
    GGML_ABORT("KDA operators have kernels for NVIDIA devices only");
}

int ggml_cuda_kda_elide_state_copy(ggml_backend_cuda_context &, const ggml_cgraph *, int) {
    return 0;
}

size_t ggml_cuda_kda_size(int, const ggml_tensor * op) {
    return ggml_nbytes(op);
}

#else

#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"
#include "ggml-kda-state.h"
#include "kda-conv.cuh"
#include "kda-scan.cuh"
#include "kimi-workspace.cuh"

#include <atomic>
#include <climits>

// Kernels read and write 16 bytes at once.
constexpr size_t ALIGNMENT = 16;

static bool rows_aligned(const ggml_tensor * t) {
    return t->nb[1] % ALIGNMENT == 0 && t->nb[2] % ALIGNMENT == 0 && t->nb[3] % ALIGNMENT == 0 &&
           t->view_offs % ALIGNMENT == 0;
}

static bool offset_aligned(const ggml_tensor * t) {
    return t->view_offs % ALIGNMENT == 0;
}

static int64_t in_floats(size_t bytes) {
    return bytes / sizeof(float);
}

// A stride that rows_near has checked.
static int near_stride(size_t bytes) {
    return (int) in_floats(bytes);
}

static bool rows_near(const ggml_tensor * t) {
    return in_floats(t->nb[1]) <= INT_MAX && in_floats(t->nb[2]) <= INT_MAX;
}

static kda_cuda::rows rows_of(const ggml_tensor * t, int64_t head = 0) {
    return { (const float *) ((const char *) t->data + head * t->nb[1]), near_stride(t->nb[1]), near_stride(t->nb[2]),
             in_floats(t->nb[3]) };
}

// [channels, tokens, sequences], heads of head_size are contiguous
static kda_cuda::rows channels_of(const ggml_tensor * t, int head_size) {
    return { (const float *) t->data, head_size, near_stride(t->nb[1]), in_floats(t->nb[2]) };
}

static const float * data_of(const ggml_tensor * t) {
    return (const float *) t->data;
}

// copy: the elided copy, or nullptr
static kda_cuda::states states_of(const ggml_tensor * op, const ggml_kda_state_copy * copy) {
    const ggml_kda_states src    = ggml_kda_get_states(op);
    const int64_t         size   = src.cache->ne[0];
    const int64_t         n_seqs = src.rows->ne[0];
    kda_cuda::states      st     = {};
    st.cache                     = data_of(src.cache);
    st.row_stride                = in_floats(src.cache->nb[1]);
    st.rows                      = (const int32_t *) src.rows->data;
    st.zero_row                  = src.zero_row;
    st.n_seqs                    = n_seqs;
    st.n_slots                   = src.n_snapshots;
    st.result                    = { (float *) ((char *) op->data + src.offset), size, size * n_seqs };
    if (copy != nullptr) {
        st.in_cache  = { (float *) copy->to->data, in_floats(copy->to->nb[1]), in_floats(copy->to->nb[2]) };
        st.first_row = copy->first_row;
        st.slot_rows = st.in_cache.slot / st.row_stride;
    }
    return st;
}

static void compute_conv(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_kda_state_copy * copy) {
    const ggml_kda_conv_params params = ggml_kda_conv_get_params(dst);
    const ggml_tensor *        q      = dst->src[GGML_KDA_CONV_Q];

    kda_cuda::conv_args args = {};
    for (int p = 0; p < 3; ++p) {
        args.x[p] = channels_of(dst->src[GGML_KDA_CONV_Q + p], params.head_size);
        args.w[p] = data_of(dst->src[GGML_KDA_CONV_WQ + p]);
    }
    args.out       = (float *) dst->data;
    args.st        = states_of(dst, copy);
    args.head_size = params.head_size;
    args.n_heads   = q->ne[0] / params.head_size;
    args.n_tokens  = q->ne[1];
    args.n_seqs    = q->ne[2];
    args.eps       = params.eps;
    kda_cuda::conv(args, ctx.stream());
}

// Logs each reason once: long batches are computed token by token.
static void log_refusal(const char * reason) {
    static std::atomic<const char *> last(nullptr);
    if (last.exchange(reason) != reason) {
        GGML_LOG_WARN("kda: long batches are computed token by token: %s\n", reason);
    }
}

// The sizes in the arguments, without addresses: known before anything is allocated.
static kda_cuda::scan_args scan_sizes(const ggml_tensor * dst) {
    const ggml_tensor * f    = dst->src[GGML_KDA_SCAN_F];
    kda_cuda::scan_args args = {};
    args.st.n_slots          = ggml_kda_scan_get_params(dst).n_snapshots;
    args.head_size           = f->ne[0];
    args.n_heads             = f->ne[1];
    args.n_tokens            = f->ne[2];
    args.n_seqs              = f->ne[3];
    return args;
}

// The code may be compiled for an older architecture than the device's.
static kda_cuda::device_limits limits_of(int device) {
    const auto & info = ggml_cuda_info().devices[device];
    return { ggml_cuda_highest_compiled_arch(info.cc) / 10, info.nsm, info.smpbo };
}

size_t ggml_cuda_kda_size(int device, const ggml_tensor * op) {
    if (op->op != GGML_OP_KDA_SCAN) {
        return ggml_nbytes(op);
    }
    const kda_cuda::scan_args     args      = scan_sizes(op);
    const kda_cuda::device_limits limits    = limits_of(device);
    const int                     n_chunked = kda_cuda::tokens_in_chunks(args, limits);
    if (n_chunked == 0 || kda_cuda::chunks_refused(args.head_size, limits.capability) != nullptr) {
        return ggml_nbytes(op);
    }
    return kimi_cuda::after_result(op) + kda_cuda::chunk_workspace(args, { 0, n_chunked }, limits);
}

static void compute_scan(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_kda_state_copy * copy) {
    const ggml_kda_scan_params params = ggml_kda_scan_get_params(dst);
    const ggml_tensor *        qkv    = dst->src[GGML_KDA_SCAN_QKV];
    const ggml_tensor *        f      = dst->src[GGML_KDA_SCAN_F];
    const ggml_tensor *        beta   = dst->src[GGML_KDA_SCAN_BETA];
    const int64_t              H      = f->ne[1];

    kda_cuda::scan_args args = scan_sizes(dst);
    args.q                   = rows_of(qkv);
    args.k                   = rows_of(qkv, H);
    args.v                   = rows_of(qkv, 2 * H);
    args.f                   = rows_of(f);
    args.gate                = rows_of(dst->src[GGML_KDA_SCAN_GATE]);
    args.beta                = channels_of(beta, 1);
    args.dt_bias             = data_of(dst->src[GGML_KDA_SCAN_DT_BIAS]);
    args.a                   = data_of(dst->src[GGML_KDA_SCAN_A]);
    args.norm                = data_of(dst->src[GGML_KDA_SCAN_NORM]);
    args.out                 = (float *) dst->data;
    args.st                  = states_of(dst, copy);
    args.eps                 = params.eps;
    args.kind                = { params.lower_bound > -INFINITY, params.lower_bound };

    const kda_cuda::device_limits device = limits_of(ctx.device);
    const char *                  reason = kda_cuda::chunks_refused(args.head_size, device.capability);
    if (reason != nullptr && kda_cuda::tokens_in_chunks(args, device) > 0) {
        log_refusal(reason);
    }
    // the last stream is none of those in which ggml-cuda runs branches of a graph
    kda_cuda::scan(args, device, (char *) dst->data + kimi_cuda::after_result(dst),
                   { ctx.stream(), ctx.stream(ctx.device, GGML_CUDA_MAX_STREAMS - 1) });
}

static void compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_kda_state_copy * copy) {
    if (dst->op == GGML_OP_KDA_CONV) {
        compute_conv(ctx, dst, copy);
    } else {
        compute_scan(ctx, dst, copy);
    }
    CUDA_CHECK(cudaGetLastError());
}

const char * ggml_cuda_kda_refused(int device, const ggml_tensor * op) {
    static const char * const unaligned = "a source whose rows are not aligned to 16 bytes";
    static const char * const far       = "a source whose rows are 8 GiB or more apart";
    if (ggml_cuda_info().devices[device].cc < GGML_CUDA_CC_VOLTA) {
        return "a device older than compute capability 7.0";
    }
    if (!rows_aligned(ggml_kda_get_states(op).cache)) {
        return unaligned;
    }
    int64_t head_size;
    if (op->op == GGML_OP_KDA_CONV) {
        for (int i = GGML_KDA_CONV_Q; i <= GGML_KDA_CONV_V; ++i) {
            if (!rows_aligned(op->src[i]) || !offset_aligned(op->src[GGML_KDA_CONV_WQ + i])) {
                return unaligned;
            }
            if (!rows_near(op->src[i])) {
                return far;
            }
        }
        head_size = ggml_kda_conv_get_params(op).head_size;
    } else {
        for (const int i : { GGML_KDA_SCAN_QKV, GGML_KDA_SCAN_F, GGML_KDA_SCAN_GATE }) {
            if (!rows_aligned(op->src[i])) {
                return unaligned;
            }
            if (!rows_near(op->src[i])) {
                return far;
            }
        }
        if (!rows_near(op->src[GGML_KDA_SCAN_BETA])) {
            return far;
        }
        head_size = op->src[GGML_KDA_SCAN_F]->ne[0];
    }
#define COMMA(n) , n
    static_assert(std::is_same_v<kda_cuda::head_sizes, std::integer_sequence<int GGML_KDA_HEAD_SIZES(COMMA)>>);
#undef COMMA
    return ggml_kda_head_size_supported(head_size) ? nullptr : "a head size other than 32, 64, 96, 128, 256";
}

void ggml_cuda_op_kda(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    compute(ctx, dst, nullptr);
}

int ggml_cuda_kda_elide_state_copy(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    ggml_tensor *             op   = cgraph->nodes[i];
    const ggml_kda_state_copy copy = ggml_kda_find_state_copy(cgraph, i);
    if (copy.to == nullptr) {
        return 0;
    }
    if (copy.gather == nullptr) {
        compute(ctx, op, &copy);
        return copy.n_nodes;
    }
    const ggml_tensor *         cache  = ggml_kda_get_states(op).cache;
    const int64_t               size   = cache->ne[0];
    const int64_t               n_rows = ggml_nelements(copy.gather->src[1]);
    ggml_cuda_pool_alloc<float> gathered(ctx.pool(), size * n_rows);
    if (copy.fill) {
        CUDA_CHECK(cudaMemsetAsync(copy.fill->data, 0, ggml_nbytes(copy.fill), ctx.stream()));
    }
    kda_cuda::gather_states(data_of(cache), (const int32_t *) copy.gather->src[1]->data, n_rows, size, gathered.get(),
                            ctx.stream());
    compute(ctx, op, &copy);
    CUDA_CHECK(cudaMemcpyAsync(copy.store->data, gathered.get(), size * n_rows * sizeof(float),
                               cudaMemcpyDeviceToDevice, ctx.stream()));
    return copy.n_nodes;
}

#endif
