#pragma once

// Quantisation to Q4_K, Q5_K and Q6_K without an importance matrix, many blocks at once. The bytes are those of
// quantize_row_q4_K_ref and its kin; the README says how, and where it is not used.

#include "ggml.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Quantises k floats (a multiple of 256) at x to `type` at y. Returns false, nothing touched, for other types and on
// processors and compilers without wide vectors.
bool ggml_quantise_k(enum ggml_type type, const float * x, void * y, int64_t k);

#ifdef __cplusplus
}
#endif
