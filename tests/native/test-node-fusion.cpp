// Fused runs of nodes in ggml-cpu: prints, for each case, a hash of the results' bits and whether the nodes were fused.
// With the argument `unfused` every node is marked GGML_OP_MARK_UNFUSED; the hashes must be the same. So must they with
// `numa`, as on a NUMA machine.
//
// A fused run does not write unused intermediate results. The poison in their memory shows whether a run was fused;
// matmuls have no such results.

#include "common/ggml-op-marks.h"
#include "cpu_backend.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

static std::mt19937 rng(7);

static bool numa = false;

// Replaces ggml-cpu's function of this name.
bool ggml_is_numa(void) {
    return numa;
}

struct program {
    ggml_context *                     ctx = ggml_init({ 4 << 20, nullptr, true });
    ggml_backend_t                     backend;
    ggml_cgraph *                      graph;
    std::vector<ggml_backend_buffer_t> buffers;
    std::vector<std::function<void()>> fill;
    std::vector<const ggml_tensor *>   results;
    const ggml_tensor *                unneeded = nullptr;  // not written if its run is fused

    explicit program(int threads) : backend(ggml_backend_cpu_init()) {
        ggml_backend_cpu_set_n_threads(backend, threads);
        graph = ggml_new_graph(ctx);
    }

    ~program() {
        for (auto * b : buffers) {
            ggml_backend_buffer_free(b);
        }
        ggml_backend_free(backend);
        ggml_free(ctx);
    }

    ggml_tensor * input(int64_t a, int64_t b, int64_t c = 1) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, a, b, c);
        ggml_set_input(t);
        fill.push_back([t] {
            std::normal_distribution<float> d(0, 1);
            for (int64_t i = 0; i < ggml_nelements(t); ++i) {
                ((float *) t->data)[i] = d(rng);
            }
        });
        return t;
    }

    // a quantized weight; repacked: in ggml-cpu's own layout, if it has one
    ggml_tensor * weight(ggml_type type, int64_t columns, int64_t rows, bool repacked) {
        ggml_tensor *              t   = ggml_new_tensor_2d(ctx, type, columns, rows);
        ggml_backend_buffer_type_t own = repacked ? repack_buffer_type() : nullptr;
        if (own != nullptr) {
            buffers.push_back(ggml_backend_buft_alloc_buffer(own, ggml_nbytes(t) + 64));
            ggml_backend_tensor_alloc(buffers.back(), t, ggml_backend_buffer_get_base(buffers.back()));
            if (t->extra == nullptr) {  // this processor has no layout for the type, such as Q2_K without AVX-512
                t->buffer = nullptr;
                t->data   = nullptr;
            }
        }
        if (t->data == nullptr) {
            buffers.push_back(ggml_backend_alloc_buffer(backend, ggml_nbytes(t) + 64));
            ggml_backend_tensor_alloc(buffers.back(), t, ggml_backend_buffer_get_base(buffers.back()));
        }
        std::vector<float>              x(columns * rows);
        std::normal_distribution<float> d(0, 1);
        for (auto & y : x) {
            y = d(rng);
        }
        std::vector<uint8_t> q(ggml_nbytes(t));
        ggml_quantize_chunk(type, x.data(), q.data(), 0, rows, columns, nullptr);
        ggml_backend_tensor_set(t, q.data(), 0, q.size());
        return t;
    }

    void want(ggml_tensor * t) {
        ggml_build_forward_expand(graph, t);
        results.push_back(t);
    }

    void mark_unfused() {
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            ggml_op_set_mark(ggml_graph_node(graph, i), GGML_OP_MARK_UNFUSED);
        }
    }

    // own_memory: every tensor has its own, poisoned with NaN; otherwise allocated as in llama.cpp
    void print(const char * name, bool own_memory) {
        ggml_gallocr_t galloc = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
        if (own_memory) {
            buffers.push_back(ggml_backend_alloc_ctx_tensors(ctx, backend));
            ggml_backend_buffer_clear(buffers.back(), 0xff);
        } else {
            for (const auto * t : results) {
                ggml_set_output(const_cast<ggml_tensor *>(t));
            }
            ggml_gallocr_alloc_graph(galloc, graph);
        }
        for (const auto & f : fill) {
            f();
        }
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            abort();
        }
        uint64_t hash = 14695981039346656037ull;  // FNV-1a
        for (const ggml_tensor * t : results) {
            for (int64_t r = 0; r < ggml_nrows(t); ++r) {
                const uint8_t * p = (const uint8_t *) t->data + r * t->nb[1];
                for (size_t i = 0; i < t->ne[0] * ggml_element_size(t); ++i) {
                    hash = (hash ^ p[i]) * 1099511628211ull;
                }
            }
        }
        const bool one = own_memory && unneeded != nullptr && std::isnan(*(const float *) unneeded->data);
        printf("%s: %016llx%s\n", name, (unsigned long long) hash, one ? " as one" : "");
        ggml_gallocr_free(galloc);
    }
};

