// ggml's side of LATENT_ATTN on CUDA: which nodes the kernels take, weights of any type as floats, and the call.

#include "latent-attn-ggml.cuh"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

bool ggml_cuda_latent_attn_supported(int, const ggml_tensor *) {
    return false;
}

void ggml_cuda_op_latent_attn(ggml_backend_cuda_context &, ggml_tensor *) {
    GGML_ABORT("LATENT_ATTN has kernels for NVIDIA devices only");
}

#else

#include "convert.cuh"
#include "latent-node.cuh"

static bool readable(const ggml_tensor * weights) {
    return weights->type == GGML_TYPE_F32 || ggml_get_to_fp32_cuda(weights->type) != nullptr;
}

// All of a tensor as floats: itself, or converted into memory of the pool.
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
    // of the code that runs, which may be older than the device
    return ampere_mma_available(ggml_cuda_info().devices[device].cc) &&
           latent_cuda::read_decompressed(dst, args) == nullptr && readable(dst->src[2]) && readable(dst->src[3]);
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
