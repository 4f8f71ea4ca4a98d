#pragma once

// The switch KIMI_OPS: which of this project's operators a context may use. It is read when a context is created; an
// unknown name fails that call. The choice reaches ggml only as marks on nodes (ggml-op-marks.h), so contexts of one
// process may differ in all of it.
//
//   unset                   all of them, each where its device supports it; upstream's graph elsewhere
//   off                     none: upstream's graph
//   conv,scan,mla,moe,fuse  only those named
//   require                 with or without names: an operator that cannot be used is an error

struct ggml_cgraph;

struct llama_kimi_ops {
    bool conv    = true;  // KDA_CONV
    bool scan    = true;  // KDA_SCAN
    bool mla     = true;  // LATENT_ATTN, and FLASH_ATTN_EXT over the latent cache
    bool moe     = true;  // matmuls with quantized weights on the CPU
    bool fuse    = true;  // nodes computed as one on the CPU
    bool require = false;
};

// text: the value of KIMI_OPS, or nullptr. Throws std::runtime_error that names the part it does not know.
llama_kimi_ops llama_kimi_ops_parse(const char * text);

// The value in the environment, parsed.
llama_kimi_ops llama_kimi_ops_from_env();

// Marks the nodes of a new graph for which `ops` excludes a path of this project.
void llama_kimi_ops_mark(ggml_cgraph * graph, const llama_kimi_ops & ops);
