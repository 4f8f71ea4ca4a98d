#pragma once

// LATENT_ATTN on ggml's CUDA backend.

#include "common.cuh"

// Whether ggml_cuda_op_latent_attn computes the node on this device.
bool ggml_cuda_latent_attn_supported(int device, const ggml_tensor * dst);

void ggml_cuda_op_latent_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
