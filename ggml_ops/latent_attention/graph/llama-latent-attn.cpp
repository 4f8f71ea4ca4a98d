#include "llama-latent-attn.h"

#include "ggml-latent-attn.h"
#include "ggml-op-marks.h"
#include "llama-adapter.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-latent-inputs.h"
#include "llama-latent-place.h"
#include "llama-latent-plain.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>

// The number of queries per stream from which the decompressed form is faster than the absorbed form with its matmuls
// by k_b and v_b. Expanding a key costs as much as its attention for hundreds of queries; the fewer keys there are,
// the larger the share of those matmuls. See README.md.
struct Threshold {
    int64_t n_keys;  // maximum n_keys of this row
    int64_t f32;
    int64_t halves;  // F16, BF16, and all types without their own field
    int64_t codes;   // Q8_0, Q4_0
};

// Measured. With Q8_0 and Q4_0 an absorbed pair costs less, because it is computed in integers (latent-int16).
static constexpr Threshold CPU[] = {
    { 512, 96, 96, 112 },
    { 1536, 128, 128, 192 },
    { 6144, 160, 160, 256 },
    { INT64_MAX, 160, 160, 288 },
};

// NVIDIA's devices for data centres, and GeForce. Computed, not measured, from multiply-adds and bytes of each matmul. 496,
// and 2048 for a GeForce, are from a cycle model of the compiled kernels and larger than that count. Only 176 was checked on
// a device (H200: slower at 128 queries, faster at 192). Commit d90d8139 has both computations. `exact` (KIMI_OPS) is for
// F16 and BF16 caches. Where there is no ubatch as large, the number does not matter.
struct CudaThreshold {
    int64_t n_keys;
    struct {
        int64_t f32;
        int64_t exact;
        int64_t halves;  // F16, BF16
        int64_t codes;   // Q8_0, Q4_0
    } data_centre, geforce;
};

static constexpr CudaThreshold CUDA[] = {
    { 512, { 528, 496, 320, 320 }, { 528, 528, 2048, 2048 } },
    { 2048, { 624, 496, 256, 256 }, { 2064, 2064, 2048, 2048 } },
    { INT64_MAX, { 528, 496, 176, 176 }, { 131088, 4080, 2048, 2048 } },
};

// A block computes 128 queries of one head. Fewer heads than those of the count fill a device with more queries (computed,
// not measured). No published model of these architectures has fewer than 16.
static constexpr int64_t COUNTED_HEADS = 32, FEWEST_HEADS = 16, FULL_ANYWHERE = 2048;

static int64_t with_heads(int64_t n_queries, int64_t n_head) {
    if (n_head < FEWEST_HEADS || n_head >= COUNTED_HEADS) {
        return n_queries;
    }
    return std::max(n_queries, std::min(n_queries * COUNTED_HEADS / n_head, FULL_ANYWHERE));
}

template <typename T, size_t N> static int row_of(const T (&table)[N], int64_t n_keys) {
    const auto less = [](const T & row, int64_t n) { return row.n_keys < n; };
    return (int) (std::lower_bound(std::begin(table), std::end(table), n_keys, less) - std::begin(table));
}

static int64_t min_queries_on_cpu(ggml_type type, const Threshold & row) {
    switch (type) {
    case GGML_TYPE_F32:
        return row.f32;
    case GGML_TYPE_Q8_0:
    case GGML_TYPE_Q4_0:
        return row.codes;
    default:
        return row.halves;
    }
}

static int64_t min_queries_on_cuda(ggml_type type, const CudaThreshold & row, bool exact, bool fast_sums) {
    const auto & device = fast_sums ? row.data_centre : row.geforce;
    switch (type) {
    case GGML_TYPE_F32:
        return device.f32;
    case GGML_TYPE_F16:
    case GGML_TYPE_BF16:
        return exact ? device.exact : device.halves;
    default:
        return device.codes;
    }
}

namespace {

// The numbers of queries from which a layer is decompressed: for n_keys, and the smallest for any number of keys. `below`:
// the largest number of queries that is not decompressed, for up to n_keys keys; the keys include the queries.
struct Enough {
    int64_t here;
    int64_t anywhere;
    int64_t below;
};

}  // namespace

