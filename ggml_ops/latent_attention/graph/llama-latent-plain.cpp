#include "llama-latent-plain.h"

#include "ggml-backend.h"
#include "ggml-latent-attn.h"
#include "ggml.h"
#include "llama-latent-place.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>

static constexpr char NAME[] = "latent_attn_plain";

// The sizes for which the thresholds were computed. The flash attention of most backends has no others of this kind.
static constexpr int64_t N_LATENT = 512;
static constexpr int64_t N_NOPE   = 128;
static constexpr int64_t N_ROPE   = 64;
static constexpr int64_t N_VALUE  = 128;

// Groups of heads: as few as keep the expanded keys and values below SCRATCH bytes, and at most MAX_GROUPS, because a
// graph has a limited number of nodes.
static constexpr int64_t SCRATCH    = 128 << 20;
static constexpr int64_t MAX_GROUPS = 16;

// Computed from the number of multiply-adds and bytes, not measured: see README.md.
struct Threshold {
    int64_t n_keys;  // maximum n_keys of this row
    int64_t f32;
    int64_t halves;  // all caches that are not F32 are expanded to F16
};

static constexpr Threshold PLAIN[] = {
    { 512, 336, LLAMA_LATENT_PLAIN_MIN_QUERIES },
    { 1536, 688, 336 },
    { 2048, 800, 352 },
    { 6144, 1200, 400 },
    { INT64_MAX, 1552, 432 },
};

int64_t llama_latent_plain_min_queries(const ggml_tensor * cache, int64_t n_keys) {
    const Threshold * t = std::begin(PLAIN);
    while (n_keys > t->n_keys) {
        ++t;
    }
    return cache->type == GGML_TYPE_F32 ? t->f32 : t->halves;
}

// The type of expanded keys and values.
static ggml_type type_of(const ggml_tensor * cache) {
    return cache->type == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
}

static ggml_tensor * cast(ggml_context * ctx, ggml_tensor * t, ggml_type type) {
    return t->type == type ? t : ggml_cast(ctx, t, type);
}

// The first n values from value `first` on of each row.
static ggml_tensor * columns(ggml_context * ctx, ggml_tensor * t, int64_t first, int64_t n) {
    return ggml_view_4d(ctx, t, n, t->ne[1], t->ne[2], t->ne[3], t->nb[1], t->nb[2], t->nb[3],
                        first * ggml_type_size(t->type));
}

// `n` of the matrices of t, from `first` on.
static ggml_tensor * heads(ggml_context * ctx, ggml_tensor * t, int64_t first, int64_t n) {
    return ggml_view_3d(ctx, t, t->ne[0], t->ne[1], n, t->nb[1], t->nb[2], first * t->nb[2]);
}

namespace {

// What all heads share.
struct Sources {
    ggml_tensor * q;
    ggml_tensor * mask;
    ggml_tensor * latent;  // F32 [n_latent, n_keys], the sequence's rows of the cache
    ggml_tensor * tail;    // [n_nope + n_rope, n_keys], the ends of these rows, in the type of keys
    ggml_tensor * k_b;     // [n_latent, n_nope, n_heads], not quantized
    ggml_tensor * v_b;     // [n_latent, n_value, n_heads], not quantized
    float         scale;
};

}  // namespace

static ggml_tensor * floats(ggml_context * ctx, ggml_tensor * weights) {
    return ggml_is_quantized(weights->type) ? ggml_cast(ctx, weights, GGML_TYPE_F32) : weights;
}

// All queries are of one sequence. If there are several streams, memory is being reserved: take the first.
static Sources prepare(ggml_context * ctx, const ggml_tensor * node, ggml_tensor * own, ggml_tensor * own_mask) {
    const ggml_latent_attn_shape s = ggml_latent_attn_get_shape(node);
    ggml_tensor *                q = node->src[0];
    ggml_tensor *                k = node->src[1];
    if (s.n_streams > 1) {
        q = ggml_view_3d(ctx, q, s.n_key, s.n_queries * s.n_streams, s.n_heads, q->nb[1], q->nb[2], 0);
    }
    k                  = ggml_view_2d(ctx, k, s.n_cache, s.n_keys, k->nb[1], 0);
    ggml_tensor * rows = ggml_get_rows(ctx, k, own);

    Sources sources;
    sources.q      = q;
    sources.mask   = own_mask;
    sources.latent = columns(ctx, rows, 0, s.n_latent);
    sources.tail   = cast(ctx, columns(ctx, rows, s.n_latent - s.n_nope, s.n_key), type_of(k));
    sources.k_b    = ggml_cont(ctx, ggml_transpose(ctx, floats(ctx, node->src[2])));
    sources.v_b    = floats(ctx, node->src[3]);
    memcpy(&sources.scale, node->op_params, sizeof(sources.scale));
    return sources;
}

