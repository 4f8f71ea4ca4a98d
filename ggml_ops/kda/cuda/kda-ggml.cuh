#pragma once

// KDA_CONV and KDA_SCAN as nodes of ggml's CUDA backend: converts tensors to kernel arguments.

#include "common.cuh"

// Why the kernels do not support the node on this device, or nullptr.
const char * ggml_cuda_kda_refused(int device, const ggml_tensor * op);

// Bytes that the operator needs at op->data: its result and what its kernels need behind it.
size_t ggml_cuda_kda_size(int device, const ggml_tensor * op);

void ggml_cuda_op_kda(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Computes the KDA operator at node i and writes its new states into the cache, if the copy after it can be elided.
// Returns the number of nodes after node i that are then done; 0: nothing was computed.
int ggml_cuda_kda_elide_state_copy(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);
