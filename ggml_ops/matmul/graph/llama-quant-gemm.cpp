#include "llama-quant-gemm.h"

#include "ggml-quant-gemm.h"
#include "ggml.h"
#include "kimi-ops.h"

void llama_quant_gemm_apply_switch(ggml_cgraph * graph) {
    if (llama_kimi_ops_from_env().moe) {
        return;
    }
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID) {
            ggml_quant_gemm_switch_off(node);
        }
    }
}
