// One thread block computes the new row of the cache and stores it, with upstream's function for the type. A thread has four
// values. Rows of quantized types go through shared memory, because one thread quantizes 32 values.

#include "kimi/latent-store.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

int ggml_cuda_latent_store(ggml_backend_cuda_context &, const ggml_cgraph *, int) {
    return 0;
}

#else

#include "cpy-utils.cuh"
#include "ggml-impl.h"
#include "ggml-op-marks.h"
#include "kimi-launch.cuh"
#include "kimi-rows.cuh"

#include <algorithm>

namespace latent_store {

using namespace kimi_cuda;

constexpr int MAX_THREADS = 256;
constexpr int MAX_ROW     = MAX_THREADS * VALUES_PER_LANE;

struct row {
    const float *   latent;
    const float *   weights;
    const float *   tail;  // after the latent, unchanged
    int             n_latent;
    int             n_tail;
    float           eps;
    const int64_t * cell;
    char *          cache;
    int64_t         row_bytes;
};

// How a type stores a row. scalar: each thread stores its four values. quantized: from shared memory, where the whole row is.
template <typename T> struct scalar {
    static constexpr bool is_shared = false;

    static __device__ void store(char * to, int at, float4 x) {
        T * values = reinterpret_cast<T *>(to) + at;
        values[0]  = ggml_cuda_cast<T>(x.x);
        values[1]  = ggml_cuda_cast<T>(x.y);
        values[2]  = ggml_cuda_cast<T>(x.z);
        values[3]  = ggml_cuda_cast<T>(x.w);
    }
};

template <typename FORMAT> struct quantized {
    static constexpr bool is_shared = true;

    static __device__ void store(char * to, const float * values, int n_values) {
        constexpr int N = 32;  // values of a block
        for (int b = threadIdx.x; b < n_values / N; b += blockDim.x) {
            FORMAT::quantize(values + b * N, reinterpret_cast<typename FORMAT::block *>(to) + b);
        }
    }
};

struct q8_0 {
    using block = block_q8_0;

    static __device__ void quantize(const float * from, block * to) { quantize_f32_q8_0_block(from, to); }
};

struct q4_0 {
    using block = block_q4_0;

    static __device__ void quantize(const float * from, block * to) { quantize_f32_q4_0_block(from, to); }
};

template <typename TYPE> static __global__ void __launch_bounds__(MAX_THREADS, 1) store(const row p) {
    __shared__ float parts[WARP_SIZE];
    let_next_begin();
    wait_for_previous();

    const int  at        = threadIdx.x * VALUES_PER_LANE;
    const int  n_values  = p.n_latent + p.n_tail;
    const bool is_latent = at < p.n_latent;
    float4     x         = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4     weights   = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    if (is_latent) {
        x       = load4(p.latent + at);
        weights = load4(p.weights + at);
    } else if (at < n_values) {
        x = load4(p.tail + at - p.n_latent);
    }
    char *      to      = p.cache + *p.cell * p.row_bytes;
    const float squares = is_latent ? x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w : 0.0f;
    const float mean    = block_reduce<block_reduce_method::SUM>(squares, parts) / p.n_latent;
    const float scale   = is_latent ? rsqrtf(mean + p.eps) : 1.0f;
    x = make_float4(scale * x.x * weights.x, scale * x.y * weights.y, scale * x.z * weights.z, scale * x.w * weights.w);

    if constexpr (TYPE::is_shared) {
        __shared__ __align__(sizeof(float4)) float values[MAX_ROW];
        store4(values + at, x);
        __syncthreads();
        TYPE::store(to, values, n_values);
    } else if (at < n_values) {
        TYPE::store(to, at, x);
    }
}

using launcher = void (*)(const row &, int, cudaStream_t);

template <typename TYPE> static void launch(const row & p, int n_threads, cudaStream_t stream) {
    launch_early<store<TYPE>>(dim3(1), dim3(n_threads), 0, stream, p);
    CUDA_CHECK(cudaGetLastError());
}

static launcher launcher_of(ggml_type type) {
    switch (type) {
    case GGML_TYPE_F32:
        return launch<scalar<float>>;
    case GGML_TYPE_F16:
        return launch<scalar<half>>;
    case GGML_TYPE_BF16:
        return launch<scalar<nv_bfloat16>>;
    case GGML_TYPE_Q8_0:
        return launch<quantized<q8_0>>;
    case GGML_TYPE_Q4_0:
        return launch<quantized<q4_0>>;
    default:
        return nullptr;
    }
}

}  // namespace latent_store

