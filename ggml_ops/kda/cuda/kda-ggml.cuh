#pragma once

// KDA_CONV and KDA_SCAN as nodes of ggml's CUDA backend: tensors in, arguments of the kernels out.

#include "common.cuh"

// Whether the kernels take the node as it is: NVIDIA devices, head sizes, alignment.
bool ggml_cuda_kda_supported(int device, const ggml_tensor * op);

void ggml_cuda_op_kda(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Node i is a KDA operator. When the copy of its new states into the cache follows at once, computes both. Returns the
// number of nodes behind node i that are done with it; 0: nothing was computed.
int ggml_cuda_try_fuse_kda_copy(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);
