#pragma once

// The plain path of LATENT_ATTN, used with use_ref: scalar, one (query, head) at a time, directly on the latents. It
// shares neither code nor order of computation with the fast path that is compared with it.

#include "ggml-cpu-impl.h"

namespace latent {

size_t reference_work_size(const ggml_tensor * dst, int n_tasks);
void   compute_reference(const ggml_compute_params * params, ggml_tensor * dst);

}  // namespace latent
