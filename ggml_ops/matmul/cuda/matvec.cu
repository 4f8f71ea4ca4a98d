// Quantized matrices times one column. A warp computes two rows at a time with upstream's dot products (vec_dot_*), so that
// a value of the column that it has loaded serves twice and loads of both rows are in flight together. One, two or four
// warps share two rows: so many that the multiprocessors have enough warps (warps_per_rows).
//
// Short columns are quantized by each block, so they need no launch in front of the matmul.
//
// A launch computes up to eight matrices that multiply the same column, or two of which one is the gate of a GLU. Before
// the kernel waits for the previous one, it prefetches rows of weights into the L2 cache. What the previous kernel still
// writes also goes through that cache.

#include "kimi/matvec.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

bool ggml_cuda_has_matvec(int) {
    return false;
}

bool ggml_cuda_matvec(ggml_backend_cuda_context &,
                      const ggml_tensor *,
                      const ggml_tensor *,
                      const ggml_tensor *,
                      const ggml_tensor *,
                      const ggml_cuda_mm_fusion_args_host *,
                      const ggml_cuda_matvec_others *,
                      const void *) {
    return false;
}

int ggml_cuda_matvec_group(ggml_backend_cuda_context &, const ggml_cgraph *, int) {
    return 0;
}

int ggml_cuda_matvec_concat(ggml_backend_cuda_context &, const ggml_cgraph *, int) {
    return 0;
}

#else

#include "ggml-impl.h"
#include "ggml-op-marks.h"
#include "kimi-device.cuh"
#include "kimi-launch.cuh"
#include "kimi-q8_1.cuh"
#include "mmvq.cuh"
#include "unary.cuh"
#include "vecdotq.cuh"

#include <algorithm>

