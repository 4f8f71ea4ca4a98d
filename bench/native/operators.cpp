// Times single operators: the KDA recurrence, its convolutions, latent attention, matmuls.
// The same source works with an upstream and a patched build: operators of the patches are looked up by name.
//
//   operators CASE [key=value ...]     keys and defaults below; prints one line of JSON
//
// CASE                contents of the graph, for each of `layers` layers with their own states or caches
//   gdn               upstream's GATED_DELTA_NET alone, on a contiguous state
//   gdn-state         with the state gathered from the cache by row, and copied back
//   gdn-mixer         and with the rest of KDA_SCAN: bias, softplus, decay, sigmoids, output norm and gate
//   scan              KDA_SCAN on the cache, and the copy of its states, which the CPU elides if it can
//   conv-nodes        upstream's three convolutions: gather, transpose, concat, copy back, ssm_conv, silu; L2 norms
//   conv              KDA_CONV on the cache, and the copy of its states
//   absorbed          FLASH_ATTN_EXT over the latent
//   absorbed-plain    without flash attention: two matmuls and a softmax
//   whole, whole-plain  the absorbed attention with the matmuls by k_b before it and by v_b after it
//   latent            LATENT_ATTN, which includes these matmuls
//   product           a matmul by `rows` x `k` weights, or by `used` of `experts` such matrices for each token; weights
//                     are repacked where llama.cpp does so by default
//   product-rows      the same as with --repack 0
//
// The time is that of a graph with all layers; each layer has its own memory, so that no more of it is cached than in a
// model.

#include "../../ggml_ops/kda/ggml-kda-conv.h"
#include "../../ggml_ops/kda/ggml-kda-scan.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace {

struct Options {
    std::map<std::string, std::string> values = {
        { "tokens", "1" },    { "keys", "16384" }, { "heads", "32" },     { "head", "128" },
        { "layers", "1" },    { "type", "f16" },   { "weights", "q4_0" }, { "threads", "2" },
        { "seconds", "0.3" }, { "least", "5" },    { "latent", "512" },   { "rope", "64" },
        { "k", "2304" },      { "rows", "4096" },  { "experts", "0" },    { "used", "8" },
    };

    void set(const std::string & text) {
        const size_t eq = text.find('=');
        if (eq == std::string::npos || !values.count(text.substr(0, eq))) {
            fprintf(stderr, "operators: unknown argument %s\n", text.c_str());
            exit(2);
        }
        values[text.substr(0, eq)] = text.substr(eq + 1);
    }

    int64_t number(const char * key) const {
        const std::string & text  = values.at(key);
        const int64_t       least = std::string(key) == "experts" ? 0 : 1;
        char *              end   = nullptr;
        const int64_t       n     = strtoll(text.c_str(), &end, 10);
        if (end == text.c_str() || *end != '\0' || n < least || n > INT32_MAX) {
            fprintf(stderr, "operators: %s=%s is not a number from %d on\n", key, text.c_str(), (int) least);
            exit(2);
        }
        return n;
    }

    ggml_type type(const char * key) const {
        for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
            const char * name = ggml_type_name((ggml_type) t);
            if (name && values.at(key) == name) {
                return (ggml_type) t;
            }
        }
        fprintf(stderr, "operators: %s is not one of ggml's types\n", values.at(key).c_str());
        exit(2);
    }
};

// Calls a function of the patches with exactly the types of `arguments`.
template <typename... A> ggml_tensor * patched_operator(const char * name, A... arguments) {
    void * found = dlsym(RTLD_DEFAULT, name);
    if (!found) {
        fprintf(stderr, "operators: this build has no %s\n", name);
        exit(2);
    }
    return ((ggml_tensor * (*)(A...)) found)(arguments...);
}

// A graph under construction; `fill` sets the values of its tensors after allocation.
struct Bench {
    const Options & o;
    ggml_context *  ctx;
    ggml_context *  repacked;  // tensors for the repack buffer type
    ggml_cgraph *   graph;
    std::mt19937    rng{ 1 };

