#pragma once

// Latent attention as nodes of ggml's Metal backend: their kernels, and the kernels' arguments from tensors.

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes after dst that the kernels need for a FLASH_ATTN_EXT node; 0 if they do not compute it.
size_t ggml_metal_latent_extra(const struct ggml_tensor * op);

// Absorbed: encodes a FLASH_ATTN_EXT node and returns the number of splits of its keys. 0: nothing was encoded, because
// the kernels cannot compute the node. More than one: ggml_metal_latent_reduce must follow, after a barrier.
int  ggml_metal_latent_attend(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const struct ggml_tensor * op);
void ggml_metal_latent_reduce(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
