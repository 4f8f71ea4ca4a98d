#pragma once

// The switch KIMI_OPS: which of the kimi operators graphs may use.
//
//   unset                 all of them, each where its device has it; upstream's graph elsewhere
//   off                   none: upstream's graph
//   conv,scan,mla,moe,fuse  those named; ggml-cpu looks for `fuse` itself, once (fusion)
//   require               with or without names: an operator that cannot be used is an error

struct llama_kimi_ops {
    bool conv    = true;
    bool scan    = true;
    bool mla     = true;
    bool moe     = true;
    bool fuse    = true;
    bool require = false;
};

// text: the value of KIMI_OPS, or nullptr. Throws std::runtime_error that names the part it does not know.
llama_kimi_ops llama_kimi_ops_parse(const char * text);

// of the environment; read at every call
llama_kimi_ops llama_kimi_ops_from_env();