    struct Filling {
        ggml_tensor * tensor;
        float         mean, deviation;
    };

    std::vector<Filling>       fillings;
    std::vector<ggml_tensor *> rows;   // int32: row numbers, all 0
    std::vector<ggml_tensor *> masks;  // F16: causal
    std::vector<ggml_tensor *> ids;    // int32: experts of each token

    int64_t T, H, D, C;

    explicit Bench(const Options & options) : o(options) {
        const ggml_init_params params = { 4096 * ggml_tensor_overhead() + ggml_graph_overhead_custom(8192, false),
                                          nullptr, true };
        ctx                           = ggml_init(params);
        repacked                      = ggml_init(params);
        graph                         = ggml_new_graph_custom(ctx, 8192, false);
        T                             = o.number("tokens");
        H                             = o.number("heads");
        D                             = o.number("head");
        C                             = D * H;
    }

    ggml_tensor * input(ggml_type type, std::vector<int64_t> ne, float mean, float deviation) {
        ggml_tensor * t = ggml_new_tensor(ctx, type, (int) ne.size(), ne.data());
        fillings.push_back({ t, mean, deviation });
        return t;
    }

    ggml_tensor * f32(std::vector<int64_t> ne, float mean = 0.0f, float deviation = 1.0f) {
        return input(GGML_TYPE_F32, std::move(ne), mean, deviation);
    }

