#pragma once

// The environment variable KIMI_OPS selects which of the project's operators a context may use. It is read when a
// context is created; an unknown name makes that call fail. ggml sees the choice only as marks on nodes
// (ggml-op-marks.h), so contexts of one process may use different values.
//
//   unset or empty  all operators, each where its device supports it; upstream's graph elsewhere
//   off             no operators: upstream's graph
//   names           only these, separated by commas: the fields of llama_kimi_ops
//   require         alone or with names: an operator that cannot be used is an error
//   exact           alone or with names: latent attention on CUDA with the accuracy of float32, slower

#include <cstdint>

struct ggml_cgraph;
struct llama_ubatch;

// A sequence with fewer tokens in a batch may share a ubatch with others. Its results are equal to those of its
// tokens decoded one after the other, whatever other sequences are in the ubatch.
constexpr uint32_t LLAMA_MANY_TOKENS = 32;

struct llama_kimi_ops {
    bool conv    = true;  // KDA_CONV
    bool scan    = true;  // KDA_SCAN
    bool mla     = true;  // LATENT_ATTN, and FLASH_ATTN_EXT over the latent cache
    bool matmul  = true;  // matmuls on the CPU, and of one column on CUDA
    bool fuse    = true;  // fusion of nodes
    bool batch   = true;  // results independent of other sequences
    bool plain   = true;  // with mla: the plain graph instead of LATENT_ATTN
    bool require = false;
    bool exact   = false;

    bool absorbed = false;  // not a name: latent attention stays absorbed, while memory is reserved for that
};

// Parses the value of KIMI_OPS, which may be nullptr. Throws std::runtime_error for an unknown name, and for `off`
// together with other values.
llama_kimi_ops llama_kimi_ops_parse(const char * text);

// Parses the value in the environment.
llama_kimi_ops llama_kimi_ops_from_env();

// Marks those nodes of a new graph that must use upstream's code according to `ops`, and the matmuls of a ubatch that
// sequences share.
void llama_kimi_ops_mark(ggml_cgraph * graph, const llama_kimi_ops & ops, const llama_ubatch & ubatch);
