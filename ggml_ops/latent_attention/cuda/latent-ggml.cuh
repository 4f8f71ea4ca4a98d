#pragma once

// Latent attention as nodes of ggml's CUDA backend: converts tensors to kernel arguments.

#include "common.cuh"
#include "ggml-latent-attn.h"

// Absorbed: computes the FLASH_ATTN_EXT node if the kernels support it and are faster. false: nothing was done.
bool ggml_cuda_latent_attention(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Bytes at dst->data, or 0 if upstream's code alone computes the node: what it needs, or upstream's kernel for a node that
// differs only in having fewer keys, if that is more.
size_t ggml_cuda_latent_attention_size(int device, const ggml_tensor * dst);

// Decompressed: whether ggml_cuda_op_latent_attn supports the LATENT_ATTN node on this device.
bool ggml_cuda_latent_attn_supported(int device, const ggml_tensor * dst);

void ggml_cuda_op_latent_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Bytes that this function needs at dst->data.
size_t ggml_cuda_latent_attn_size(const ggml_tensor * dst);

// See GGML_BACKEND_LATENT_FAST_SUMS.
bool ggml_cuda_latent_fast_sums(int device);