    ggml_tensor * row_numbers() {
        rows.push_back(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1));
        return rows.back();
    }

    void add(ggml_tensor * t) { ggml_build_forward_expand(graph, t); }

    // --- KDA ---

    void gdn(bool with_cache, bool with_rest) {
        ggml_tensor * q     = f32({ D, H, T, 1 }, 0.0f, 0.09f);
        ggml_tensor * k     = f32({ D, H, T, 1 }, 0.0f, 0.09f);
        ggml_tensor * v     = f32({ D, H, T, 1 });
        ggml_tensor * g     = f32({ C, T }, with_rest ? 0.0f : -1.0f, with_rest ? 1.0f : 0.1f);
        ggml_tensor * beta  = f32({ 1, H, T, 1 }, with_rest ? 0.0f : 0.5f, 0.1f);
        ggml_tensor * cache = f32({ D * D * H, 2 });
        if (with_rest) {
            ggml_tensor * a = f32({ 1, H, 1 }, -4.0f, 0.5f);
            g               = ggml_softplus(ctx, ggml_add(ctx, g, f32({ C })));
            g               = ggml_mul(ctx, ggml_reshape_3d(ctx, g, D, H, T), a);
            beta            = ggml_sigmoid(ctx, beta);
        }
        g = ggml_reshape_4d(ctx, g, D, H, T, 1);
        ggml_tensor * state =
            with_cache ? ggml_get_rows(ctx, cache, row_numbers()) : ggml_view_1d(ctx, cache, D * C, 0);
        ggml_tensor * op = ggml_gated_delta_net(ctx, q, k, v, g, beta, ggml_reshape_4d(ctx, state, D, D, H, 1), 1);
        add(op);
        if (with_cache) {
            ggml_tensor * to = ggml_view_1d(ctx, cache, D * C, 0);
            add(ggml_cpy(ctx, ggml_view_1d(ctx, op, D * C, C * T * sizeof(float)), to));
        }
        if (with_rest) {
            ggml_tensor * out = ggml_cont(ctx, ggml_view_3d(ctx, op, D, H, T, D * sizeof(float), C * sizeof(float), 0));
            ggml_tensor * gate = ggml_sigmoid(ctx, f32({ D, H, T }));
            out                = ggml_mul(ctx, ggml_rms_norm(ctx, out, 1e-5f), f32({ D }, 1.0f, 0.1f));
            add(ggml_cont_2d(ctx, ggml_mul(ctx, out, gate), C, T));
        }
    }

    // Copy the states, which follow an operator's output, to the cache.
    void store(ggml_tensor * op, ggml_tensor * cache, int64_t n_out) {
        add(op);
        const size_t  size = cache->nb[1];
        ggml_tensor * from = ggml_view_3d(ctx, op, cache->ne[0], 1, 1, size, size, n_out * sizeof(float));
        add(ggml_cpy(ctx, from, ggml_view_3d(ctx, cache, cache->ne[0], 1, 1, size, size, 0)));
    }

    void scan() {
        ggml_tensor *              cache     = f32({ D * C, 2 });
        ggml_tensor *              sources[] = { f32({ D, 3 * H, T, 1 }, 0.0f, 0.09f),
                                                 f32({ D, H, T, 1 }),
                                                 f32({ C }),
                                                 f32({ 1, H, 1, 1 }, -4.0f, 0.5f),
                                                 f32({ H, T, 1 }),
                                                 f32({ D, H, T, 1 }),
                                                 f32({ D }, 1.0f, 0.1f),
                                                 cache,
                                                 row_numbers() };
        const ggml_kda_scan_params params    = { 1, -1, 1e-5f, -INFINITY };
        store(patched_operator("ggml_kda_scan", ctx, sources, params), cache, C * T);
    }

    void conv_nodes() {
        ggml_tensor * cache = f32({ 9 * C, 2 });
        ggml_tensor * state = ggml_get_rows(ctx, cache, row_numbers());
        add(state);
        for (int i = 0; i < 3; ++i) {
            const size_t  part = i * 3 * C * sizeof(float);
            ggml_tensor * old  = ggml_view_3d(ctx, state, 3, C, 1, 3 * sizeof(float), 9 * C * sizeof(float), part);
            ggml_tensor * x    = ggml_concat(ctx, old, ggml_transpose(ctx, f32({ C, T, 1 })), 0);
            ggml_tensor * last = ggml_view_3d(ctx, x, 3, C, 1, x->nb[1], x->nb[2], T * x->nb[0]);
            add(ggml_cpy(ctx, last, ggml_view_3d(ctx, cache, 3, C, 1, 3 * sizeof(float), cache->nb[1], part)));
            ggml_tensor * y = ggml_silu(ctx, ggml_reshape_2d(ctx, ggml_ssm_conv(ctx, x, f32({ 4, C })), C, T));
            y               = ggml_reshape_4d(ctx, y, D, H, T, 1);
            add(i < 2 ? ggml_l2_norm(ctx, y, 1e-6f) : y);
        }
    }

    void conv() {
        ggml_tensor * cache     = f32({ 9 * C, 2 });
        ggml_tensor * sources[] = {
            f32({ C, T, 1 }), f32({ C, T, 1 }), f32({ C, T, 1 }), f32({ 4 * C }), f32({ 4 * C }), f32({ 4 * C }), cache,
            row_numbers()
        };
        const ggml_kda_conv_params params = { (int32_t) D, 1, -1, 1e-6f };
        store(patched_operator("ggml_kda_conv", ctx, sources, params), cache, 3 * C * T);
    }

    // --- latent attention ---

    int64_t n_latent() const { return o.number("latent"); }

    int64_t n_rope() const { return o.number("rope"); }

    float scale() const { return 1.0f / std::sqrt((float) (D + n_rope())); }

    // K: the first rows of a longer cache.
    ggml_tensor * latent_keys() {
        const int64_t n = o.number("keys"), row = n_latent() + n_rope();
        ggml_tensor * cache = input(o.type("type"), { row, n + 256, 1, 1 }, 0.0f, 1.0f);
        return ggml_view_4d(ctx, cache, row, n, 1, 1, cache->nb[1], cache->nb[2], cache->nb[3], 0);
    }

    ggml_tensor * causal(ggml_type type) {
        masks.push_back(ggml_new_tensor_4d(ctx, type, o.number("keys"), T, 1, 1));
        return masks.back();
    }

    ggml_tensor * attend(ggml_tensor * q, ggml_tensor * k, bool flash) {
        ggml_tensor * v = ggml_view_4d(ctx, k, n_latent(), k->ne[1], 1, 1, k->nb[1], k->nb[2], k->nb[3], 0);
        if (flash) {
            ggml_tensor * out = ggml_flash_attn_ext(ctx, q, k, v, causal(GGML_TYPE_F16), scale(), 0.0f, 0.0f);
            ggml_prec_set_acc(out, GGML_PREC_F32);
            return out;  // [latent, heads, tokens]
        }
        ggml_tensor * scores = ggml_mul_mat(ctx, k, q);
        ggml_prec_set_acc(scores, GGML_PREC_F32);
        scores             = ggml_soft_max_ext(ctx, scores, causal(GGML_TYPE_F32), scale(), 0.0f);
        ggml_tensor * vt   = ggml_cont(ctx, ggml_transpose(ctx, v));
        ggml_tensor * mean = ggml_mul_mat(ctx, vt, scores);
        return ggml_permute(ctx, mean, 0, 2, 1, 3);
    }

    void absorbed(bool flash) {
        ggml_tensor * q = f32({ n_latent() + n_rope(), H, T, 1 }, 0.0f, 0.3f);
        add(attend(ggml_permute(ctx, q, 0, 2, 1, 3), latent_keys(), flash));
    }

    ggml_tensor * k_b() { return input(o.type("weights"), { D, n_latent(), H }, 0.0f, 0.05f); }

    ggml_tensor * v_b() { return input(o.type("weights"), { n_latent(), D, H }, 0.0f, 0.05f); }

    // From the projected q to the output per head: the equivalent of LATENT_ATTN with upstream's nodes.
    void absorbed_whole(bool flash) {
        ggml_tensor * q        = f32({ D + n_rope(), H, T });
        const size_t  row      = q->nb[1];
        ggml_tensor * nope     = ggml_view_3d(ctx, q, D, H, T, row, q->nb[2], 0);
        ggml_tensor * rope     = ggml_view_3d(ctx, q, n_rope(), H, T, row, q->nb[2], D * sizeof(float));
        ggml_tensor * latent_q = ggml_mul_mat(ctx, k_b(), ggml_permute(ctx, nope, 0, 2, 1, 3));
        latent_q               = ggml_concat(ctx, ggml_permute(ctx, latent_q, 0, 2, 1, 3), rope, 0);
        ggml_tensor * out      = attend(ggml_permute(ctx, latent_q, 0, 2, 1, 3), latent_keys(), flash);
        out                    = ggml_mul_mat(ctx, v_b(), ggml_permute(ctx, out, 0, 2, 1, 3));
        add(ggml_cont_2d(ctx, ggml_permute(ctx, out, 0, 2, 1, 3), C, T));
    }

    void latent() {
        ggml_tensor * q = ggml_permute(ctx, f32({ D + n_rope(), H, T, 1 }), 0, 2, 1, 3);
        add(patched_operator("ggml_latent_attn", ctx, q, latent_keys(), k_b(), v_b(), causal(GGML_TYPE_F16), scale()));
    }

    // --- matmuls ---

    void product(bool repack) {
        const int64_t        experts = o.number("experts"), k = o.number("k");
        std::vector<int64_t> ne    = { k, o.number("rows") };
        const int64_t        block = ggml_blck_size(o.type("weights"));
        if (k % block != 0) {
            fprintf(stderr, "operators: k=%d is not a multiple of %d, the block of %s\n", (int) k, (int) block,
                    o.values.at("weights").c_str());
            exit(2);
        }
        if (experts > 0) {
            ne.push_back(experts);
        }
        ggml_context * const home    = repack ? repacked : ctx;
        ggml_tensor * const  weights = ggml_new_tensor(home, o.type("weights"), (int) ne.size(), ne.data());
        fillings.push_back({ weights, 0.0f, 1.0f });
        if (experts == 0) {
            add(ggml_mul_mat(ctx, weights, f32({ k, T })));
            return;
        }
        ids.push_back(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, o.number("used"), T));
        add(ggml_mul_mat_id(ctx, weights, f32({ k, 1, T }), ids.back()));
    }

    // --- values ---

    void fill() {
        for (ggml_tensor * t : ids) {
            fill_ids(t);
        }
        for (ggml_tensor * t : rows) {
            memset(t->data, 0, ggml_nbytes(t));
        }
        for (ggml_tensor * t : masks) {
            fill_mask(t);
        }
        for (const Filling & f : fillings) {
            fill_values(f);
        }
    }

    void fill_ids(ggml_tensor * t) {
        std::vector<int32_t> all(o.number("experts"));
        std::iota(all.begin(), all.end(), 0);
        for (int64_t token = 0; token < t->ne[1]; ++token) {
            std::shuffle(all.begin(), all.end(), rng);
            memcpy((char *) t->data + token * t->nb[1], all.data(), t->nb[1]);
        }
    }

    static void fill_mask(ggml_tensor * t) {
        for (int64_t i = 0; i < t->ne[1]; ++i) {
            for (int64_t key = 0; key < t->ne[0]; ++key) {
                const float value = key <= t->ne[0] - t->ne[1] + i ? 0.0f : -INFINITY;
                char *      at    = (char *) t->data + i * t->nb[1];
                if (t->type == GGML_TYPE_F16) {
                    ((ggml_fp16_t *) at)[key] = ggml_fp32_to_fp16(value);
                } else {
                    ((float *) at)[key] = value;
                }
            }
        }
    }

    // Rows from a pool, in a different order each time: random enough for the computation, and fast to generate.
    void fill_values(const Filling & f) {
        constexpr int64_t               pool = 61;
        const int64_t                   n    = f.tensor->ne[0];
        const size_t                    size = ggml_row_size(f.tensor->type, n);
        std::normal_distribution<float> normal(f.mean, f.deviation);
        std::vector<float>              x(n * std::min(pool, ggml_nrows(f.tensor)));
        for (float & value : x) {
            value = normal(rng);
        }
        const int64_t     made = x.size() / n;
        std::vector<char> encoded(size * made);
        if (f.tensor->type == GGML_TYPE_F32) {
            memcpy(encoded.data(), x.data(), encoded.size());
        } else {
            ggml_quantize_chunk(f.tensor->type, x.data(), encoded.data(), 0, made, n, nullptr);
        }
        std::vector<char> all(ggml_nbytes(f.tensor));
        for (int64_t row = 0; row < ggml_nrows(f.tensor); ++row) {
            memcpy(all.data() + row * size, encoded.data() + row % made * size, size);
        }
        ggml_backend_tensor_set(f.tensor, all.data(), 0, all.size());  // a repacked tensor can only be set as a whole
    }
};