namespace matvec_cuda {

constexpr int LANES        = 32;
constexpr int WARPS        = 4;                                        // per block
constexpr int ROWS         = 2;                                        // that one to four warps compute together
constexpr int MAX_MATRICES = 8;                                        // per launch
constexpr int MAX_SHORT = WARPS * LANES * kimi_cuda::VALUES_PER_LANE;  // values of a column that each block quantizes

// Measured on an H200, with ten types and 29 shapes.
constexpr int     ENOUGH_WARPS = 30;    // per multiprocessor: with fewer, more warps share two rows
constexpr int     MAX_STEPS    = 12;    // of a warp, each with a block of quants per lane and row: with more, too
constexpr int64_t MAX_COLUMNS  = 4096;  // of rows that this kernel multiplies faster
constexpr int64_t FEW_ROWS     = 2048;  // of all slots and matrices; fewer, without a gate, have this kernel only ...
constexpr int64_t FEW_COLUMNS  = 2304;  // ... up to this length, and not with Q2_K and Q3_K

using dot_product = float (*)(const void *, const block_q8_1 *, const int &, const int &);

// What upstream's dot product of a type computes: `ints` integers of quants per call.
template <ggml_type TYPE> struct format;

#define MATVEC_FORMAT(TYPE, FUNCTION, INTS)                                                                            \
    template <> struct format<TYPE> : ggml_cuda_type_traits<TYPE> {                                                    \
        static constexpr dot_product dot  = FUNCTION;                                                                  \
        static constexpr int         ints = INTS;                                                                      \
    }
MATVEC_FORMAT(GGML_TYPE_Q4_0, vec_dot_q4_0_q8_1, VDR_Q4_0_Q8_1_MMVQ);
MATVEC_FORMAT(GGML_TYPE_Q4_1, vec_dot_q4_1_q8_1, VDR_Q4_1_Q8_1_MMVQ);
MATVEC_FORMAT(GGML_TYPE_Q5_0, vec_dot_q5_0_q8_1, VDR_Q5_0_Q8_1_MMVQ);
MATVEC_FORMAT(GGML_TYPE_Q5_1, vec_dot_q5_1_q8_1, VDR_Q5_1_Q8_1_MMVQ);
MATVEC_FORMAT(GGML_TYPE_Q8_0, vec_dot_q8_0_q8_1, VDR_Q8_0_Q8_1_MMVQ);
MATVEC_FORMAT(GGML_TYPE_Q2_K, vec_dot_q2_K_q8_1, VDR_Q2_K_Q8_1_MMVQ);
MATVEC_FORMAT(GGML_TYPE_Q3_K, vec_dot_q3_K_q8_1, VDR_Q3_K_Q8_1_MMVQ);
MATVEC_FORMAT(GGML_TYPE_Q4_K, vec_dot_q4_K_q8_1, VDR_Q4_K_Q8_1_MMVQ);
MATVEC_FORMAT(GGML_TYPE_Q5_K, vec_dot_q5_K_q8_1, VDR_Q5_K_Q8_1_MMVQ);
MATVEC_FORMAT(GGML_TYPE_Q6_K, vec_dot_q6_K_q8_1, VDR_Q6_K_Q8_1_MMVQ);
#undef MATVEC_FORMAT

struct matrix {
    const char * weights;
    float *      out;
    int          n_rows;
    int          first_block;     // of the launch
    int          warps_per_rows;  // 1, 2 or 4
};

struct products {
    matrix             matrices[MAX_MATRICES];
    int                n_matrices;
    const char *       gate;    // of the only matrix, or nullptr
    const block_q8_1 * input;   // nullptr: `values` is the input
    const float *      values;  // columns of up to MAX_SHORT values
    const float *      tail;    // copied after the results of each slot, or nullptr
    int                n_tail;
    int64_t            tail_values;        // from slot to slot
    const int32_t *    ids;                // the expert of each slot, or nullptr
    int                n_blocks;           // of quants in a row
    int                row_blocks;         // from row to row
    int64_t            channel_bytes;      // from matrix to matrix of a batch, from expert to expert
    int64_t            channel_values;     // of the result, from slot to slot
    int64_t            input_stride;       // from column to column of the input: blocks, or values
    int                n_inputs;           // columns of the input, for slots of experts
    int                slots_per_channel;  // without experts
};

// Compilers refuse the attribute below compute capability 7.0, where the kernel does not run.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700
#define IN_CONSTANT_MEMORY __grid_constant__
#else
#define IN_CONSTANT_MEMORY
#endif

static __device__ __forceinline__ void prefetch(const char * from, int n_bytes, int thread) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr int LINE = 128;  // bytes that a prefetch reads
    for (int at = thread * LINE; at < n_bytes; at += WARPS * LANES * LINE) {
        asm volatile("prefetch.global.L2 [%0];" : : "l"(from + at));
    }
#else
    GGML_UNUSED_VARS(from, n_bytes, thread);
#endif
}

