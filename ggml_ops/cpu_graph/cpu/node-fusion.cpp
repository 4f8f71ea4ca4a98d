// The table of fused runs.

#include "node-fusion.h"

#include "ggml-op-marks.h"
#include "kda-cpu.h"
#include "node-fusion-impl.h"
#include "quant-gemm.h"

namespace node_fusion {

constexpr int ALWAYS = 0;

// Runs that start with the same operator are tried in this order.
static const struct {
    ggml_op first;
    int     mark;  // if set on the first node, the run is not fused
    int (*run)(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params);
} RUNS[] = {
    { GGML_OP_KDA_CONV, ALWAYS, ggml_kda_elide_state_copy },
    { GGML_OP_KDA_SCAN, ALWAYS, ggml_kda_elide_state_copy },
    { GGML_OP_MUL_MAT, GGML_OP_MARK_UPSTREAM, ggml_quant_gemm_gated },
    { GGML_OP_MUL_MAT_ID, GGML_OP_MARK_UPSTREAM, ggml_quant_gemm_gated },
    { GGML_OP_MUL_MAT, GGML_OP_MARK_UNFUSED, products },
    { GGML_OP_UNARY, GGML_OP_MARK_UNFUSED, router },
    { GGML_OP_MUL, GGML_OP_MARK_UNFUSED, expert_sum },
};

}  // namespace node_fusion

int ggml_cpu_fuse_nodes(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params) {
    const ggml_tensor * node = cgraph->nodes[node_n];
    if (ggml_is_empty(node)) {
        return 0;  // without outputs, the last layer of a batch is empty
    }
    for (const auto & run : node_fusion::RUNS) {
        if (node->op == run.first && !ggml_op_has_mark(node, (ggml_op_mark) run.mark)) {
            const int n_fused = run.run(cgraph, node_n, params);
            if (n_fused > 0) {
                return n_fused;
            }
        }
    }
    return 0;
}