const std::map<std::string, void (*)(Bench &)> CASES = {
    { "gdn", [](Bench & b) { b.gdn(false, false); } },
    { "gdn-state", [](Bench & b) { b.gdn(true, false); } },
    { "gdn-mixer", [](Bench & b) { b.gdn(true, true); } },
    { "scan", [](Bench & b) { b.scan(); } },
    { "conv-nodes", [](Bench & b) { b.conv_nodes(); } },
    { "conv", [](Bench & b) { b.conv(); } },
    { "absorbed", [](Bench & b) { b.absorbed(true); } },
    { "absorbed-plain", [](Bench & b) { b.absorbed(false); } },
    { "whole", [](Bench & b) { b.absorbed_whole(true); } },
    { "whole-plain", [](Bench & b) { b.absorbed_whole(false); } },
    { "latent", [](Bench & b) { b.latent(); } },
    { "product", [](Bench & b) { b.product(true); } },
    { "product-rows", [](Bench & b) { b.product(false); } },
};

// The buffer type of repacked weights, or nullptr.
ggml_backend_buffer_type_t repack_buffer_type() {
    const ggml_backend_reg_t reg = ggml_backend_cpu_reg();
    const auto               get =
        (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * each = get(ggml_backend_reg_dev_get(reg, 0)); each && *each; ++each) {
        if (std::string(ggml_backend_buft_name(*each)) == "CPU_REPACK") {
            return *each;
        }
    }
    return nullptr;
}