int ggml_cuda_latent_store(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    using namespace latent_store;
    constexpr int       MAX_NODES = 6;  // RMS_NORM, MUL, RESHAPE, CONCAT, VIEW, SET_ROWS
    const ggml_tensor * norm      = cgraph->nodes[i];
    if (norm->op != GGML_OP_RMS_NORM || ctx.curr_stream_no != 0 || ggml_op_has_mark(norm, GGML_OP_MARK_UNFUSED)) {
        return 0;
    }
    int     nodes[MAX_NODES];
    ggml_op ops[MAX_NODES];
    int     n    = 0;
    int     last = i;  // where SET_ROWS is
    for (; last < cgraph->n_nodes && n < MAX_NODES; ++last) {
        const ggml_tensor * node    = cgraph->nodes[last];
        const ggml_tensor * before  = n > 0 ? cgraph->nodes[nodes[n - 1]] : nullptr;
        const bool          follows = before == nullptr || node->src[0] == before || node->src[1] == before;
        if (!follows && ggml_op_is_empty(node->op)) {
            continue;  // a view of another tensor
        }
        if (!follows) {
            return 0;
        }
        nodes[n] = last;
        ops[n++] = node->op;
        if (node->op == GGML_OP_SET_ROWS) {
            break;
        }
    }
    static constexpr ggml_op EXPECTED[] = { GGML_OP_RMS_NORM, GGML_OP_MUL, GGML_OP_RESHAPE, GGML_OP_CONCAT };
    if (n < 5 || ops[n - 1] != GGML_OP_SET_ROWS || !std::equal(EXPECTED, EXPECTED + 4, ops) ||
        (n == MAX_NODES && !ggml_op_is_empty(ops[4])) || !ggml_can_fuse_subgraph_ext(cgraph, nodes, n, ops, &last, 1)) {
        return 0;
    }
    const ggml_tensor * mul     = cgraph->nodes[nodes[1]];
    const ggml_tensor * concat  = cgraph->nodes[nodes[3]];
    const ggml_tensor * stored  = cgraph->nodes[last];
    const ggml_tensor * latent  = norm->src[0];
    const ggml_tensor * weights = mul->src[mul->src[0] == norm ? 1 : 0];
    const ggml_tensor * tail    = concat->src[1];
    const ggml_tensor * cell    = stored->src[1];
    const launcher      launch  = launcher_of(stored->type);
    const int64_t       n_row   = concat->ne[0];
    if (launch == nullptr || weights == norm || tail == concat->src[0] || concat->src[0] != cgraph->nodes[nodes[2]] ||
        !is_row(latent, latent->ne[0]) || !is_row(weights, latent->ne[0]) || !is_row(tail, tail->ne[0]) ||
        n_row > MAX_ROW || n_row % 32 != 0 || ggml_get_op_params_i32(concat, 0) != 0 ||
        stored->src[0]->ne[0] != n_row || stored->ne[0] != n_row || stored->ne[2] != 1 || stored->ne[3] != 1 ||
        stored->src[0]->data != concat->data || ggml_nrows(stored->src[0]) != 1 || cell->type != GGML_TYPE_I64 ||
        ggml_nelements(cell) != 1) {
        return 0;
    }

    row p       = {};
    p.latent    = static_cast<const float *>(latent->data);
    p.weights   = static_cast<const float *>(weights->data);
    p.tail      = static_cast<const float *>(tail->data);
    p.n_latent  = static_cast<int>(latent->ne[0]);
    p.n_tail    = static_cast<int>(tail->ne[0]);
    p.eps       = ggml_get_op_params_f32(norm, 0);
    p.cell      = static_cast<const int64_t *>(cell->data);
    p.cache     = static_cast<char *>(stored->data);
    p.row_bytes = stored->nb[1];
    launch(p, static_cast<int>(GGML_PAD(n_row / VALUES_PER_LANE, WARP_SIZE)), ctx.stream());
    return last - i;
}

#endif
