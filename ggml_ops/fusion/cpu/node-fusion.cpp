// Which run of nodes may begin where.

#include "node-fusion.h"

#include "ggml-op-marks.h"
#include "node-fusion-impl.h"

namespace node_fusion {

static const struct {
    ggml_op first;
    int (*run)(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params);
} RUNS[] = {
    { GGML_OP_UNARY, router },
    { GGML_OP_MUL, expert_sum },
    { GGML_OP_MUL_MAT, products },
};

}  // namespace node_fusion

int ggml_cpu_fuse_nodes(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params) {
    const ggml_tensor * node = cgraph->nodes[node_n];
    if (ggml_is_empty(node) || ggml_op_has_mark(node, GGML_OP_MARK_UNFUSED)) {
        return 0;  // without outputs, the last layer of a batch is empty
    }
    for (const auto & run : node_fusion::RUNS) {
        if (node->op == run.first) {
            return run.run(cgraph, node_n, params);
        }
    }
    return 0;
}
