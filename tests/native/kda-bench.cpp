// Times the token mixer of a KDA layer between its projections, 32 heads of 128: upstream's nodes and the operators,
// alternately in one run (A B A B), wall time, medians. Also the single operators, and the machine's peaks that
// they are measured against.
//
//   kda-bench [threads=2] [runs=15] [tokens=1,64,512]

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

static constexpr int64_t D = 128, H = 32, C = D * H, CELLS = 2;

// What both graphs read and write: projections and gate pre-activations of T tokens, weights, caches.
struct inputs {
    ggml_tensor *qkv[3], *f, *gate, *beta, *taps[3], *dt_bias, *a, *norm, *conv_cache, *cache, *rows;
    ggml_tensor *heads, *log_gate, *strength;  // of the single operators: q, k and v of unit length; e^g; beta
};

struct layer {
    ggml_context *        ctx = ggml_init({ 16 << 20, nullptr, true });
    ggml_backend_t        backend;
    ggml_backend_buffer_t buffer = nullptr;
    ggml_gallocr_t        galloc = nullptr;
    ggml_cgraph *         graph;
    inputs                x;
    int64_t               T;

    layer(int64_t n_tokens, int n_threads) : backend(ggml_backend_cpu_init()), T(n_tokens) {
        ggml_backend_cpu_set_n_threads(backend, n_threads);
        graph             = ggml_new_graph(ctx);
        const auto tensor = [&](int64_t n0, int64_t n1, int64_t n2 = 1) {
            return ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n0, n1, n2);
        };
        for (int p = 0; p < 3; ++p) {
            x.qkv[p]  = tensor(C, T);
            x.taps[p] = tensor(4, C);
        }
        x.f          = tensor(C, T);
        x.gate       = tensor(C, T);
        x.beta       = tensor(H, T);
        x.dt_bias    = tensor(C, 1);
        x.a          = tensor(1, H);
        x.norm       = tensor(D, 1);
        x.conv_cache = tensor(9 * C, CELLS);
        x.cache      = tensor(D * D * H, CELLS);
        x.heads      = tensor(D, 3 * H, T);
        x.log_gate   = tensor(C, T);
        x.strength   = tensor(H, T);
        x.rows       = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
        buffer       = ggml_backend_alloc_ctx_tensors(ctx, backend);
    }

    ~layer() {
        ggml_gallocr_free(galloc);
        ggml_backend_buffer_free(buffer);
        ggml_backend_free(backend);
        ggml_free(ctx);
    }

    // Allocates what the graph computes as llama.cpp does, memory reused, and fills the inputs.
    void ready() {
        galloc = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
        ggml_gallocr_alloc_graph(galloc, graph);
        std::mt19937 rng(1);
        const auto   fill = [&](ggml_tensor * t, float mean, float sd) {
            std::normal_distribution<float> d(mean, sd);
            for (int64_t i = 0; i < ggml_nelements(t); ++i) {
                ((float *) t->data)[i] = d(rng);
            }
        };
        for (int p = 0; p < 3; ++p) {
            fill(x.qkv[p], 0, 1);
            fill(x.taps[p], 0, 0.3f);
        }
        fill(x.f, 0, 1);
        fill(x.gate, 0, 1);
        fill(x.beta, 0, 1);
        fill(x.dt_bias, -3, 0.5f);
        fill(x.a, -4, 0.5f);
        fill(x.norm, 1, 0.1f);
        fill(x.conv_cache, 0, 1);
        fill(x.cache, 0, 0.1f);
        fill(x.heads, 0, 1 / sqrtf(D));
        fill(x.log_gate, -0.5f, 0.1f);
        fill(x.strength, 0.5f, 0.1f);
        *(int32_t *) x.rows->data = 0;
    }

    double microseconds() {
        const auto t0 = std::chrono::steady_clock::now();
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            abort();
        }
        return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - t0).count();
    }
};