template <typename T, size_t N, typename F>
static Enough look_up(const T (&table)[N], int64_t n_keys, const F & queries) {
    const int chosen = row_of(table, n_keys);
    Enough    enough = { queries(table[chosen]), INT64_MAX, 0 };
    for (int i = 0; i < (int) N; ++i) {
        const int64_t enough_here = queries(table[i]);
        enough.anywhere           = std::min(enough.anywhere, enough_here);
        if (i <= chosen) {
            enough.below = std::max(enough.below, std::min(enough_here - 1, table[i].n_keys));
        }
    }
    return enough;
}

// n_keys: those of a sequence.
static Enough min_queries(const ggml_tensor * cache, int64_t n_keys, int64_t n_head, bool exact) {
    if (!llama_latent_attn_on_cuda(cache)) {
        return look_up(CPU, n_keys, [&](const Threshold & row) { return min_queries_on_cpu(cache->type, row); });
    }
    const bool fast_sums = llama_latent_attn_fast_sums(cache);
    return look_up(CUDA, n_keys, [&](const CudaThreshold & row) {
        return with_heads(min_queries_on_cuda(cache->type, row, exact, fast_sums), n_head);
    });
}

// The cache in the layout of the operator: [n_cache, n_keys, 1, n_stream].
static ggml_tensor * cache_of(const llm_graph_context & g, const llm_graph_input_attn_k * inp, int il) {
    return ggml_permute(g.ctx0, inp->mctx->get_k(g.ctx0, il), 0, 2, 1, 3);
}

// q [n_key, n_head, n_tokens] in the layout of the operator: [n_key, n_tokens of one stream, n_head, n_stream].
static ggml_tensor * by_stream(ggml_context * ctx, ggml_tensor * q, int64_t n_stream) {
    const int64_t n_tokens = q->ne[2] / n_stream;
    q = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], n_tokens, n_stream, q->nb[1], q->nb[2], q->nb[2] * n_tokens, 0);
    return ggml_permute(ctx, q, 0, 2, 1, 3);
}

// The keys of the only sequence of the ubatch, which must have tokens next to each other; else 0.
static int64_t own_keys(const llama_ubatch & ubatch) {
    if (!ubatch.equal_seqs() || ubatch.n_seqs != 1) {
        return 0;
    }
    const int64_t n_keys = *std::max_element(ubatch.pos, ubatch.pos + ubatch.n_tokens) + 1;
    return n_keys < ubatch.n_tokens ? 0 : n_keys;  // 0: the ubatch that memory is reserved with has no positions
}

int llama_latent_attn_row(const llama_ubatch & ubatch) {
    const int64_t n_keys = own_keys(ubatch);
    return row_of(CPU, n_keys) * (int) std::size(CUDA) + row_of(CUDA, n_keys);
}

// The LATENT_ATTN of this layer.
static ggml_tensor * operator_of(const llm_graph_context &      g,
                                 const llm_graph_input_attn_k * inp,
                                 const llama_layer &            layer,
                                 ggml_tensor *                  q,
                                 float                          kq_scale,
                                 int                            il) {
    ggml_tensor * k = cache_of(g, inp, il);
    return ggml_latent_attn(g.ctx0, by_stream(g.ctx0, q, k->ne[3]), k, layer.wk_b, layer.wv_b, inp->get_kq_mask(),
                            kq_scale);
}

// How to compute the attention of many queries.
enum class Form { ABSORBED, OPERATOR, PLAIN };

// node: the LATENT_ATTN of the layer. ABSORBED: no other form can be used; `why` is the reason. PLAIN: `why` is the
// reason against OPERATOR.
static Form form_of(const ggml_tensor * node, std::string & why) {
    why = llama_latent_attn_obstacle(node);
    if (why.empty()) {
        return Form::OPERATOR;
    }
    const std::string also = llama_latent_plain_obstacle(node);
    if (also.empty()) {
        return Form::PLAIN;
    }
    why += "; no plain graph: " + also;
    return Form::ABSORBED;
}

static void say_once(std::atomic<bool> & said, const std::string & text) {
    if (!said.exchange(true)) {
        LLAMA_LOG_WARN("latent attention: %s\n", text.c_str());
    }
}

// Whether nodes that multiply by these weights are needed, because somebody observes them or adapters are added to them.
static bool needs_matmuls(const llm_graph_context & g, std::initializer_list<ggml_tensor *> weights) {
    const auto has_adapter = [&](const auto & adapter) {
        return std::any_of(weights.begin(), weights.end(),
                           [&](ggml_tensor * w) { return adapter.first->get_weight(w); });
    };
    return g.cparams.cb_eval || std::any_of(g.loras->begin(), g.loras->end(), has_adapter);
}

