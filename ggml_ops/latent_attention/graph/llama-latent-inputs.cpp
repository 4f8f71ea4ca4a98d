#include "llama-latent-inputs.h"

#include "ggml-backend.h"
#include "ggml-latent-attn.h"
#include "llama-cparams.h"
#include "llama-kv-cache.h"
#include "llama-kv-cells.h"
#include "llama-latent-attn.h"
#include "llama-latent-place.h"
#include "llama-latent-plain.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>
#include <vector>

// Lists the cells of a sequence; false if they are not in the order of positions.
static bool list_cells(const llama_kv_cells & cells, llama_seq_id seq, int64_t n_kv, std::vector<int32_t> & list) {
    list.reserve(cells.seq_pos_get(seq).size());
    llama_pos last = -1;
    for (int64_t i = 0; i < n_kv; ++i) {
        if (cells.is_empty(i) || !cells.seq_has(i, seq)) {
            continue;
        }
        const llama_pos pos = cells.pos_get(i);
        if (pos < last) {
            return false;
        }
        last = pos;
        list.push_back((int32_t) i);
    }
    return true;
}

// The cells of all sequences of tokens [first, end), ordered by position. There are several sequences only if they share
// tokens.
static std::vector<int32_t> ordered_cells(
    const llama_ubatch & ubatch, int64_t first, int64_t end, const llama_kv_cache_context * mctx, int64_t n_kv) {
    std::set<llama_seq_id> seqs;
    for (int64_t i = first; i < end; ++i) {
        seqs.insert(ubatch.seq_id[i][0]);
    }
    std::vector<int32_t> list;
    if (seqs.size() == 1 && list_cells(mctx->get_cells(*seqs.begin()), *seqs.begin(), n_kv, list)) {
        return list;
    }
    std::set<std::pair<llama_pos, uint32_t>> sorted;
    for (const llama_seq_id seq : seqs) {
        const auto & more = mctx->get_cells(seq).seq_pos_get(seq);
        sorted.insert(more.begin(), more.end());
    }
    list.clear();
    for (const auto & [pos, cell] : sorted) {
        list.push_back((int32_t) cell);
    }
    return list;
}

// The length of `own`: the number of the sequence's cells, padded as n_kv is. 0 if the plain graph cannot be used.
static int64_t
count_own(const llama_ubatch & ubatch, const llama_cparams & cparams, const llama_kv_cache_context * mctx) {
    if (!cparams.flash_attn || !cparams.kimi_ops.mla || !cparams.kimi_ops.plain || ubatch.n_seqs_unq != 1 ||
        ubatch.n_tokens < LLAMA_LATENT_PLAIN_MIN_QUERIES) {
        return 0;
    }
    const int64_t          n_kv  = mctx->get_n_kv();
    const llama_seq_id     seq   = ubatch.seq_id_unq[0];
    const llama_kv_cells & cells = mctx->get_cells(seq);
    const int64_t          n     = cells.seq_pos_get(seq).size();
    const llama_pos        last  = *std::max_element(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    // memory is being reserved if the tokens are not in the cache
    if (n < ubatch.n_tokens || cells.seq_pos_max(seq) != last) {
        return std::min(n_kv, LLAMA_LATENT_PLAIN_MAX_CELLS);
    }
    return n <= LLAMA_LATENT_PLAIN_MAX_CELLS ? std::min<int64_t>(n_kv, GGML_PAD(n, 256)) : 0;
}

void llama_latent_inputs::build(ggml_context *                 ctx,
                                const llama_ubatch &           ubatch,
                                const llama_cparams &          cparams,
                                const llama_kv_cache_context * mctx) {
    row = llama_latent_attn_row(ubatch);
    if (ubatch.equal_seqs() && cparams.flash_attn && cparams.kimi_ops.mla && cparams.kimi_ops.batch) {
        order = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, mctx->get_n_kv(), ubatch.n_seqs);
        ggml_set_input(order);
        ggml_set_name(order, "latent_order");
    }
    if (const int64_t n_own = count_own(ubatch, cparams, mctx); n_own > 0) {
        own = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_own);
        ggml_set_input(own);
        ggml_set_name(own, "latent_own");
        own_mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_own, ubatch.n_tokens);
        ggml_set_input(own_mask);
        ggml_set_name(own_mask, "latent_own_mask");
    }
}

