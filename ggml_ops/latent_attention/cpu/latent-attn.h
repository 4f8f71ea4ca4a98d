#pragma once

// Latent attention on the CPU: one latent cache of DK values per token serves as keys and values of all heads.
// The operator's README specifies the computation, the supported sources and the error.
//   absorbed:     a special case of FLASH_ATTN_EXT: one KV head, V the beginning of K
//   decompressed: the operator LATENT_ATTN, with k_b and v_b among its sources

#include "ggml-cpu-impl.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of params->wdata that the absorbed form may use for this FLASH_ATTN_EXT node; 0 if its shapes are not
// supported. Depends on shapes and types only, so it can be called before memory is allocated.
size_t ggml_latent_absorbed_work_size(const struct ggml_tensor * dst, int n_tasks);

// Computes the node and returns true, or returns false (nothing touched) if ggml's own path has to compute it:
// other shapes, V elsewhere, attention sinks, ALiBi, soft-capped scores, or use_ref.
bool ggml_compute_forward_latent_absorbed(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Whether LATENT_ATTN can be computed: all types of its sources can be converted to float32.
bool ggml_latent_attn_supported(const struct ggml_tensor * dst);

// The same for LATENT_ATTN, which is always computed; with use_ref by a plain scalar path.
size_t ggml_latent_attn_work_size(const struct ggml_tensor * dst, int n_tasks);
void   ggml_compute_forward_latent_attn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
