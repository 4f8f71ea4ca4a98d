// Latent attention, absorbed, as nodes of ggml's Metal backend, against float64: the cases of the CUDA kernels' test,
// numbers of rows around the borders of blocks, scores that are all negative, and rows with gaps between them. Prints the
// largest error and a hash of all results.
//
//   latent-metal-test BACKEND TYPE of the cache        the cases
//   latent-metal-test BACKEND TYPE QUERIES KEYS HEADS MASK SPREAD    one case
//   latent-metal-test BACKEND others                   nodes that the kernels do not compute; only their dispatches count
//
// MASK and SPREAD: as in LatentShape; the mask `marked`: the node is marked for upstream's kernels
//
// BACKEND: the library with the device MTL0

#include "../latent-cases.h"

static double   worst = 0.0;
static uint64_t hash  = 14695981039346656037u;  // FNV-1a

static void check(ggml_backend_t metal, const LatentSetup & setup) {
    if (!chosen()) {
        return;
    }
    const LatentShape &            s = setup.shape;
    LatentCase                     attention(s);
    ggml_tensor *                  dst  = attention.node();
    struct ggml_backend_graph_copy copy = ggml_backend_graph_copy(metal, attention.nodes());
    CHECK(ggml_backend_graph_compute(metal, copy.graph) == GGML_STATUS_SUCCESS);
    ggml_backend_tensor_get(ggml_graph_node(copy.graph, -1), dst->data, 0, ggml_nbytes(dst));
    ggml_backend_graph_copy_free(copy);

    for (size_t i = 0; i < ggml_nbytes(dst); ++i) {
        hash = (hash ^ ((const uint8_t *) dst->data)[i]) * 1099511628211u;
    }
    const double error = attention.nmse(setup.n_rows == 0 ? s.n_rows() : setup.n_rows);
    worst              = std::max(worst, error);
    expect(error <= limit_of(s.cache), name_of(s) + text(": NMSE against float64 %.1e", error));  // false for NaN too
}

static std::vector<LatentSetup> all_cases(ggml_type type) {
    std::vector<LatentSetup> cases = absorbed_cases(type);
    for (const int64_t n_heads : { 5, 20, 33, 64 }) {
        LatentShape s = LatentShape().with(3, 70);
        s.cache       = type;
        s.n_heads     = n_heads;
        s.n_streams   = n_heads == 5 ? 2 : 1;
        cases.push_back({ s });
    }
    // one split, and several; no weight of a score of -300 is more than 0 in F32
    for (const int64_t n_keys : { 40, 130 }) {
        for (const bool rising : { false, true }) {
            LatentShape s = LatentShape().with(n_keys == 40 ? 3 : 1, n_keys);
            s.cache       = type;
            s.n_heads     = 5;
            s.shift       = -300.0f;
            s.rising      = rising;
            cases.push_back({ s });
        }
    }
    LatentShape apart = LatentShape().with(3, 70);
    apart.cache       = type;
    apart.n_heads     = 5;
    apart.n_streams   = 2;
    apart.gap         = 32;
    cases.push_back({ apart });
    LatentShape one_mask = LatentShape().with(3, 40);
    one_mask.cache       = type;
    one_mask.n_heads     = 3;
    one_mask.n_streams   = 2;
    one_mask.mask        = "mixed";
    one_mask.one_mask    = true;
    cases.push_back({ one_mask });
    return cases;
}

struct OtherNode {
    const char * name;
    int64_t      n_key = 576, n_value = 512, n_kv_heads = 1, n_mask_heads = 1;
    ggml_type    type     = GGML_TYPE_F32;
    int64_t      gap      = 0;  // values between the rows of K
    size_t       q_offset = 0;  // bytes
    size_t       v_offset = 0;  // bytes
    bool         own_v = false, sinks = false;
    float        max_bias = 0.0f, softcap = 0.0f;
    int32_t      n_sparse = 0;  // at most so many keys are visible
};

