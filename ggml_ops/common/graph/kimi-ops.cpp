#include "kimi-ops.h"

#include "ggml-op-marks.h"
#include "ggml.h"
#include "llama-batch.h"
#include "llama-impl.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

llama_kimi_ops llama_kimi_ops_parse(const char * text) {
    llama_kimi_ops all;
    if (text == nullptr || *text == '\0') {
        return all;
    }

    llama_kimi_ops picked = { false, false, false, false, false, false, false, false, false };
    bool           any    = false;
    bool           is_off = false;
    const struct {
        const char * name;
        bool *       flag;
    } names[] = {
        { "conv", &picked.conv }, { "scan", &picked.scan },   { "mla", &picked.mla },     { "matmul", &picked.matmul },
        { "fuse", &picked.fuse }, { "batch", &picked.batch }, { "plain", &picked.plain },
    };

    std::istringstream parts(std::string(text) + ",");  // also an empty name at the end is read
    for (std::string part; std::getline(parts, part, ',');) {
        if (part == "off") {
            is_off = true;
            continue;
        }
        if (part == "require") {
            picked.require = true;
            continue;
        }
        if (part == "exact") {
            picked.exact = true;
            continue;
        }
        if (part == "moe") {  // its old name
            LLAMA_LOG_WARN("KIMI_OPS: 'moe' is now 'matmul'\n");
            part = "matmul";
        }
        bool known = false;
        for (const auto & n : names) {
            if (part == n.name) {
                *n.flag = known = any = true;
            }
        }
        if (!known) {
            std::string all_names = "off, ";
            for (const auto & n : names) {
                all_names += std::string(n.name) + ", ";
            }
            throw std::runtime_error("KIMI_OPS: '" + part + "' is none of " + all_names + "require, exact");
        }
    }
    if (is_off && (any || picked.require || picked.exact)) {
        throw std::runtime_error("KIMI_OPS: 'off' cannot be combined with other values");
    }
    if (!is_off && !any) {
        all.require = picked.require;
        all.exact   = picked.exact;
        return all;
    }
    return picked;
}

llama_kimi_ops llama_kimi_ops_from_env() {
    return llama_kimi_ops_parse(getenv("KIMI_OPS"));
}

void llama_kimi_ops_mark(ggml_cgraph * graph, const llama_kimi_ops & ops, const llama_ubatch & ubatch) {
    const bool shared = ubatch.equal_seqs() && ubatch.n_seq_tokens < LLAMA_MANY_TOKENS;
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node   = ggml_graph_node(graph, i);
        const bool    matmul = node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID;
        if ((matmul && !ops.matmul) || (node->op == GGML_OP_FLASH_ATTN_EXT && !ops.mla)) {
            ggml_op_set_mark(node, GGML_OP_MARK_UPSTREAM);
        }
        if (ops.exact && (node->op == GGML_OP_LATENT_ATTN || node->op == GGML_OP_FLASH_ATTN_EXT)) {
            ggml_op_set_mark(node, GGML_OP_MARK_EXACT);
        }
        if (matmul && ops.batch && shared) {
            ggml_op_set_mark(node, GGML_OP_MARK_INVARIANT);
        }
        if (!ops.fuse && ggml_op_starts_fused_run(node->op)) {
            ggml_op_set_mark(node, GGML_OP_MARK_UNFUSED);
        }
    }
}