// Block (x, y): rows of a matrix by slot y (a matrix of a batch, or an expert). out = W x, or silu(gate x) * W x.
// SHORT: the input is F32, and each block quantizes its column.
template <ggml_type TYPE, bool GATED, bool SHORT>
static __global__ void __launch_bounds__(WARPS * LANES, 1) multiply(const IN_CONSTANT_MEMORY products p) {
    using type                   = format<TYPE>;
    constexpr int    LANES_BLOCK = type::qi / type::ints;  // lanes that share a block of quants
    constexpr int    SUMS        = GATED ? 2 * ROWS : ROWS;
    __shared__ float parts[WARPS][SUMS][LANES];
    static_assert(!GATED || !SHORT);

    kimi_cuda::let_next_begin();
    const int lane = threadIdx.x, warp = threadIdx.y, slot = blockIdx.y;
    int       m = 0;
    while (m + 1 < p.n_matrices && static_cast<int>(blockIdx.x) >= p.matrices[m + 1].first_block) {
        ++m;
    }
    const int n_rows         = p.matrices[m].n_rows;
    const int warps_per_rows = p.matrices[m].warps_per_rows;
    const int rows_per_block = WARPS / warps_per_rows * ROWS;
    const int block_row      = (blockIdx.x - p.matrices[m].first_block) * rows_per_block;
    const int row            = block_row + warp / warps_per_rows * ROWS;
    const int part           = warp % warps_per_rows;

    if (p.ids == nullptr && p.row_blocks == p.n_blocks) {
        const int64_t first =
            slot / p.slots_per_channel * p.channel_bytes + int64_t(block_row) * p.row_blocks * type::bs;
        const int bytes  = min(rows_per_block, n_rows - block_row) * p.row_blocks * type::bs;
        const int thread = warp * LANES + lane;
        prefetch(p.matrices[m].weights + first, bytes, thread);
        if constexpr (GATED) {
            prefetch(p.gate + first, bytes, thread);
        }
    }
    kimi_cuda::wait_for_previous();

    const int64_t channel = (p.ids ? p.ids[slot] : slot / p.slots_per_channel) * p.channel_bytes;
    const char *  up      = p.matrices[m].weights + channel;
    const char *  gate    = GATED ? p.gate + channel : nullptr;
    const int64_t column  = (p.ids ? slot % p.n_inputs : slot) * p.input_stride;
    const auto *  input   = p.input + (SHORT ? 0 : column);
    if constexpr (SHORT) {
        __shared__ block_q8_1 quantized[MAX_SHORT / QK8_1];
        const int             value = (warp * LANES + lane) * kimi_cuda::VALUES_PER_LANE;
        const bool            any   = value < p.n_blocks * type::qk;
        const float4 x = any ? kimi_cuda::load4(p.values + column + value) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        kimi_cuda::quantize_q8_1(quantized, value, x, any);
        input = quantized;
        __syncthreads();
    }
    int at[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        at[r] = min(row + r, n_rows - 1) * p.row_blocks;
    }
    const int thread = part * LANES + lane;
    const int quant  = type::ints * (thread % LANES_BLOCK);
    const int step   = warps_per_rows * LANES / LANES_BLOCK;

    float sums[SUMS] = {};
#pragma unroll 1
    for (int block = thread / LANES_BLOCK; block < p.n_blocks; block += step) {
        const block_q8_1 * x = input + block * (type::qk / QK8_1);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            sums[r] += type::dot(up, x, at[r] + block, quant);
            if constexpr (GATED) {
                sums[ROWS + r] += type::dot(gate, x, at[r] + block, quant);
            }
        }
    }

    if (warps_per_rows > 1) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            parts[warp][i][lane] = sums[i];
        }
        __syncthreads();
        if (part > 0) {
            return;
        }
        for (int other = 1; other < warps_per_rows; ++other) {
#pragma unroll
            for (int i = 0; i < SUMS; ++i) {
                sums[i] += parts[warp + other][i][lane];
            }
        }
    }
    float * out = p.matrices[m].out + slot * p.channel_values;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float sum = warp_reduce_sum<LANES>(sums[r]);
        if constexpr (GATED) {
            sum *= ggml_cuda_op_silu_single(warp_reduce_sum<LANES>(sums[ROWS + r]));
        }
        if (lane == r && row + r < n_rows) {
            out[row + r] = sum;
        }
    }
    if (SHORT && p.tail != nullptr && blockIdx.x == 0 && warp == 0) {
        for (int i = lane; i < p.n_tail; i += LANES) {
            out[n_rows + i] = p.tail[slot * p.tail_values + i];
        }
    }
}

static int ceil_div(int64_t n, int64_t by) {
    return static_cast<int>((n + by - 1) / by);
}

// More warps share rows while the device has too few warps or each of them has too many steps. This does not depend on the
// other matrices of a launch, so a node has the same bits alone.
template <ggml_type TYPE>
static int warps_per_rows(int64_t n_blocks, int64_t n_rows, bool gated, int n_multiprocessors) {
    const int64_t n_steps = ceil_div(n_blocks * format<TYPE>::qi, format<TYPE>::ints * LANES);
    const int64_t n_dots  = n_steps * (gated ? 2 : 1);
    int           warps   = 1;
    while (warps < WARPS && warps < n_steps &&
           (n_rows / ROWS * warps < int64_t(ENOUGH_WARPS) * n_multiprocessors || n_dots > MAX_STEPS * warps)) {
        warps *= 2;
    }
    return warps;
}

