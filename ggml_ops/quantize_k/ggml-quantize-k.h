#pragma once

// Quantization to Q4_K, Q5_K and Q6_K without an importance matrix, many blocks at once. The result is bit-identical to
// quantize_row_q4_K_ref and the like; the README describes the method and its limits.

#include "ggml.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Quantizes k floats (a multiple of 256) at x to `type` at y. Returns false, nothing touched, for other types and for
// CPUs and compilers without wide vectors.
bool ggml_quantise_k(enum ggml_type type, const float * x, void * y, int64_t k);

#ifdef __cplusplus
}
#endif