// Whether llama.cpp would put the weights of this matmul into a buffer of this type.
bool selects(ggml_backend_buffer_type_t type, ggml_tensor * matmul) {
    ggml_tensor * const weights = matmul->src[0];
    weights->buffer             = ggml_backend_buft_alloc_buffer(type, 0);
    const bool supported = ggml_backend_dev_supports_op(ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0), matmul);
    ggml_backend_buffer_free(weights->buffer);
    weights->buffer = nullptr;
    return supported;
}

// Memory for the weights of this matmul, and others like it, as llama.cpp selects it by default: repacked or not.
ggml_backend_buffer_t place_weights(ggml_context * weights, ggml_tensor * matmul) {
    if (ggml_get_first_tensor(weights) == nullptr) {
        return nullptr;
    }
    const ggml_backend_buffer_type_t repack = repack_buffer_type();
    const bool                       copies = repack != nullptr && selects(repack, matmul);
    return ggml_backend_alloc_ctx_tensors_from_buft(weights, copies ? repack : ggml_backend_cpu_buffer_type());
}

}  // namespace

int main(int argc, char ** argv) {
    Options options;
    if (argc < 2 || !CASES.count(argv[1])) {
        std::string names;
        for (const auto & each : CASES) {
            names += " " + std::string(each.first);
        }
        fprintf(stderr, "operators CASE [key=value ...]; cases:%s\n", names.c_str());
        return 2;
    }
    for (int i = 2; i < argc; ++i) {
        options.set(argv[i]);
    }
    Bench         bench(options);
    const int64_t n_layers = options.number("layers");
    for (int64_t i = 0; i < n_layers; ++i) {
        CASES.at(argv[1])(bench);
    }
    ggml_backend_t        backend = ggml_backend_cpu_init();
    ggml_backend_buffer_t buffer  = ggml_backend_alloc_ctx_tensors(bench.ctx, backend);
    ggml_backend_buffer_t weights = place_weights(bench.repacked, ggml_graph_node(bench.graph, 0));
    bench.fill();
    ggml_backend_cpu_set_n_threads(backend, (int) options.number("threads"));

    const double        enough = std::stod(options.values.at("seconds"));
    std::vector<double> seconds;
    ggml_backend_graph_compute(backend, bench.graph);  // warms up pages and caches
    for (double sum = 0.0; sum < enough || (int64_t) seconds.size() < options.number("least");) {
        const int64_t began = ggml_time_us();
        ggml_backend_graph_compute(backend, bench.graph);
        seconds.push_back((ggml_time_us() - began) * 1e-6);
        sum += seconds.back();
    }
    std::sort(seconds.begin(), seconds.end());
    const bool repacked = weights != nullptr && ggml_backend_buffer_get_type(weights) == repack_buffer_type();
    printf("{\"median\": %.9g, \"least\": %.9g, \"runs\": %zu, \"repacked\": %s}\n",
           seconds[seconds.size() / 2] / n_layers, seconds.front() / n_layers, seconds.size(),
           repacked ? "true" : "false");
    ggml_backend_buffer_free(weights);
    ggml_backend_buffer_free(buffer);
    ggml_backend_free(backend);
    ggml_free(bench.repacked);
    ggml_free(bench.ctx);
    return 0;
}
