#pragma once

// KDA_CONV and KDA_SCAN as nodes of ggml's Metal backend: their kernels, and the kernels' arguments from tensors.

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;

bool ggml_metal_kda_supported(ggml_metal_library_t lib, const struct ggml_tensor * op);

// Whether the operator at node_n can write its new states to the cache itself, so that cpy, the next node, is elided.
bool ggml_metal_kda_elides(const struct ggml_cgraph * gf, int node_n, const struct ggml_tensor * cpy);

// to: [state, sequences, slots], the rows of the cache that receive the new states; NULL: no copy is elided
void ggml_metal_kda_encode(ggml_metal_library_t       lib,
                           ggml_metal_encoder_t       enc,
                           const struct ggml_tensor * op,
                           const struct ggml_tensor * to);

#ifdef __cplusplus
}
#endif
