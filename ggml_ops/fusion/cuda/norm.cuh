#pragma once

// RMS_NORM and MUL of one token, with the ADD of the residual in front of them, for matmuls of one column.

#include "common.cuh"

// Computes RMS_NORM and the MUL by its weights from node i on, or ADD, RMS_NORM and MUL, in one launch. If matmuls of
// quantized weights multiply the result, it is also written in Q8_1 for them (ggml_backend_cuda_context::q8_1). Returns the
// number of nodes after node i that are then done; 0: nothing was computed.
int ggml_cuda_norm(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);