enum class ties { none, some, all };

// as in build_moe_ffn; `equal`: which scores of a token are equal; `reader`: another node reads the scores, so that they
// have to be written
static void router(program & p, int64_t experts, int64_t k, int64_t tokens, ties equal, bool reader) {
    ggml_context * ctx    = p.ctx;
    ggml_tensor *  x      = p.input(experts, tokens);
    ggml_tensor *  bias   = p.input(experts, 1);
    ggml_tensor *  logits = ggml_scale(ctx, x, equal == ties::all ? 0.0f : 2.0f);
    if (equal == ties::some) {
        ggml_build_forward_expand(p.graph, logits);
        logits = ggml_round(ctx, ggml_scale(ctx, logits, 16.0f));
    }
    ggml_tensor * scores = ggml_sigmoid(ctx, logits);
    ggml_tensor * biased = ggml_add(ctx, scores, equal == ties::none ? bias : ggml_scale(ctx, bias, 0.0f));
    ggml_tensor * chosen = ggml_argsort_top_k(ctx, biased, k);
    ggml_tensor * w      = ggml_get_rows(ctx, ggml_reshape_3d(ctx, scores, 1, experts, tokens), chosen);
    w                    = ggml_reshape_2d(ctx, w, k, tokens);
    ggml_tensor * sum    = ggml_clamp(ctx, ggml_sum_rows(ctx, w), 6.103515625e-5f, INFINITY);
    w                    = ggml_scale(ctx, ggml_reshape_3d(ctx, ggml_div(ctx, w, sum), 1, k, tokens), 2.446f);
    ggml_build_forward_expand(p.graph, logits);
    if (equal != ties::none) {
        ggml_build_forward_expand(p.graph, biased->src[1]);
    }
    ggml_build_forward_expand(p.graph, w);
    p.want(ggml_scale(ctx, w, 1.0f));
    p.want(ggml_dup(ctx, chosen));
    if (reader) {
        p.want(ggml_scale(ctx, scores, 1.0f));
    }
    p.unneeded = scores;
}

static void expert_sum(program & p, int64_t n, int64_t k, int64_t tokens) {
    ggml_context * ctx      = p.ctx;
    ggml_tensor *  results  = ggml_scale(ctx, p.input(n, k, tokens), 1.0f);
    ggml_tensor *  weights  = ggml_scale(ctx, p.input(1, k, tokens), 1.0f);
    ggml_tensor *  weighted = ggml_mul(ctx, results, weights);
    ggml_build_forward_expand(p.graph, weighted);
    std::vector<ggml_tensor *> one;
    for (int64_t i = 0; i < k; ++i) {
        one.push_back(ggml_view_2d(ctx, weighted, n, tokens, weighted->nb[2], i * weighted->nb[1]));
        ggml_build_forward_expand(p.graph, one.back());
    }
    ggml_tensor * sum = one[0];
    for (int64_t i = 1; i < k; ++i) {
        sum = ggml_add(ctx, sum, one[i]);
        ggml_build_forward_expand(p.graph, sum);
    }
    p.want(ggml_scale(ctx, sum, 1.0f));
    p.unneeded = weighted;
}