bool llama_latent_attn_wanted(const llm_graph_context &      g,
                              const llm_graph_input_attn_k * inp,
                              const llama_layer &            layer,
                              int                            il) {
    const llama_kimi_ops & ops = g.cparams.kimi_ops;
    if (!layer.wk_b || !layer.wv_b || !g.cparams.flash_attn || !ops.mla || ops.absorbed ||
        needs_matmuls(g, { layer.wk_b, layer.wv_b })) {
        return false;
    }
    ggml_tensor * k         = cache_of(g, inp, il);
    const bool    equal     = g.ubatch.equal_seqs();
    const int64_t n_queries = equal ? g.ubatch.n_seq_tokens : g.n_tokens / k->ne[3];
    const int64_t n_own     = own_keys(g.ubatch);
    const int64_t n_keys    = n_own > 0 ? n_own : k->ne[1];
    const Enough  enough    = min_queries(k, n_keys, layer.wk_b->ne[2], ops.exact);
    if (n_queries < enough.anywhere) {
        return false;
    }

    const int64_t            n_key = layer.wk_b->ne[0] + k->ne[0] - layer.wk_b->ne[1];
    ggml_tensor *            q     = ggml_new_tensor_3d(g.ctx0, GGML_TYPE_F32, n_key, layer.wk_b->ne[2], g.n_tokens);
    std::string              why;
    const Form               form = form_of(operator_of(g, inp, layer, q, 1.0f, il), why);
    static std::atomic<bool> said_plain{ false };
    static std::atomic<bool> said_absorbed{ false };
    const std::string        where = "layer " + std::to_string(il);
    switch (form) {
    case Form::OPERATOR:
        return n_queries >= enough.here;
    case Form::PLAIN:
        if (!ops.plain || !inp->latent.own) {
            return false;
        }
        say_once(said_plain, where + " uses matmuls and flash attention in large batches: " + why);
        return n_queries >= llama_latent_plain_min_queries(k, inp->latent.own->ne[0]);
    case Form::ABSORBED:
        break;
    }
    if (ops.require) {
        throw std::runtime_error("KIMI_OPS=require: " + where + ": decompressed latent attention: " + why);
    }
    say_once(said_absorbed, where + " stays absorbed in large batches: " + why);
    return false;
}

uint32_t llama_latent_attn_max_absorbed(ggml_cgraph * graph, uint32_t n_seqs) {
    int64_t most = 0;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        const ggml_tensor * k    = node->src[1];
        if (node->op == GGML_OP_LATENT_ATTN) {
            const bool    exact  = ggml_op_has_mark(node, GGML_OP_MARK_EXACT);
            const int64_t n_head = node->src[0]->ne[2];
            most                 = std::max(most, min_queries(k, k->ne[1], n_head, exact).below * k->ne[3]);
        } else if (llama_latent_plain_has(node)) {
            // a sequence with more cells than it can expand is absorbed
            most = std::max<int64_t>(most, k->ne[1] == LLAMA_LATENT_PLAIN_MAX_CELLS
                                               ? UINT32_MAX
                                               : llama_latent_plain_min_queries(k, k->ne[1]) - 1);
        } else {
            continue;
        }
        most = std::max<int64_t>(most, (LLAMA_MANY_TOKENS - 1) * n_seqs);
    }
    return most;
}

ggml_tensor * llama_latent_attn(const llm_graph_context & g,
                                llm_graph_input_attn_k *  inp,
                                const llama_layer &       layer,
                                ggml_tensor *             q,
                                ggml_tensor *             k_cur,
                                float                     kq_scale,
                                int                       il) {
    ggml_build_forward_expand(g.gf, q);
    ggml_build_forward_expand(g.gf, k_cur);
    ggml_build_forward_expand(g.gf, inp->mctx->cpy_k(g.ctx0, k_cur, inp->get_k_idxs(), il));

    std::string   why;
    ggml_tensor * cur = operator_of(g, inp, layer, q, kq_scale, il);
    if (form_of(cur, why) == Form::PLAIN) {
        cur = llama_latent_plain(g.ctx0, g.gf, cur, inp->latent.own, inp->latent.own_mask);
    } else {
        if (inp->latent.order && inp->latent.order->ne[1] == cur->ne[3]) {
            inp->latent.attach_order(g.gf, cur);
        }
        g.cb(cur, "latent_attn", il);
    }
    return ggml_reshape_2d(g.ctx0, cur, cur->ne[0] * cur->ne[1], cur->ne[2] * cur->ne[3]);
}