// Multiplies the latent of each key with the weights of some heads. Returns F32 [values, n_keys, heads].
static ggml_tensor * expand(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * latent, int64_t first, int64_t n) {
    const int64_t n_values = weights->ne[1];
    weights                = heads(ctx, weights, first, n);
    weights                = ggml_reshape_2d(ctx, weights, weights->ne[0], n_values * n);
    ggml_tensor * all      = ggml_mul_mat(ctx, weights, latent);
    return ggml_view_3d(ctx, all, n_values, latent->ne[1], n, all->nb[1], n_values * all->nb[0], 0);
}

// The attention of n heads from `first` on: [n_value, n, n_queries].
static ggml_tensor * attend(ggml_context * ctx, const Sources & s, int64_t first, int64_t n) {
    // Each head gets a copy of the end of the row, which ends with the rope part, and then its own n_nope values.
    ggml_tensor * k      = ggml_repeat_4d(ctx, s.tail, s.tail->ne[0], s.tail->ne[1], n, 1);
    ggml_tensor * k_nope = expand(ctx, s.k_b, s.latent, first, n);
    ggml_tensor * filled = ggml_cpy(ctx, k_nope, columns(ctx, k, 0, k_nope->ne[0]));
    k                    = ggml_view_3d(ctx, filled, k->ne[0], k->ne[1], k->ne[2], k->nb[1], k->nb[2], 0);

    ggml_tensor * v   = cast(ctx, expand(ctx, s.v_b, s.latent, first, n), k->type);
    ggml_tensor * out = ggml_flash_attn_ext(ctx, heads(ctx, s.q, first, n), k, v, s.mask, s.scale, 0.0f, 0.0f);
    ggml_prec_set_acc(out, GGML_PREC_F32);
    ggml_set_name(out, NAME);
    return out;
}

std::string llama_latent_plain_obstacle(const ggml_tensor * node) {
    const ggml_latent_attn_shape s = ggml_latent_attn_get_shape(node);
    if (s.n_latent != N_LATENT || s.n_nope != N_NOPE || s.n_key != N_NOPE + N_ROPE || s.n_value != N_VALUE) {
        return "head sizes other than the 48B's";
    }
    std::string              why;
    const ggml_backend_dev_t dev = llama_latent_attn_holder(node, why);
    if (dev == nullptr || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return dev ? "the layer is on the CPU" : why;
    }
    if (strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") == 0) {
        return "llama.cpp does not ask a worker which of upstream's operators it has";
    }

    const size_t   n_nodes = 64;
    ggml_context * ctx =
        ggml_init({ n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr, true });
    ggml_cgraph * graph   = ggml_new_graph_custom(ctx, n_nodes, false);
    ggml_tensor * own     = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, s.n_keys);
    ggml_tensor * mask    = ggml_new_tensor_2d(ctx, node->src[4]->type, s.n_keys, s.n_queries * s.n_streams);
    Sources       sources = prepare(ctx, node, own, mask);
    // a tensor instead of q: the nodes that compute q are not checked
    sources.q         = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.n_key, s.n_queries * s.n_streams, s.n_heads);
    ggml_tensor * out = attend(ctx, sources, 0, 1);
    ggml_build_forward_expand(graph, ggml_concat(ctx, out, out, 1));
    for (int i = 0; i < ggml_graph_n_nodes(graph) && why.empty(); ++i) {
        const ggml_tensor * each = ggml_graph_node(graph, i);
        if (!ggml_backend_dev_supports_op(dev, each)) {
            why = std::string(ggml_backend_dev_name(dev)) + " does not have " + ggml_op_desc(each);
        }
    }
    ggml_free(ctx);
    return why;
}

ggml_tensor * llama_latent_plain(
    ggml_context * ctx, ggml_cgraph * graph, const ggml_tensor * node, ggml_tensor * own, ggml_tensor * own_mask) {
    const ggml_tensor * k       = node->src[1];
    const int64_t       n_heads = node->src[0]->ne[2];

    // per head and key: a key, a value, and the results of the matmuls before they are copied into the type of the keys
    const int64_t bytes = ggml_type_size(type_of(k)) * (N_NOPE + N_ROPE + N_VALUE) + sizeof(float) * N_VALUE;
    // as many cells as a sequence can have: the memory needed grows with its keys
    const int64_t n_cells = std::min(k->view_src->ne[1], LLAMA_LATENT_PLAIN_MAX_CELLS);
    const int64_t n_groups =
        std::clamp<int64_t>((n_heads * n_cells * bytes + SCRATCH - 1) / SCRATCH, 1, std::min(MAX_GROUPS, n_heads));
    const int64_t n_group = (n_heads + n_groups - 1) / n_groups;

    const Sources sources = prepare(ctx, node, own, own_mask);
    ggml_tensor * all     = nullptr;
    for (int64_t first = 0; first < n_heads; first += n_group) {
        ggml_tensor * out = attend(ctx, sources, first, std::min(n_group, n_heads - first));
        all               = all ? ggml_concat(ctx, all, out, 1) : out;
        ggml_build_forward_expand(graph, all);  // one group after the other, so that they use the same memory
    }
    return all;
}

bool llama_latent_plain_has(const ggml_tensor * node) {
    return node->op == GGML_OP_FLASH_ATTN_EXT && strcmp(node->name, NAME) == 0;
}
