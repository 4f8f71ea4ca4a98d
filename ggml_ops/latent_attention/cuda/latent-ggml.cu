// ggml's side of latent attention on CUDA: selects the nodes of FLASH_ATTN_EXT (absorbed) and LATENT_ATTN
// (decompressed) that the kernels compute, converts weights of any type to floats, and calls the kernels.
//
// Upstream's supports_op() of FLASH_ATTN_EXT is not widened: on its way to the device V may stop being a view of K, and
// then upstream's kernels have to compute the node.

#include "latent-ggml.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

bool ggml_cuda_latent_attention(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}

bool ggml_cuda_latent_attn_supported(int, const ggml_tensor *) {
    return false;
}

void ggml_cuda_op_latent_attn(ggml_backend_cuda_context &, ggml_tensor *) {
    GGML_ABORT("LATENT_ATTN has kernels for NVIDIA devices only");
}

#else

#include "convert.cuh"
#include "latent-node.cuh"

#include <atomic>

// Maximum number of queries per stream for the kernels, by cache type. Upstream converts caches other than F16 to F16
// in memory at each step, then multiplies in one pass: reading the cache directly is faster with few queries, slower
// with many. Estimated from bandwidth and FLOPs, not measured yet; F16 stays upstream's until it is.
constexpr int MAX_QUERIES_CONVERTED = 8;
constexpr int MAX_QUERIES_F16       = 0;

static int max_queries(latent_cuda::cache_type type) {
    return type == latent_cuda::cache_type::f16 ? MAX_QUERIES_F16 : MAX_QUERIES_CONVERTED;
}

// Checks the compiled code, which may be for an older architecture than the device.
static bool has_kernels(int device) {
    return ampere_mma_available(ggml_cuda_info().devices[device].cc);
}

// Logs each reason once.
static void log_refusal(const char * reason) {
    static std::atomic<const char *> last(nullptr);
    if (last.exchange(reason) != reason) {
        GGML_LOG_WARN("latent attention: FLASH_ATTN_EXT converts its cache to F16: %s\n", reason);
    }
}

bool ggml_cuda_latent_attention(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!has_kernels(ctx.device) || latent_cuda::misfit(dst)) {
        return false;
    }
    latent_cuda::attention args;
    if (const char * reason = latent_cuda::read_node(dst, args)) {
        log_refusal(reason);
        return false;
    }
    if (args.n_queries > max_queries(args.type)) {
        return false;
    }
    ggml_cuda_pool_alloc<char> work(ctx.pool());
    if (const size_t size = latent_cuda::workspace(args)) {
        work.alloc(size);
    }
    latent_cuda::attend(args, work.get(), ctx.stream());
    CUDA_CHECK(cudaGetLastError());
    return true;
}

static bool readable(const ggml_tensor * weights) {
    return weights->type == GGML_TYPE_F32 || ggml_get_to_fp32_cuda(weights->type) != nullptr;
}

// The tensor as floats: itself, or converted into memory of the pool.
static const float * as_floats(const ggml_tensor * t, ggml_cuda_pool_alloc<float> & room, cudaStream_t stream) {
    if (t->type == GGML_TYPE_F32) {
        return static_cast<const float *>(t->data);
    }
    const int64_t n = ggml_nelements(t);
    ggml_get_to_fp32_cuda(t->type)(t->data, room.alloc(n), n, stream);
    return room.get();
}

bool ggml_cuda_latent_attn_supported(int device, const ggml_tensor * dst) {
    latent_cuda::decompressed args;
    return has_kernels(device) && latent_cuda::read_decompressed(dst, args) == nullptr && readable(dst->src[2]) &&
           readable(dst->src[3]);
}

void ggml_cuda_op_latent_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    latent_cuda::decompressed args;
    GGML_ASSERT(latent_cuda::read_decompressed(dst, args) == nullptr);

    ggml_cuda_pool_alloc<float> k_b(ctx.pool());
    ggml_cuda_pool_alloc<float> v_b(ctx.pool());
    args.k_b = as_floats(dst->src[2], k_b, ctx.stream());
    args.v_b = as_floats(dst->src[3], v_b, ctx.stream());
    ggml_cuda_pool_alloc<char> work(ctx.pool(), latent_cuda::workspace(args));
    latent_cuda::attend(args, work.get(), ctx.stream());
    CUDA_CHECK(cudaGetLastError());
}

#endif