static void set_order(ggml_tensor * order, const llama_ubatch & ubatch, const llama_kv_cache_context * mctx) {
    const int64_t n_kv     = order->ne[0];
    const int64_t n_tokens = ubatch.n_tokens / order->ne[1];
    for (int64_t s = 0; s < order->ne[1]; ++s) {
        const std::vector<int32_t> cells = ordered_cells(ubatch, s * n_tokens, (s + 1) * n_tokens, mctx, n_kv);
        int32_t *                  list  = (int32_t *) order->data + s * n_kv;
        std::fill(std::copy(cells.begin(), cells.end(), list), list + n_kv, -1);
    }
}

static void set_own(ggml_tensor *                  own,
                    ggml_tensor *                  own_mask,
                    const llama_ubatch &           ubatch,
                    const llama_kv_cache_context * mctx,
                    bool                           causal) {
    const std::vector<int32_t> list = ordered_cells(ubatch, 0, ubatch.n_tokens, mctx, mctx->get_n_kv());
    GGML_ASSERT(!list.empty() && (int64_t) list.size() <= own->ne[0]);
    int32_t * to = (int32_t *) own->data;
    std::fill(std::copy(list.begin(), list.end(), to), to + own->ne[0], list.back());

    const llama_kv_cells & cells = mctx->get_cells(ubatch.seq_id_unq[0]);
    std::vector<llama_pos> positions;
    for (const int32_t cell : list) {
        positions.push_back(cells.pos_get(cell));
    }
    const ggml_fp16_t visible = ggml_fp32_to_fp16(0.0f);
    const ggml_fp16_t hidden  = ggml_fp32_to_fp16(-INFINITY);
    for (int64_t i = 0; i < own_mask->ne[1]; ++i) {
        const auto end = causal ? std::upper_bound(positions.begin(), positions.end(), ubatch.pos[i]) : positions.end();
        ggml_fp16_t * row = (ggml_fp16_t *) own_mask->data + i * own_mask->ne[0];
        std::fill(std::fill_n(row, end - positions.begin(), visible), row + own_mask->ne[0], hidden);
    }
}

// Tensors that no node uses have no memory.
static bool is_used(const ggml_tensor * input) {
    return input != nullptr && input->buffer != nullptr;
}

void llama_latent_inputs::set(const llama_ubatch &           ubatch,
                              const llama_kv_cache_context * mctx,
                              const llama_cparams &          cparams) const {
    if (is_used(order)) {
        GGML_ASSERT(ggml_backend_buffer_is_host(order->buffer));
        set_order(order, ubatch, mctx);
    }
    if (is_used(own)) {
        GGML_ASSERT(ggml_backend_buffer_is_host(own->buffer) && ggml_backend_buffer_is_host(own_mask->buffer));
        set_own(own, own_mask, ubatch, mctx, cparams.causal_attn);
    }
}

bool llama_latent_inputs::can_reuse(const llama_ubatch &           ubatch,
                                    const llama_cparams &          cparams,
                                    const llama_kv_cache_context * mctx) const {
    if (row < 0) {
        return true;
    }
    // a plain graph that no layer uses does not have to fit
    const int64_t n     = count_own(ubatch, cparams, mctx);
    const int64_t n_own = own != nullptr ? own->ne[0] : 0;
    const bool    same  = n == n_own || (n > 0 && n_own > 0 && !is_used(own));
    return same && row == llama_latent_attn_row(ubatch);
}

void llama_latent_inputs::attach_order(ggml_cgraph * graph, ggml_tensor * node) const {
    if (order != nullptr && llama_latent_attn_on_cpu(node->src[1])) {
        ggml_build_forward_expand(graph, order);
        node->src[GGML_LATENT_ORDER_SRC] = order;
    }
}

void llama_latent_inputs::attach_order(ggml_cgraph * graph) const {
    for (int i = ggml_graph_n_nodes(graph) - 1; order != nullptr && i >= 0; --i) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            attach_order(graph, node);
            return;
        }
    }
}
