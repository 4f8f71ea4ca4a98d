#pragma once

// FLASH_ATTN_EXT over a latent cache: whether the CPU may take its own path for the node.
//
// The mark stands in the last of the operator's parameters, which no backend looks at: one that knows nothing of it
// computes the node as ever. It is set while a graph is built, so two graphs of one process may differ in it, and a
// graph that is used again keeps its own.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_LATENT_ABSORBED_PARAM (GGML_MAX_OP_PARAMS / (int) sizeof(int32_t) - 1)

// Leaves the node fattn to the paths that any other FLASH_ATTN_EXT takes.
static inline void ggml_latent_absorbed_switch_off(struct ggml_tensor * fattn) {
    fattn->op_params[GGML_LATENT_ABSORBED_PARAM] = 1;
}

static inline bool ggml_latent_absorbed_is_on(const struct ggml_tensor * fattn) {
    return fattn->op_params[GGML_LATENT_ABSORBED_PARAM] == 0;
}

#ifdef __cplusplus
}
#endif