// The nodes that upstream's graph has here: convolutions, norms, gates, state gather, GATED_DELTA_NET, copy of the
// state, output norm and gate.
static void upstream(layer & l) {
    ggml_context * ctx = l.ctx;
    const inputs & x   = l.x;
    const int64_t  T   = l.T;

    ggml_tensor * history = ggml_get_rows(ctx, x.conv_cache, x.rows);
    ggml_build_forward_expand(l.graph, history);
    ggml_tensor * heads[3];
    for (int p = 0; p < 3; ++p) {
        const size_t  first = p * 3 * C * sizeof(float);
        ggml_tensor * past  = ggml_view_3d(ctx, history, 3, C, 1, 12, 36 * C, first);
        ggml_tensor * input = ggml_concat(ctx, past, ggml_transpose(ctx, x.qkv[p]), 0);
        ggml_tensor * last  = ggml_view_3d(ctx, input, 3, C, 1, input->nb[1], input->nb[2], T * 4);
        ggml_build_forward_expand(l.graph,
                                  ggml_cpy(ctx, last, ggml_view_3d(ctx, x.conv_cache, 3, C, 1, 12, 36 * C, first)));
        heads[p] = ggml_reshape_4d(ctx, ggml_silu(ctx, ggml_ssm_conv(ctx, input, x.taps[p])), D, H, T, 1);
    }
    ggml_tensor * g    = ggml_softplus(ctx, ggml_add(ctx, x.f, x.dt_bias));
    g                  = ggml_mul(ctx, ggml_reshape_3d(ctx, g, D, H, T), ggml_reshape_3d(ctx, x.a, 1, H, 1));
    ggml_tensor * beta = ggml_sigmoid(ctx, ggml_reshape_4d(ctx, x.beta, 1, H, T, 1));

    ggml_tensor * state = ggml_get_rows(ctx, x.cache, x.rows);
    ggml_build_forward_expand(l.graph, state);
    for (int p = 0; p < 2; ++p) {
        heads[p] = ggml_l2_norm(ctx, heads[p], 1e-6f);
    }
    ggml_tensor * net = ggml_gated_delta_net(ctx, heads[0], heads[1], heads[2], ggml_reshape_4d(ctx, g, D, H, T, 1),
                                             beta, ggml_reshape_4d(ctx, state, D, D, H, 1), 1);
    ggml_tensor * out = ggml_view_3d(ctx, net, D, H, T, D * 4, C * 4, 0);
    ggml_tensor * now = ggml_view_1d(ctx, net, D * D * H, C * T * 4);
    ggml_build_forward_expand(l.graph, ggml_cpy(ctx, now, ggml_view_1d(ctx, x.cache, D * D * H, 0)));
    out = ggml_mul(ctx, ggml_rms_norm(ctx, ggml_cont(ctx, out), 1e-5f), x.norm);
    out = ggml_mul(ctx, out, ggml_sigmoid(ctx, ggml_reshape_3d(ctx, x.gate, D, H, T)));
    ggml_build_forward_expand(l.graph, ggml_cont_2d(ctx, out, C, T));
}

static ggml_tensor * with_copy(layer & l, ggml_tensor * op, ggml_tensor * cache, int64_t n_out) {
    ggml_build_forward_expand(l.graph, op);
    ggml_tensor * from = ggml_view_3d(l.ctx, op, cache->ne[0], 1, 1, cache->nb[1], cache->nb[1], n_out * 4);
    ggml_tensor * to   = ggml_view_3d(l.ctx, cache, cache->ne[0], 1, 1, cache->nb[1], 2 * cache->nb[1], 0);
    ggml_build_forward_expand(l.graph, ggml_cpy(l.ctx, from, to));
    return op;
}

static ggml_tensor * conv(layer & l) {
    const inputs & x = l.x;
    return with_copy(l,
                     ggml_kda_conv(l.ctx, x.qkv[0], x.qkv[1], x.qkv[2], x.taps[0], x.taps[1], x.taps[2], x.conv_cache,
                                   x.rows, D, 1, -1, 1e-6f),
                     x.conv_cache, 3 * C * l.T);
}

static ggml_tensor * scan(layer & l, ggml_tensor * qkv) {
    const inputs & x    = l.x;
    ggml_tensor *  f    = ggml_reshape_4d(l.ctx, x.f, D, H, l.T, 1);
    ggml_tensor *  gate = ggml_reshape_4d(l.ctx, x.gate, D, H, l.T, 1);
    return with_copy(
        l, ggml_kda_scan(l.ctx, qkv, f, x.dt_bias, x.a, x.beta, gate, x.norm, x.cache, x.rows, 1, -1, 1e-5f, -INFINITY),
        x.cache, C * l.T);
}

static void operators(layer & l) {
    ggml_tensor * c = conv(l);
    scan(l, ggml_view_4d(l.ctx, c, D, 3 * H, l.T, 1, D * 4, c->nb[1], c->nb[1] * l.T, 0));
}

// The single operators, on tensors of their own.
static void conv_alone(layer & l) {
    conv(l);
}

static void scan_alone(layer & l) {
    scan(l, l.x.heads);
}

static void net_alone(layer & l) {
    ggml_context * ctx   = l.ctx;
    const auto     heads = [&](int64_t p) {
        return ggml_view_4d(ctx, l.x.heads, D, H, l.T, 1, D * 4, C * 4, C * 4 * l.T, p * C * l.T * 4);
    };
    ggml_tensor * state = ggml_view_4d(ctx, l.x.cache, D, D, H, 1, D * 4, D * D * 4, D * D * H * 4, 0);
    ggml_build_forward_expand(l.graph,
                              ggml_gated_delta_net(ctx, heads(0), heads(1), heads(2),
                                                   ggml_reshape_4d(ctx, l.x.log_gate, D, H, l.T, 1),
                                                   ggml_reshape_4d(ctx, l.x.strength, 1, H, l.T, 1), state, 1));
}

