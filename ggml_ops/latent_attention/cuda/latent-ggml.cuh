#pragma once

// Latent attention inside FLASH_ATTN_EXT of ggml's CUDA backend.

#include "common.cuh"

// Computes the node if the kernels take it and are worth it there. false: nothing was done.
bool ggml_cuda_latent_attention(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
