// Included by ggml-metal-fusion.cpp, before its table of fusions: our runs of nodes, and the checks of each.

#pragma once

#include "ggml-metal-fuse.h"
#include "ggml-metal-kda.h"

// KDA_CONV/KDA_SCAN + CPY: as for GATED_DELTA_NET. the rows of the cache that the sequences continue are data, so the
// kernel itself handles those that another sequence writes
static bool ggml_metal_fusion_check_kda_cache(const ggml_metal_fusion *   fusion,
                                              const ggml_tensor * const * nodes,
                                              const ggml_cgraph *         gf,
                                              const int *                 node_idxs,
                                              int                         idx,
                                              ggml_metal_fusion_mode      mode) {
    GGML_UNUSED(fusion);
    GGML_UNUSED(mode);

    return ggml_metal_kda_elides(gf, node_idxs[idx], nodes[1]);
}

// SIGMOID + ADD + ARGSORT + GET_ROWS + SUM_ROWS + CLAMP + DIV + SCALE for MoE routing with a selection bias.
static const std::vector<ggml_op> ops_router = { GGML_OP_UNARY, GGML_OP_RESHAPE,  GGML_OP_ADD,     GGML_OP_ARGSORT,
                                                 GGML_OP_VIEW,  GGML_OP_GET_ROWS, GGML_OP_RESHAPE, GGML_OP_SUM_ROWS,
                                                 GGML_OP_CLAMP, GGML_OP_DIV,      GGML_OP_RESHAPE, GGML_OP_SCALE };

static bool ggml_metal_fusion_check_router(const ggml_metal_fusion *   fusion,
                                           const ggml_tensor * const * nodes,
                                           const ggml_cgraph *         gf,
                                           const int *                 node_idxs,
                                           int                         idx,
                                           ggml_metal_fusion_mode      mode) {
    GGML_UNUSED(nodes);
    GGML_UNUSED(mode);

    return ggml_metal_router_supported(gf, node_idxs[idx], node_idxs[idx + (int) fusion->ops.size() - 1]);
}

static const std::vector<ggml_op> ops_add_norm_1 = { GGML_OP_ADD, GGML_OP_RMS_NORM, GGML_OP_MUL };
static const std::vector<ggml_op> ops_add_norm_2 = { GGML_OP_ADD, GGML_OP_ADD, GGML_OP_RMS_NORM, GGML_OP_MUL };

static bool ggml_metal_fusion_check_add_norm(const ggml_metal_fusion *   fusion,
                                             const ggml_tensor * const * nodes,
                                             const ggml_cgraph *         gf,
                                             const int *                 node_idxs,
                                             int                         idx,
                                             ggml_metal_fusion_mode      mode) {
    GGML_UNUSED(nodes);
    GGML_UNUSED(mode);

    return ggml_metal_add_norm_supported(gf, node_idxs + idx, (int) fusion->ops.size());
}

static const std::vector<ggml_op> ops_kda_conv_cache = { GGML_OP_KDA_CONV, GGML_OP_CPY };
static const std::vector<ggml_op> ops_kda_scan_cache = { GGML_OP_KDA_SCAN, GGML_OP_CPY };
