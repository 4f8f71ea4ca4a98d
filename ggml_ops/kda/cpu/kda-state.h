#pragma once

// Where the KDA operators write their new states on the CPU.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;

// Slot s of sequence i goes to data + i*seq_stride + s*slot_stride (bytes).
struct ggml_kda_state_dest {
    char * data;
    size_t seq_stride;
    size_t slot_stride;
};

// Computes the KDA operator at node_n and writes its new states into the cache, if the copy after it can be elided.
// Returns the number of nodes after node_n that are done with it; 0: nothing was computed.
int ggml_kda_elide_state_copy(const struct ggml_cgraph * cgraph, int node_n, const struct ggml_compute_params * params);

#ifdef __cplusplus
}
#endif