template <ggml_type TYPE>
static void launch(products & p, int64_t n_slots, int n_multiprocessors, cudaStream_t stream) {
    int n_blocks = 0;
    for (int m = 0; m < p.n_matrices; ++m) {
        matrix & each    = p.matrices[m];
        each.first_block = n_blocks;
        each.warps_per_rows =
            warps_per_rows<TYPE>(p.n_blocks, each.n_rows * n_slots, p.gate != nullptr, n_multiprocessors);
        n_blocks += ceil_div(each.n_rows, WARPS / each.warps_per_rows * ROWS);
    }
    const dim3 grid(n_blocks, n_slots), block(LANES, WARPS);
    if (p.gate != nullptr) {
        kimi_cuda::launch_early<multiply<TYPE, true, false>>(grid, block, 0, stream, p);
    } else if (p.input != nullptr) {
        kimi_cuda::launch_early<multiply<TYPE, false, false>>(grid, block, 0, stream, p);
    } else {
        kimi_cuda::launch_early<multiply<TYPE, false, true>>(grid, block, 0, stream, p);
    }
    CUDA_CHECK(cudaGetLastError());
}

using launcher = void (*)(products &, int64_t, int, cudaStream_t);

static launcher launcher_of(ggml_type type) {
    switch (type) {
    case GGML_TYPE_Q4_0:
        return launch<GGML_TYPE_Q4_0>;
    case GGML_TYPE_Q4_1:
        return launch<GGML_TYPE_Q4_1>;
    case GGML_TYPE_Q5_0:
        return launch<GGML_TYPE_Q5_0>;
    case GGML_TYPE_Q5_1:
        return launch<GGML_TYPE_Q5_1>;
    case GGML_TYPE_Q8_0:
        return launch<GGML_TYPE_Q8_0>;
    case GGML_TYPE_Q2_K:
        return launch<GGML_TYPE_Q2_K>;
    case GGML_TYPE_Q3_K:
        return launch<GGML_TYPE_Q3_K>;
    case GGML_TYPE_Q4_K:
        return launch<GGML_TYPE_Q4_K>;
    case GGML_TYPE_Q5_K:
        return launch<GGML_TYPE_Q5_K>;
    case GGML_TYPE_Q6_K:
        return launch<GGML_TYPE_Q6_K>;
    default:
        return nullptr;
    }
}

// Whether this kernel is faster than upstream's.
static bool is_faster(int device, ggml_type type, int64_t n_columns, int64_t n_rows, bool gated) {
    if (!ggml_cuda_has_matvec(device) || n_columns > MAX_COLUMNS) {
        return false;
    }
    return gated || n_rows >= FEW_ROWS ||
           (n_columns <= FEW_COLUMNS && type != GGML_TYPE_Q2_K && type != GGML_TYPE_Q3_K);
}

// Whether the node, or the product in front of a GLU, is to have upstream's kernel.
static bool is_marked(const ggml_tensor * node) {
    return ggml_op_has_mark(node->op == GGML_OP_GLU ? node->src[0] : node, GGML_OP_MARK_UPSTREAM);
}

