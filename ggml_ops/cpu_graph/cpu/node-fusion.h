#pragma once

// Runs of nodes that the CPU computes as one, with one barrier at the end. The graph is unchanged, and the results are
// bit-identical.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;

// Computes the run that starts at node_n, if there is one. Returns the number of nodes after node_n that are then done;
// 0: nothing was computed.
int ggml_cpu_fuse_nodes(const struct ggml_cgraph * cgraph, int node_n, const struct ggml_compute_params * params);

#ifdef __cplusplus
}
#endif
