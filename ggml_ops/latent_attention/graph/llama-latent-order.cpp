#include "llama-latent-order.h"

#include "ggml-latent-attn.h"
#include "llama-cparams.h"
#include "llama-kv-cells.h"
#include "llama-latent-place.h"

#include <algorithm>
#include <set>
#include <utility>

ggml_tensor *
llama_latent_order(ggml_context * ctx, const llama_ubatch & ubatch, const llama_cparams & cparams, int64_t n_kv) {
    if (!ubatch.equal_seqs() || !cparams.flash_attn || !cparams.kimi_ops.mla || !cparams.kimi_ops.batch) {
        return nullptr;
    }
    ggml_tensor * order = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_kv, ubatch.n_seqs);
    ggml_set_input(order);
    ggml_set_name(order, "latent_order");
    return order;
}

// Lists the cells of a sequence; returns their number, or -1 if the cells are not in the order of positions.
static int64_t list_cells(const llama_kv_cells & cells, llama_seq_id seq, int64_t n_kv, int32_t * list) {
    int64_t   n    = 0;
    llama_pos last = -1;
    for (int64_t i = 0; i < n_kv; ++i) {
        if (cells.is_empty(i) || !cells.seq_has(i, seq)) {
            continue;
        }
        const llama_pos pos = cells.pos_get(i);
        if (pos < last) {
            return -1;
        }
        last      = pos;
        list[n++] = (int32_t) i;
    }
    return n;
}

void llama_latent_order_set(ggml_tensor *                                               order,
                            const llama_ubatch &                                        ubatch,
                            const std::function<const llama_kv_cells &(llama_seq_id)> & cells_of) {
    const int64_t n_kv     = order->ne[0];
    const int64_t n_tokens = ubatch.n_tokens / order->ne[1];
    for (int64_t s = 0; s < order->ne[1]; ++s) {
        int32_t *              list = (int32_t *) order->data + s * n_kv;
        std::set<llama_seq_id> seqs;  // more than one if sequences share tokens
        for (int64_t i = s * n_tokens; i < (s + 1) * n_tokens; ++i) {
            seqs.insert(ubatch.seq_id[i][0]);
        }
        const llama_seq_id first = *seqs.begin();
        int64_t            n     = seqs.size() == 1 ? list_cells(cells_of(first), first, n_kv, list) : -1;
        if (n < 0) {
            std::set<std::pair<llama_pos, uint32_t>> sorted;
            for (const llama_seq_id seq : seqs) {
                const auto & more = cells_of(seq).seq_pos_get(seq);
                sorted.insert(more.begin(), more.end());
            }
            n = 0;
            for (const auto & [pos, cell] : sorted) {
                list[n++] = (int32_t) cell;
            }
        }
        std::fill(list + n, list + n_kv, -1);
    }
}

void llama_latent_order_attach(ggml_cgraph * graph, ggml_tensor * order, ggml_tensor * node) {
    if (order != nullptr && llama_latent_attn_on_cpu(node->src[1])) {
        ggml_build_forward_expand(graph, order);
        node->src[GGML_LATENT_ORDER_SRC] = order;
    }
}

void llama_latent_order_attach(ggml_cgraph * graph, ggml_tensor * order) {
    for (int i = ggml_graph_n_nodes(graph) - 1; i >= 0; --i) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            llama_latent_order_attach(graph, order, node);
            return;
        }
    }
}
