// Which run of nodes may begin where.

#include "node-fusion.h"

#include "node-fusion-impl.h"

#include <cstdlib>
#include <cstring>

namespace node_fusion {

static bool switched_on() {
    const char * text = getenv("KIMI_OPS");
    if (text == nullptr) {
        return true;
    }
    bool names = false;
    for (const char * part = text; *part != '\0';) {
        const size_t n = strcspn(part, ",");
        if (n == 4 && strncmp(part, "fuse", n) == 0) {
            return true;
        }
        names = names || (n > 0 && !(n == 7 && strncmp(part, "require", n) == 0));
        part += n + (part[n] == ',');
    }
    return !names;
}

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
    static const bool on = node_fusion::switched_on();
    if (!on || ggml_is_empty(cgraph->nodes[node_n])) {  // a batch without outputs leaves its last layer empty
        return 0;
    }
    for (const auto & run : node_fusion::RUNS) {
        if (cgraph->nodes[node_n]->op == run.first) {
            return run.run(cgraph, node_n, params);
        }
    }
    return 0;
}
