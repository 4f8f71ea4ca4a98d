#pragma once

// The new key of one token in an MLA layer: the norm of its latent and the unnormalized part after it, stored in the cache.

#include "common.cuh"

// Computes RMS_NORM, the MUL by its weights, CONCAT and SET_ROWS from node i on in one launch, for one token. Returns the
// number of nodes after node i that are then done; 0: nothing was computed.
int ggml_cuda_latent_store(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);
