#pragma once

// Quantized matrices times one column of activations: MUL_MAT and MUL_MAT_ID when one token is decoded. Devices for data
// centres have so much bandwidth that upstream's kernel, with one row per block, cannot use it.

#include "common.cuh"

// See GGML_BACKEND_HAS_MATVEC.
bool ggml_cuda_has_matvec(int device);

// MUL_MAT nodes whose results are computed together with another one.
struct ggml_cuda_matvec_others {
    const ggml_tensor * const * nodes;
    int                         n;
};

// Computes `dst` and returns true, or returns false if the kernel does not support the device, the type or `fusion`.
// q8_1: the columns of src1 in Q8_1, padded to MATRIX_ROW_PADDING. If nullptr, the kernel quantizes them, which it can for
// short columns without a gate. others: from ggml_cuda_matvec_group; with q8_1, the result is then always true.
bool ggml_cuda_matvec(ggml_backend_cuda_context &           ctx,
                      const ggml_tensor *                   src0,
                      const ggml_tensor *                   src1,
                      const ggml_tensor *                   ids,
                      const ggml_tensor *                   dst,
                      const ggml_cuda_mm_fusion_args_host * fusion,
                      const ggml_cuda_matvec_others *       others,
                      const void *                          q8_1);

// Computes the MUL_MAT nodes in a row from node i on that multiply the same column by matrices of one type, in one launch.
// Returns the number of nodes after node i that are then done; 0: nothing was computed.
int ggml_cuda_matvec_group(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);

// Computes the MUL_MAT node i, a batch of matrices with a short column each, and the CONCAT that puts another tensor after
// each result, in one launch. Returns as ggml_cuda_matvec_group.
int ggml_cuda_matvec_concat(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);
