// Our CUDA kernels, with ggml's side of them, as those of the devices of second_backend.cpp: on the emulator, called as
// ggml-cuda.cu calls them. Everything else is the CPU's, as it stands in for upstream's kernels.

#include "../second_kernels.h"
#include "ggml-cuda-standin.cuh"
#include "kda-ggml.cuh"
#include "latent-ggml.cuh"

using namespace cuda_emulator;

static void * allocate(size_t bytes) {
    void * memory = nullptr;
    return cudaMalloc(&memory, bytes) == cudaSuccess ? memory : nullptr;
}

static void release(void * memory) {
    GGML_ASSERT(cudaFree(memory) == cudaSuccess);
}

static bool is_kda(const ggml_tensor * node) {
    return node->op == GGML_OP_KDA_CONV || node->op == GGML_OP_KDA_SCAN;
}

static int claims(const ggml_tensor * node) {
    if (node->op == GGML_OP_LATENT_ATTN) {
        return 0;
    }
    return is_kda(node) ? ggml_cuda_kda_supported(0, node) : -1;
}

static int compute(ggml_cgraph * graph, int i) {
    static ggml_backend_cuda_context cuda(0);
    ggml_tensor * const              node = graph->nodes[i];
    if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || ggml_is_empty(node)) {
        return 0;
    }
    try {
        if (is_kda(node)) {
            const int n_behind = ggml_cuda_try_fuse_kda_copy(cuda, graph, i);
            if (n_behind == 0) {
                ggml_cuda_op_kda(cuda, node);
            }
            return 1 + n_behind;
        }
        return node->op == GGML_OP_FLASH_ATTN_EXT && ggml_cuda_latent_attention(cuda, node);
    } catch (const std::exception & fault) {
        GGML_ABORT("%s: %s", node->name, fault.what());
    }
}

static const SecondKernels KERNELS = { allocate, release, claims, compute };

__attribute__((constructor)) static void give() {
    second_kernels = &KERNELS;
}
