// ggml's side of latent attention on CUDA: which nodes of FLASH_ATTN_EXT the kernels take, and their call.
//
// What upstream's kernels claim is not widened: a node may lose V's being a view of K on its way to the device, and then
// has to be theirs.

#include "latent-ggml.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

bool ggml_cuda_latent_attention(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}

#else

#include "latent-node.cuh"

#include <atomic>

// Up to how many queries a stream the kernels are taken, by the cache's type. Upstream's turn every cache but F16 to F16
// in memory, at each step anew, and then multiply in one pass; so with few queries reading the cache as it lies wins,
// with many it does not. Estimated from bandwidth and products, not measured yet; F16 stays upstream's until it is.
constexpr int MAX_QUERIES_CONVERTED = 8;
constexpr int MAX_QUERIES_F16       = 0;

static int max_queries(latent_cuda::cache_type type) {
    return type == latent_cuda::cache_type::f16 ? MAX_QUERIES_F16 : MAX_QUERIES_CONVERTED;
}

// Said once for each reason.
static void log_refusal(const char * reason) {
    static std::atomic<const char *> last(nullptr);
    if (last.exchange(reason) != reason) {
        GGML_LOG_WARN("latent attention: FLASH_ATTN_EXT converts its cache to F16: %s\n", reason);
    }
}

bool ggml_cuda_latent_attention(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    // of the code that runs, which may be older than the device
    if (!ampere_mma_available(ggml_cuda_info().devices[ctx.device].cc) || latent_cuda::misfit(dst)) {
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

#endif
