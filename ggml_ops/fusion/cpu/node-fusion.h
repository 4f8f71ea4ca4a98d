#pragma once

// Runs of small nodes that the CPU computes as one, with one barrier behind all of them. The graph keeps its nodes,
// and what is computed is the same to the last bit; the README beside the sources lists the runs.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;

// Node node_n may begin such a run. Returns the number of nodes after it that are done with it; 0: nothing was
// computed. A node marked GGML_OP_MARK_UNFUSED begins none.
int ggml_cpu_fuse_nodes(const struct ggml_cgraph * cgraph, int node_n, const struct ggml_compute_params * params);

#ifdef __cplusplus
}
#endif
