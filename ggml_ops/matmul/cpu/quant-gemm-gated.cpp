// Gate and up of a feed-forward layer and the SwiGLU of both, matched when the first of them is about to run. The
// activations are packed once, and the results of gate and up are never written to memory. The graph is unchanged.

#include "ggml-impl.h"
#include "quant-gemm.h"

int ggml_quant_gemm_gated(const ggml_cgraph * cgraph, int node_n, const ggml_compute_params * params) {
    const ggml_op op = cgraph->nodes[node_n]->op;
    if ((op != GGML_OP_MUL_MAT && op != GGML_OP_MUL_MAT_ID) || node_n + 2 >= cgraph->n_nodes) {
        return 0;
    }
    const ggml_op ops[]    = { op, op, GGML_OP_GLU };
    const int     output[] = { node_n + 2 };
    if (!ggml_can_fuse_subgraph(cgraph, node_n, 3, ops, output, 1)) {
        return 0;
    }
    ggml_tensor *       swiglu = cgraph->nodes[node_n + 2];
    const ggml_tensor * gate   = swiglu->src[0];
    const ggml_tensor * up     = swiglu->src[1];
    const ggml_tensor * first  = cgraph->nodes[node_n];
    const ggml_tensor * second = cgraph->nodes[node_n + 1];
    const bool          pair   = (gate == first && up == second) || (gate == second && up == first);
    if (!pair || ggml_get_glu_op(swiglu) != GGML_GLU_OP_SWIGLU || ggml_is_empty(swiglu)) {
        return 0;
    }
    const bool alike = gate->src[1] == up->src[1] && gate->src[2] == up->src[2] &&
                       gate->src[0]->type == up->src[0]->type && ggml_are_same_shape(gate->src[0], up->src[0]) &&
                       swiglu->type == GGML_TYPE_F32 && swiglu->nb[0] == sizeof(float);
    if (!alike) {
        return 0;
    }
    const quant_gemm_layout layout = ggml_quant_gemm_layout(gate);
    if (layout != ggml_quant_gemm_layout(up)) {
        return 0;
    }
    return ggml_compute_forward_quant_gemm_gated(params, gate, up, swiglu, layout) ? 2 : 0;
}