// Whether a launch that computes several nodes can compute this one.
static bool fits_a_group(const ggml_tensor * node) {
    const ggml_tensor * w = node->src[0];
    const ggml_tensor * x = node->src[1];
    return node->op == GGML_OP_MUL_MAT && (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 && !is_marked(node) &&
           launcher_of(w->type) != nullptr &&
           ggml_backend_buffer_get_usage(w->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS && ggml_is_contiguous(w) &&
           ggml_nrows(w) == w->ne[1] && x->type == GGML_TYPE_F32 && ggml_is_contiguous(x) && ggml_nrows(x) == 1 &&
           node->type == GGML_TYPE_F32 && ggml_is_contiguous(node);
}

// Whether each block can quantize a column for itself.
static bool is_short(const ggml_tensor * columns) {
    return columns->ne[0] <= MAX_SHORT && columns->nb[0] == sizeof(float) && kimi_cuda::is_aligned4(columns->data) &&
           columns->nb[1] % sizeof(float4) == 0 && columns->nb[2] % sizeof(float4) == 0;
}

static int64_t n_slots(const ggml_tensor * ids, const ggml_tensor * dst) {
    return dst->ne[ids ? 1 : 2];
}

// Whether this kernel computes a node, also with what it is fused with.
static bool is_served(int                                   device,
                      const ggml_tensor *                   src0,
                      const ggml_tensor *                   ids,
                      const ggml_tensor *                   dst,
                      const ggml_cuda_mm_fusion_args_host * fusion) {
    const bool gated = fusion != nullptr && fusion->gate != nullptr;
    const bool other = fusion != nullptr && (fusion->x_bias || fusion->gate_bias || fusion->x_scale ||
                                             fusion->gate_scale || !gated || fusion->glu_op != GGML_GLU_OP_SWIGLU);
    return launcher_of(src0->type) != nullptr && !other && !is_marked(dst) && dst->ne[ids ? 2 : 1] == 1 &&
           dst->ne[3] == 1 && is_faster(device, src0->type, src0->ne[0], src0->ne[1] * n_slots(ids, dst), gated);
}

// One matrix, or one of a batch or of experts, without a gate. q8_1: nullptr if each block quantizes the column.
static products products_of(const ggml_tensor * src0,
                            const ggml_tensor * src1,
                            const ggml_tensor * ids,
                            const ggml_tensor * dst,
                            const void *        q8_1) {
    products p    = {};
    p.matrices[0] = { static_cast<const char *>(src0->data), static_cast<float *>(dst->data), int(src0->ne[1]), 0, 0 };
    p.n_matrices  = 1;
    p.input       = static_cast<const block_q8_1 *>(q8_1);
    p.values      = static_cast<const float *>(src1->data);
    p.ids         = ids ? static_cast<const int32_t *>(ids->data) : nullptr;
    p.n_blocks    = src0->ne[0] / ggml_blck_size(src0->type);
    p.row_blocks  = src0->nb[1] / ggml_type_size(src0->type);
    p.channel_bytes  = src0->nb[2];
    p.channel_values = dst->nb[ids ? 1 : 2] / sizeof(float);
    p.input_stride   = q8_1 ? GGML_PAD(src1->ne[0], MATRIX_ROW_PADDING) / QK8_1 : src1->nb[ids ? 1 : 2] / sizeof(float);
    p.n_inputs       = src1->ne[1];
    p.slots_per_channel = ids ? 1 : dst->ne[2] / src0->ne[2];
    return p;
}

static void launch(ggml_backend_cuda_context & ctx, ggml_type type, products & p, int64_t n_slots) {
    launcher_of(type)(p, n_slots, ggml_cuda_info().devices[ctx.device].nsm, ctx.stream());
}

}  // namespace matvec_cuda

bool ggml_cuda_has_matvec(int device) {
    const int capability = ggml_cuda_info().devices[device].cc;
    return GGML_CUDA_CC_IS_NVIDIA(capability) && kimi_cuda::is_data_centre(capability);
}

bool ggml_cuda_matvec(ggml_backend_cuda_context &           ctx,
                      const ggml_tensor *                   src0,
                      const ggml_tensor *                   src1,
                      const ggml_tensor *                   ids,
                      const ggml_tensor *                   dst,
                      const ggml_cuda_mm_fusion_args_host * fusion,
                      const ggml_cuda_matvec_others *       others,
                      const void *                          q8_1) {
    using namespace matvec_cuda;
    const bool gated = fusion != nullptr && fusion->gate != nullptr;
    if ((others == nullptr && !is_served(ctx.device, src0, ids, dst, fusion)) ||
        (q8_1 == nullptr && (gated || !is_short(src1)))) {
        return false;
    }
    products p = products_of(src0, src1, ids, dst, q8_1);
    p.gate     = gated ? static_cast<const char *>(fusion->gate->data) : nullptr;
    for (int i = 0; others != nullptr && i < others->n; ++i) {
        const ggml_tensor * node   = others->nodes[i];
        p.matrices[p.n_matrices++] = { static_cast<const char *>(node->src[0]->data), static_cast<float *>(node->data),
                                       int(node->src[0]->ne[1]), 0, 0 };
    }
    launch(ctx, src0->type, p, n_slots(ids, dst));
    return true;
}

int ggml_cuda_matvec_concat(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    using namespace matvec_cuda;
    const ggml_tensor * node = cgraph->nodes[i];
    int                 last = i + 1;
    while (last < cgraph->n_nodes && ggml_op_is_empty(cgraph->nodes[last]->op)) {
        ++last;
    }
    if (node->op != GGML_OP_MUL_MAT || last >= cgraph->n_nodes || cgraph->nodes[last]->op != GGML_OP_CONCAT ||
        ctx.curr_stream_no != 0 || ctx.has_q8_1(node->src[1]) || ggml_op_has_mark(node, GGML_OP_MARK_UNFUSED) ||
        ggml_backend_buffer_get_usage(node->src[0]->buffer) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS) {
        return 0;
    }
    const ggml_tensor * x      = node->src[1];
    const ggml_tensor * concat = cgraph->nodes[last];
    const ggml_tensor * head   = concat->src[0];
    const ggml_tensor * tail   = concat->src[1];
    const int     nodes[] = { i, int(std::find(cgraph->nodes + i, cgraph->nodes + last, head) - cgraph->nodes), last };
    const ggml_op ops[]   = { GGML_OP_MUL_MAT, GGML_OP_PERMUTE, GGML_OP_CONCAT };
    if (!ggml_can_fuse_subgraph_ext(cgraph, nodes, 3, ops, &last, 1) || head->src[0] != node ||
        node->type != GGML_TYPE_F32 || x->type != GGML_TYPE_F32 || !is_short(x) ||
        !is_served(ctx.device, node->src[0], nullptr, node, nullptr)) {
        return 0;
    }
    const bool in_rows = head->ne[0] == node->ne[0] && head->ne[1] == node->ne[2] && head->nb[1] == node->nb[2] &&
                         ggml_nrows(head) == node->ne[2] && ggml_nrows(tail) == node->ne[2];
    if (!in_rows || ggml_get_op_params_i32(concat, 0) != 0 || tail->type != GGML_TYPE_F32 ||
        tail->nb[0] != sizeof(float) || !ggml_is_contiguous(concat) || kimi_cuda::overlap(concat, x) ||
        kimi_cuda::overlap(concat, tail)) {
        return 0;
    }
    products p        = products_of(node->src[0], x, nullptr, node, nullptr);
    p.matrices[0].out = static_cast<float *>(concat->data);
    p.channel_values  = concat->ne[0];
    p.tail            = static_cast<const float *>(tail->data);
    p.n_tail          = static_cast<int>(tail->ne[0]);
    p.tail_values     = tail->nb[1] / sizeof(float);
    launch(ctx, node->src[0]->type, p, node->ne[2]);
    return last - i;
}

int ggml_cuda_matvec_group(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    using namespace matvec_cuda;
    ggml_tensor * first = cgraph->nodes[i];
    if (ctx.curr_stream_no != 0 || !fits_a_group(first)) {  // nodes of other streams would not wait for this one
        return 0;
    }
    const ggml_tensor *     nodes[MAX_MATRICES] = { first };
    int                     n = 1, last = i;
    int64_t                 n_rows = first->src[0]->ne[1];
    ggml_cuda_matvec_others others = { nodes + 1, 0 };
    for (int k = i + 1; k < cgraph->n_nodes && n < MAX_MATRICES; ++k) {
        const ggml_tensor * node = cgraph->nodes[k];
        if (ggml_op_is_empty(node->op)) {
            continue;
        }
        if (!fits_a_group(node) || node->src[1] != first->src[1] || node->src[0]->type != first->src[0]->type ||
            std::any_of(nodes, nodes + n, [&](const ggml_tensor * other) { return kimi_cuda::overlap(node, other); })) {
            break;
        }
        nodes[n++] = node;
        n_rows += node->src[0]->ne[1];
        last = k;
    }
    if (n == 1 || !is_faster(ctx.device, first->src[0]->type, first->src[0]->ne[0], n_rows, false)) {
        return 0;
    }
    others.n = n - 1;
    ggml_cuda_mul_mat_vec_q(ctx, first->src[0], first->src[1], nullptr, first, nullptr, &others);
    return last - i;
}

#endif