// Nodes of which one property does not fit, after one that fits. Each dispatch has the name of its node.
static void compute_others(ggml_backend_t metal) {
    std::vector<OtherNode> nodes(12);
    size_t                 n   = 0;
    const auto             add = [&](const char * name) -> OtherNode & {
        nodes[n].name = name;
        return nodes[n++];
    };
    add("fits");
    add("two KV heads").n_kv_heads        = 2;
    add("own V").own_v                    = true;
    add("V begins later").v_offset        = 64;
    add("masks of heads").n_mask_heads    = 2;
    add("sinks").sinks                    = true;
    add("ALiBi").max_bias                 = 8.0f;
    add("soft-capped").softcap            = 10.0f;
    add("at most 32 of 64 keys").n_sparse = 32;
    OtherNode & small                     = add("other head sizes");
    small.n_key                           = 320;
    small.n_value                         = 256;
    add("q is not aligned").q_offset      = 4;
    OtherNode & odd                       = add("K is not aligned");
    odd.type                              = GGML_TYPE_F16;
    odd.gap                               = 2;
    for (const OtherNode & each : nodes) {
        const int64_t  n_keys = 64, n_heads = 2;
        ggml_context * ctx = ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
        ggml_tensor *  q   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, each.n_key * n_heads + 1);
        const size_t   row = each.n_key * sizeof(float);
        q                  = ggml_view_3d(ctx, q, each.n_key, 1, n_heads, row, row, each.q_offset);
        ggml_tensor * k    = ggml_new_tensor_3d(ctx, each.type, each.n_key + each.gap, n_keys, each.n_kv_heads);
        ggml_tensor * v    = each.own_v ? ggml_new_tensor_3d(ctx, each.type, each.n_value, n_keys, each.n_kv_heads) : k;
        k                  = ggml_view_3d(ctx, k, each.n_key, n_keys, each.n_kv_heads, k->nb[1], k->nb[2], 0);
        v = ggml_view_3d(ctx, v, each.n_value, n_keys, each.n_kv_heads, v->nb[1], v->nb[2], each.v_offset);
        ggml_tensor * mask = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, n_keys, 1, each.n_mask_heads);
        ggml_tensor * out  = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, each.max_bias, each.softcap);
        ggml_prec_set_acc(out, GGML_PREC_F32);
        out->op_params[4] = each.n_sparse;
        ggml_set_name(out, each.name);
        if (each.sinks) {
            ggml_flash_attn_ext_add_sinks(out, ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_heads));
        }
        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, out);
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, metal);
        expect(ggml_backend_supports_op(metal, out) && ggml_backend_graph_compute(metal, graph) == GGML_STATUS_SUCCESS,
               each.name);
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }
}

int main(int argc, char ** argv) {
    CHECK(argc == 3 || argc == 8);
    cpu_registry();
    CHECK(ggml_backend_load(argv[1]));
    const ggml_backend_t metal = ggml_backend_dev_init(ggml_backend_dev_by_name("MTL0"), nullptr);
    const bool           other = strcmp(argv[2], "others") == 0;
    const ggml_type      type  = other ? GGML_TYPE_F32 : type_of(argv[2]);
    if (other) {
        compute_others(metal);
    } else if (argc == 3) {
        for (const LatentSetup & each : all_cases(type)) {
            check(metal, each);
        }
    } else {
        LatentShape s = LatentShape().with(atoi(argv[3]), atoi(argv[4]));
        s.cache       = type;
        s.n_heads     = atoi(argv[5]);
        s.spread      = strtof(argv[7], nullptr);
        s.poison      = true;
        s.plain       = strcmp(argv[6], "marked") == 0;
        s.mask        = s.plain ? "causal" : argv[6];
        check(metal, { s });
    }
    ggml_backend_free(metal);
    printf("largest NMSE %.1e, results %016llx\n", worst, (unsigned long long) hash);
    return report();
}
