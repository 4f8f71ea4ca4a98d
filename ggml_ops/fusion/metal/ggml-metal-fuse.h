#pragma once

// Nodes that one dispatch computes: README.md of fusion.

#include "ggml-metal-device.h"

struct ggml_cgraph;

// Whether nodes from this one on may be computed together: it has no mark, and its device has the kernels. Before the
// node is allocated, its device is not known.
bool ggml_metal_fuse_allowed(const ggml_tensor * first);

// SIGMOID ... SCALE of a router (ggml-router-nodes.h), from the node `first` to the node `last`.
bool ggml_metal_router_supported(const ggml_cgraph * gf, int first, int last);

void ggml_metal_router_encode(ggml_metal_library_t lib,
                              ggml_metal_encoder_t enc,
                              const ggml_tensor *  scores,
                              const ggml_tensor *  biased,
                              const ggml_tensor *  get_rows,
                              const ggml_tensor *  clamp,
                              const ggml_tensor *  weights);

// One or two ADDs, RMS_NORM, MUL by the norm's weights: `n` nodes with these indices. The sum is a result, too.
bool ggml_metal_add_norm_supported(const ggml_cgraph * gf, const int * node_idxs, int n);

// first: nullptr if there is one ADD.
void ggml_metal_add_norm_encode(ggml_metal_library_t lib,
                                ggml_metal_encoder_t enc,
                                const ggml_tensor *  first,
                                const ggml_tensor *  add,
                                const ggml_tensor *  norm,
                                const ggml_tensor *  mul);
