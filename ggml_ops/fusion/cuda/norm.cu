// One block computes the sum of two rows, its norm times the weights, and the Q8_1 form of that. Each thread has groups of
// four values, so eight lanes share a block of Q8_1. All threads have read their inputs before the first result is written
// (block_reduce waits for them), so results may share memory with inputs.

#include "kimi/norm.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

int ggml_cuda_norm(ggml_backend_cuda_context &, const ggml_cgraph *, int) {
    return 0;
}

#else

#include "ggml-impl.h"
#include "ggml-op-marks.h"
#include "kimi-launch.cuh"
#include "kimi-q8_1.cuh"

#include <algorithm>

namespace norm_cuda {

using namespace kimi_cuda;

constexpr int MAX_THREADS = 1024;
constexpr int MAX_GROUPS  = 2;  // of VALUES_PER_LANE per thread
constexpr int MAX_ROW     = MAX_THREADS * MAX_GROUPS * VALUES_PER_LANE;

struct row {
    const float * x;
    const float * residual;  // nullptr: none
    float *       sum;       // x + residual; not written without a residual
    const float * weights;
    float *       out;
    block_q8_1 *  q8_1;  // nullptr: not needed
    int           n_values;
    int           n_padded;  // of q8_1
    float         eps;
};

static __global__ void __launch_bounds__(MAX_THREADS, 1) normalize(const row p) {
    __shared__ float parts[WARP_SIZE];
    let_next_begin();
    wait_for_previous();

    float4 x[MAX_GROUPS];
    float4 weights[MAX_GROUPS];
    float  squares = 0.0f;
#pragma unroll
    for (int g = 0; g < MAX_GROUPS; ++g) {
        const int at = (g * blockDim.x + threadIdx.x) * VALUES_PER_LANE;
        x[g]         = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        weights[g]   = x[g];
        if (at < p.n_values) {
            x[g]       = load4(p.x + at);
            weights[g] = load4(p.weights + at);
            if (p.residual != nullptr) {
                const float4 r = load4(p.residual + at);
                x[g]           = make_float4(x[g].x + r.x, x[g].y + r.y, x[g].z + r.z, x[g].w + r.w);
            }
        }
        squares += x[g].x * x[g].x + x[g].y * x[g].y + x[g].z * x[g].z + x[g].w * x[g].w;
    }
    squares           = block_reduce<block_reduce_method::SUM>(squares, parts);
    const float scale = rsqrtf(squares / p.n_values + p.eps);

#pragma unroll
    for (int g = 0; g < MAX_GROUPS; ++g) {
        const int    at = (g * blockDim.x + threadIdx.x) * VALUES_PER_LANE;
        const float4 y  = make_float4(scale * x[g].x * weights[g].x, scale * x[g].y * weights[g].y,
                                      scale * x[g].z * weights[g].z, scale * x[g].w * weights[g].w);
        if (at < p.n_values) {
            if (p.residual != nullptr) {
                store4(p.sum + at, x[g]);
            }
            store4(p.out + at, y);
        }
        if (p.q8_1 != nullptr) {
            quantize_q8_1(p.q8_1, at, y, at < p.n_padded);
        }
    }
}

static bool computes(const ggml_tensor * node, ggml_op op) {
    return node->op == op && (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
}

// Whether a matmul of the next nodes reads the tensor in Q8_1.
static bool is_multiplied(const ggml_cgraph * cgraph, int from, const ggml_tensor * t) {
    constexpr int NEAR = 32;  // nodes, views included: the experts' first matmul follows 15 nodes of the router
    for (int i = from; i < std::min(cgraph->n_nodes, from + NEAR); ++i) {
        const ggml_tensor * node = cgraph->nodes[i];
        if ((node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID) && ggml_is_quantized(node->src[0]->type) &&
            (node->src[1] == t || node->src[1]->view_src == t)) {
            return true;
        }
    }
    return false;
}

}  // namespace norm_cuda

int ggml_cuda_norm(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    using namespace norm_cuda;
    const ggml_tensor * add = computes(cgraph->nodes[i], GGML_OP_ADD) ? cgraph->nodes[i] : nullptr;
    const int           at  = i + (add != nullptr ? 1 : 0);  // of the norm
    if (ctx.curr_stream_no != 0 || at + 1 >= cgraph->n_nodes ||
        ggml_op_has_mark(cgraph->nodes[i], GGML_OP_MARK_UNFUSED)) {
        return 0;
    }
    const ggml_tensor * norm = cgraph->nodes[at];
    const ggml_tensor * out  = cgraph->nodes[at + 1];
    if (!computes(norm, GGML_OP_RMS_NORM) || !computes(out, GGML_OP_MUL)) {
        return 0;
    }
    const ggml_tensor * x         = norm->src[0];
    const ggml_tensor * weights   = out->src[0] == norm ? out->src[1] : out->src[0];
    const int64_t       n_values  = out->ne[0];
    const ggml_op       ops[]     = { GGML_OP_ADD, GGML_OP_RMS_NORM, GGML_OP_MUL };
    const int           results[] = { i, at + 1 };
    const bool          has_sum   = add != nullptr && add == x;
    if ((add != nullptr && !has_sum) || n_values % QK8_1 != 0 || n_values > MAX_ROW || out->view_src != nullptr ||
        weights == norm || weights == add || !is_row(out, n_values) || !is_row(weights, n_values) ||
        !is_row(x, n_values) ||
        !ggml_can_fuse_subgraph(cgraph, i, has_sum ? 3 : 2, ops + (has_sum ? 0 : 1), results + (has_sum ? 0 : 1),
                                has_sum ? 2 : 1)) {
        return 0;
    }
    if (has_sum && (!is_row(add->src[0], n_values) || !is_row(add->src[1], n_values) ||
                    (overlap(add, out) && add->data != out->data))) {
        return 0;
    }
    const bool multiplied = ctx.keeps_q8_1() && is_multiplied(cgraph, at + 2, out);
    if (!has_sum && !multiplied) {
        return 0;  // upstream has a kernel for this
    }

    row p      = {};
    p.x        = static_cast<const float *>(has_sum ? add->src[0]->data : x->data);
    p.residual = has_sum ? static_cast<const float *>(add->src[1]->data) : nullptr;
    p.sum      = has_sum ? static_cast<float *>(add->data) : nullptr;
    p.weights  = static_cast<const float *>(weights->data);
    p.out      = static_cast<float *>(out->data);
    p.n_values = static_cast<int>(n_values);
    p.n_padded = GGML_PAD(p.n_values, MATRIX_ROW_PADDING);
    p.eps      = ggml_get_op_params_f32(norm, 0);
    if (multiplied) {
        p.q8_1 = static_cast<block_q8_1 *>(ctx.new_q8_1(out, p.n_padded * sizeof(block_q8_1) / QK8_1));
    }
    const int n_groups  = (multiplied ? p.n_padded : p.n_values) / VALUES_PER_LANE;
    const int per_round = n_groups <= MAX_THREADS ? n_groups : (n_groups + MAX_GROUPS - 1) / MAX_GROUPS;
    const int n_threads = GGML_PAD(per_round, WARP_SIZE);
    launch_early<normalize>(dim3(1), dim3(n_threads), 0, ctx.stream(), p);
    CUDA_CHECK(cudaGetLastError());
    return at + 1 - i;
}

#endif
