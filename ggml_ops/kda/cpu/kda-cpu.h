#pragma once

// The KDA operators in ggml-cpu.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;

// Destination of an operator's new states: slot s of sequence i at data + i*seq_stride + s*slot_stride (bytes).
struct ggml_kda_state_dest {
    char * data;
    size_t seq_stride;
    size_t slot_stride;
};

// dest: where the new states are written; NULL means the result tensor
void ggml_compute_forward_kda_conv(const struct ggml_compute_params * params,
                                   struct ggml_tensor *               dst,
                                   const struct ggml_kda_state_dest * dest);
void ggml_compute_forward_kda_scan(const struct ggml_compute_params * params,
                                   struct ggml_tensor *               dst,
                                   const struct ggml_kda_state_dest * dest);

// size of the work buffer in bytes for n_tasks threads
size_t ggml_kda_conv_work_size(const struct ggml_tensor * op, int n_tasks);
size_t ggml_kda_scan_work_size(const struct ggml_tensor * op, int n_tasks);

// Computes the KDA operator at node_n and writes its new states into the cache, if the copy after it can be elided.
// Returns the number of nodes after node_n that are then done; 0: nothing was computed.
int ggml_kda_elide_state_copy(const struct ggml_cgraph * cgraph, int node_n, const struct ggml_compute_params * params);

#ifdef __cplusplus
}
#endif
