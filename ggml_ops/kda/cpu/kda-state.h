#pragma once

// Where the KDA operators leave their new states, and how a following copy into the cache is taken over.

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

// Node node_n is a KDA operator. When the copy of its new states into the cache follows at once, and every
// sequence writes where it has read, computes the operator with the states written straight into the cache.
// Returns the number of nodes after node_n that are done with it; 0: nothing was computed.
int ggml_kda_try_fuse_copy(const struct ggml_cgraph * cgraph, int node_n, const struct ggml_compute_params * params);

#ifdef __cplusplus
}
#endif