// --- peaks of one thread, which the kernels are measured against ---

template <typename F> static double best_seconds(F && work) {
    double best = 1e9;
    for (int i = 0; i < 5; ++i) {
        const auto t0 = std::chrono::steady_clock::now();
        work();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count());
    }
    return best;
}

#if defined(__GNUC__)
typedef float lanes __attribute__((vector_size(64)));

// multiply-adds a nanosecond, of independent chains in registers
static double peak_fma() {
    constexpr int  CHAINS = 12, ROUNDS = 2000000;
    volatile float seed = 1.0f;
    lanes          acc[CHAINS], a = {}, b = {};
    a += seed, b += 1e-9f * seed;
    for (auto & x : acc) {
        x = a;
    }
    const double s = best_seconds([&] {
        for (int i = 0; i < ROUNDS; ++i) {
#pragma GCC unroll 12
            for (int c = 0; c < CHAINS; ++c) {
                acc[c] = acc[c] * a + b;
            }
        }
    });
    float sum = 0;
    for (const auto & x : acc) {
        sum += x[0];
    }
    seed = sum;
    return 16.0 * CHAINS * ROUNDS / s * 1e-9;
}
#else
static double peak_fma() {
    return NAN;
}
#endif

// bytes a nanosecond, read and written, over 64 MiB
static double copy_bandwidth() {
    const size_t      n = 32 << 20;
    std::vector<char> from(n, 1), to(n, 2);
    return 2.0 * n / best_seconds([&] { memcpy(to.data(), from.data(), n); }) * 1e-9;
}

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

int main(int argc, char ** argv) {
    int                  threads = 2, runs = 15;
    std::vector<int64_t> tokens = { 1, 2, 4, 8, 16, 32, 64, 128, 512, 2048 };
    for (int i = 1; i < argc; ++i) {
        const std::string option = argv[i];
        if (option.rfind("threads=", 0) == 0) {
            threads = atoi(argv[i] + 8);
        } else if (option.rfind("runs=", 0) == 0) {
            runs = atoi(argv[i] + 5);
        } else if (option.rfind("tokens=", 0) == 0) {
            tokens.clear();
            for (const char * p = argv[i] + 7; *p;) {
                char * end;
                tokens.push_back(strtol(p, &end, 10));
                p = *end ? end + 1 : end;
            }
        } else {
            fprintf(stderr, "usage: kda-bench [threads=N] [runs=N] [tokens=N,N,...]\n");
            return 2;
        }
    }

    const std::vector<std::pair<const char *, void (*)(layer &)>> contestants = {
        { "upstream", upstream },   { "operators", operators }, { "GATED_DELTA_NET", net_alone },
        { "KDA_SCAN", scan_alone }, { "KDA_CONV", conv_alone },
    };
    printf("%d threads, %lld heads of %lld, medians of %d runs; one thread: %.0f GFMA/s, %.1f GB/s copied\n\n", threads,
           (long long) H, (long long) D, runs, peak_fma(), copy_bandwidth());
    printf(
        "| tokens | upstream, us | operators, us | ratio | GATED_DELTA_NET, us | KDA_SCAN, us | ratio | KDA_CONV, us "
        "|\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n");
    for (const int64_t T : tokens) {
        std::vector<double>  median_of;
        std::vector<layer *> layers;
        for (const auto & c : contestants) {
            layers.push_back(new layer(T, threads));
            c.second(*layers.back());
            layers.back()->ready();
        }
        std::vector<std::vector<double>> times(layers.size());
        const int                        together = (int) std::max<int64_t>(1, 32 / T);
        for (int r = -1; r < runs; ++r) {
            for (size_t i = 0; i < layers.size(); ++i) {
                double us = layers[i]->microseconds();  // a first one, with what the others left in the caches
                us        = 0;
                for (int n = 0; n < together; ++n) {
                    us += layers[i]->microseconds();
                }
                if (r >= 0) {
                    times[i].push_back(us / together);
                }
            }
        }
        for (size_t i = 0; i < layers.size(); ++i) {
            median_of.push_back(median(times[i]));
            delete layers[i];
        }
        printf("| %lld | %.1f | %.1f | %.2f | %.1f | %.1f | %.2f | %.1f |\n", (long long) T, median_of[0], median_of[1],
               median_of[0] / median_of[1], median_of[2], median_of[3], median_of[2] / median_of[3], median_of[4]);
        fflush(stdout);
    }
    return 0;
}
