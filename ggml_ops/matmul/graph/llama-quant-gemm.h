#pragma once

struct ggml_cgraph;

// Marks the products of a new graph for upstream's own paths where KIMI_OPS does not have `moe`.
void llama_quant_gemm_apply_switch(ggml_cgraph * graph);