// Several types of weights on the same activations, others on their own activations, and one that depends on the matmul
// before it. The first is the widest, so that the work buffer can hold several activations.
static void products(program & p, int64_t tokens) {
    const auto product = [&](ggml_type type, int64_t rows, ggml_tensor * x) {
        ggml_tensor * y = ggml_mul_mat(p.ctx, p.weight(type, x->ne[0], rows, type != GGML_TYPE_Q8_0), x);
        p.want(y);
        return y;
    };
    product(GGML_TYPE_Q4_0, 8, p.input(4096, tokens));
    ggml_tensor * x = p.input(512, tokens);
    product(GGML_TYPE_Q4_0, 136, x);
    product(GGML_TYPE_Q4_K, 64, x);
    product(GGML_TYPE_Q4_K, 128, x);
    ggml_tensor * y = product(GGML_TYPE_Q4_0, 256, x);
    product(GGML_TYPE_Q4_0, 16, y);
    product(GGML_TYPE_Q8_0, 96, x);
}

// Interleaved rows of Q2_K, and plain ones, whose kernels read other forms of the same activations with AVX-512.
static void products_of_two_layouts(program & p, int64_t tokens) {
    const auto product = [&](ggml_type type, int64_t rows, bool repacked, ggml_tensor * x) {
        p.want(ggml_mul_mat(p.ctx, p.weight(type, x->ne[0], rows, repacked), x));
    };
    product(GGML_TYPE_Q4_0, 8, true, p.input(4096, tokens));
    ggml_tensor * x = p.input(512, tokens);
    product(GGML_TYPE_Q2_K, 64, true, x);
    product(GGML_TYPE_Q2_K, 136, false, x);
    product(GGML_TYPE_Q3_K, 48, false, x);
    product(GGML_TYPE_Q2_K, 128, false, x);
}

int main(int argc, char ** argv) {
    const bool unfused = argc > 1 && strcmp(argv[1], "unfused") == 0;
    numa               = argc > 1 && strcmp(argv[1], "numa") == 0;
    for (const int threads : { 1, 2, 7, 33, 100 }) {
        for (const bool own_memory : { true, false }) {
            const auto run = [&](const std::string & name, const std::function<void(program &)> & build) {
                program p(threads);
                build(p);
                if (unfused) {
                    p.mark_unfused();
                }
                p.print((name + ", " + std::to_string(threads) + " threads" + (own_memory ? "" : ", memory reused"))
                            .c_str(),
                        own_memory);
            };
            for (const int64_t tokens : { 1, 2, 7, 64 }) {
                const std::string t = " of " + std::to_string(tokens) + " tokens";
                rng.seed(tokens);
                run("router" + t, [&](program & p) { router(p, 32, 8, tokens, ties::none, false); });
                run("router with ties" + t, [&](program & p) { router(p, 256, 8, tokens, ties::all, false); });
                run("router with some ties" + t, [&](program & p) { router(p, 48, 8, tokens, ties::some, false); });
                run("router with a reader" + t, [&](program & p) { router(p, 64, 4, tokens, ties::none, true); });
                for (const int64_t k : { 2, 8, 15, 16 }) {
                    run("sum over " + std::to_string(k) + " experts" + t,
                        [&](program & p) { expert_sum(p, 200, k, tokens); });
                }
                run("products" + t, [&](program & p) { products(p, tokens); });
                run("products of two layouts" + t, [&](program & p) { products_of_two_layouts(p, tokens); });
            }
        }
    }
    return 0;
}
