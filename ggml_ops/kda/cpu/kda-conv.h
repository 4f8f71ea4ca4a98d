#pragma once

#include "kda-state.h"

#ifdef __cplusplus
extern "C" {
#endif

// dest: where the new states go; NULL: into the result
void ggml_compute_forward_kda_conv(const struct ggml_compute_params * params,
                                   struct ggml_tensor *               dst,
                                   const struct ggml_kda_state_dest * dest);

// bytes of work buffer for n_tasks threads
size_t ggml_kda_conv_work_size(const struct ggml_tensor * op, int n_tasks);

#ifdef __cplusplus
}
#endif
