// The KDA operators against their float64 oracles: ordinary and hostile inputs, every head size, lengths around
// the tiles, several sequences with permuted and new rows, snapshots, strided and permuted sources, states written
// into the cache in place, rows copied in between for cells behind the batch's, and bit-equality over thread counts.

#include "cpu_backend.h"
#include "ggml-backend.h"
#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"
#include "ggml.h"
#include "kda-cases.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

using namespace kda_cases;

// the tensors of a graph, its backend and its data
struct runner {
    ggml_context * ctx = ggml_init({ 4 << 20, nullptr, true });
    ggml_backend_t backend;
    ApartBuffers   buffers;
    ggml_cgraph *  graph = nullptr;

    runner(int n_threads, bool use_ref) : backend(cpu_backend()) { cpu_backend_use(backend, n_threads, use_ref); }

    ~runner() {
        ggml_backend_free(backend);
        ggml_free(ctx);
    }

    void allocate(const std::vector<ggml_tensor *> & outputs) {
        graph = ggml_new_graph(ctx);
        for (auto * t : outputs) {
            ggml_build_forward_expand(graph, t);
        }
        buffers.allocate(ctx, backend);
    }

    void run() {
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            abort();
        }
    }
};

// Writes x into a tensor whose rows may lie apart.
template <typename T> static void put(ggml_tensor * t, const std::vector<T> & x) {
    size_t n = 0;
    for (int64_t d = 0; d < t->ne[3]; ++d) {
        for (int64_t c = 0; c < t->ne[2]; ++c) {
            for (int64_t b = 0; b < t->ne[1]; ++b) {
                memcpy((char *) t->data + b * t->nb[1] + c * t->nb[2] + d * t->nb[3], x.data() + n,
                       t->ne[0] * sizeof(T));
                n += t->ne[0];
            }
        }
    }
    if (n != x.size()) {
        abort();
    }
}

struct options {
    int  threads  = 2;
    bool use_ref  = false;
    bool strided  = false;  // sources with gaps full of NaN between their rows
    bool permuted = false;  // sources whose outer dimensions lie in reverse order
    bool in_place = false;  // with a copy of the states into the cache behind
};

// a [a, b, c, d] tensor; strided: a view with twice its rows' length; permuted: laid out as [a, d, c, b]
static ggml_tensor * source(runner & r, const options & o, int64_t a, int64_t b, int64_t c = 1, int64_t d = 1) {
    if (o.permuted) {
        options inner  = o;
        inner.permuted = false;
        return ggml_permute(r.ctx, source(r, inner, a, d, c, b), 0, 3, 2, 1);
    }
    if (!o.strided) {
        return ggml_new_tensor_4d(r.ctx, GGML_TYPE_F32, a, b, c, d);
    }
    ggml_tensor * t = ggml_new_tensor_4d(r.ctx, GGML_TYPE_F32, 2 * a, b, c, d);
    return ggml_view_4d(r.ctx, t, a, b, c, d, t->nb[1], t->nb[2], t->nb[3], a * sizeof(float));
}

// a contiguous one: weights and the cache
static ggml_tensor * weight(runner & r, int64_t a, int64_t b) {
    return source(r, {}, a, b);
}

struct result {
    std::vector<float> out;
    std::vector<float> states;
};

// The copy of the new states into the cache, from row `head` on; with `in_place` the states are read there.
static result compute(runner &                    r,
                      ggml_tensor *               op,
                      ggml_tensor *               cache,
                      int64_t                     n_out,
                      int64_t                     S,
                      int64_t                     n_slots,
                      bool                        in_place,
                      const std::function<void()> fill) {
    const int64_t size  = cache->ne[0];
    const int64_t cells = cache->ne[1] / n_slots;
    ggml_tensor * from  = ggml_view_3d(r.ctx, op, size, S, n_slots, size * 4, size * S * 4, n_out * 4);
    ggml_tensor * to    = ggml_view_3d(r.ctx, cache, size, S, n_slots, cache->nb[1], cells * cache->nb[1], 0);
    ggml_tensor * out   = ggml_view_1d(r.ctx, op, n_out, 0);
    if (in_place) {
        r.allocate({ op, ggml_cpy(r.ctx, from, to), ggml_scale(r.ctx, out, 1.0f) });
    } else {
        r.allocate({ op });
    }
    fill();
    r.run();

    result y;
    y.out.assign((float *) op->data, (float *) op->data + n_out);
    for (int64_t k = 0; k < n_slots; ++k) {
        for (int64_t s = 0; s < S; ++s) {
            const ggml_tensor * t = in_place ? to : from;
            const float *       p = (const float *) ((const char *) t->data + s * t->nb[1] + k * t->nb[2]);
            y.states.insert(y.states.end(), p, p + size);
        }
    }
    return y;
}

// KDA_SCAN and what it reads
struct scan_node {
    ggml_tensor *qkv, *f, *dt, *a, *beta, *gate, *norm, *cache, *rows, *op;

    scan_node(runner & r, const scan_shape & n, const scan_inputs & x, const options & o) {
        const int64_t size = n.D * n.D * n.H;
        qkv                = source(r, o, n.D, 3 * n.H, n.T, n.S);
        f                  = source(r, o, n.D, n.H, n.T, n.S);
        dt                 = weight(r, n.D * n.H, 1);
        a                  = weight(r, 1, n.H);
        beta               = source(r, o, n.H, n.T, n.S);
        gate               = source(r, o, n.D, n.H, n.T, n.S);
        norm               = weight(r, n.D, 1);
        cache              = weight(r, size, x.cache.size() / size);
        rows               = ggml_new_tensor_1d(r.ctx, GGML_TYPE_I32, n.S);
        op = ggml_kda_scan(r.ctx, qkv, f, dt, a, beta, gate, norm, cache, rows, n.K, x.zero_row, x.eps, x.lower_bound);
    }

    void fill(const scan_inputs & x) const {
        put(qkv, x.qkv);
        put(f, x.f);
        put(dt, x.dt_bias);
        put(a, x.a);
        put(beta, x.beta);
        put(gate, x.gate);
        put(norm, x.norm);
        put(cache, x.cache);
        put(rows, x.rows);
    }
};

static result run_scan(const scan_shape & n, const scan_inputs & x, const options & o) {
    runner          r(o.threads, o.use_ref);
    const int64_t   slots = std::min(n.T + 1, n.K);
    const scan_node node(r, n, x, o);
    return compute(r, node.op, node.cache, n.D * n.H * n.T * n.S, n.S, slots, o.in_place, [&] { node.fill(x); });
}

static result run_conv(const conv_shape & n, const conv_inputs & x, const options & o) {
    runner        r(o.threads, o.use_ref);
    const int64_t C      = n.D * n.H;
    const int64_t n_rows = x.cache.size() / (9 * C);
    const int64_t slots  = std::min(n.T + 1, n.K);

    ggml_tensor *in[3], *w[3];
    for (int p = 0; p < 3; ++p) {
        in[p] = source(r, o, C, n.T, n.S);
        w[p]  = ggml_new_tensor_3d(r.ctx, GGML_TYPE_F32, 4, 1, C);
    }
    ggml_tensor * cache = weight(r, 9 * C, n_rows);
    ggml_tensor * rows  = ggml_new_tensor_1d(r.ctx, GGML_TYPE_I32, n.S);
    ggml_tensor * op =
        ggml_kda_conv(r.ctx, in[0], in[1], in[2], w[0], w[1], w[2], cache, rows, n.D, n.K, x.zero_row, x.eps);

    return compute(r, op, cache, 3 * C * n.T * n.S, n.S, slots, o.in_place, [&] {
        for (int p = 0; p < 3; ++p) {
            put(in[p], x.x[p]);
            put(w[p], x.w[p]);
        }
        put(cache, x.cache);
        put(rows, x.rows);
    });
}

static int    n_tests, n_failed;
static double worst;

template <typename Result>
static void
compare(const std::string & name, const result & got, const Result & want, int64_t slots, int64_t K, double limit) {
    const size_t n_states = want.states.size() / K * slots;
    const double e_out    = nmse(got.out.data(), want.out.data(), want.out.size());
    const double e_state  = nmse(got.states.data(), want.states.data(), n_states);
    const double e        = std::max(e_out, e_state);
    const bool   ok       = e_out <= limit && e_state <= limit;
    worst                 = ok ? std::max(worst, e) : worst;
    n_tests++;
    if (!ok) {
        n_failed++;
        printf("FAIL %s: NMSE of the output %.2e, of the states %.2e, limit %.0e\n", name.c_str(), e_out, e_state,
               limit);
    }
}

static void test_scan(const scan_shape & n, const std::string & gate, double lower_bound, bool new_seq, options o) {
    if (!chosen()) {
        return;
    }
    const scan_inputs x    = make_scan(n, gate, lower_bound, new_seq, o.in_place);
    const scan_result want = scan(n, x);
    char              name[200];
    snprintf(name, sizeof(name),
             "scan D=%d H=%d T=%d S=%d K=%d gate=%s bound=%g new=%d strided=%d permuted=%d in_place=%d", (int) n.D,
             (int) n.H, (int) n.T, (int) n.S, (int) n.K, gate.c_str(), lower_bound, new_seq, o.strided, o.permuted,
             o.in_place);

    std::vector<float> first;
    for (const int threads : { 2, 1, 3, 7 }) {
        o.threads      = threads;
        const result y = run_scan(n, x, o);
        if (first.empty()) {
            compare(name, y, want, std::min(n.T + 1, n.K), n.K, 1e-11);
            first = y.out;
            first.insert(first.end(), y.states.begin(), y.states.end());
        } else {
            std::vector<float> again = y.out;
            again.insert(again.end(), y.states.begin(), y.states.end());
            n_tests++;
            if (memcmp(first.data(), again.data(), first.size() * sizeof(float)) != 0) {
                n_failed++;
                printf("FAIL %s: %d threads give other bits\n", name, threads);
            }
        }
    }
    o.use_ref = true;
    compare(std::string(name) + " plain", run_scan(n, x, o), want, std::min(n.T + 1, n.K), n.K, 1e-11);
}

static void test_conv(const conv_shape & n, bool new_seq, options o) {
    if (!chosen()) {
        return;
    }
    const conv_inputs x    = make_conv(n, new_seq, o.in_place);
    const conv_result want = conv(n, x);
    char              name[200];
    snprintf(name, sizeof(name), "conv D=%d H=%d T=%d S=%d K=%d new=%d strided=%d permuted=%d in_place=%d", (int) n.D,
             (int) n.H, (int) n.T, (int) n.S, (int) n.K, new_seq, o.strided, o.permuted, o.in_place);
    std::vector<float> first;
    for (const int threads : { 2, 1, 7 }) {
        o.threads      = threads;
        const result y = run_conv(n, x, o);
        if (first.empty()) {
            compare(name, y, want, std::min(n.T + 1, n.K), n.K, 1e-12);
            first = y.out;
        } else if (n_tests++; first != y.out) {
            n_failed++;
            printf("FAIL %s: %d threads give other bits\n", name, threads);
        }
    }
    o.use_ref = true;
    compare(std::string(name) + " plain", run_conv(n, x, o), want, std::min(n.T + 1, n.K), n.K, 1e-12);
}

// Between operator and copy, rows are gathered for the cells behind the batch's, as llama.cpp does when n_rs > n_seqs:
// one sequence, in row 1, of a cache of five rows; rows 2 and 3 take over what rows[0] and rows[1] held, or zeros.
struct extra_rows {
    int32_t from[2];
    int32_t zero_row;  // filled with zeros first; -1: none
    bool    elided;    // may the operator write the cache itself?
};

static void test_extra_rows(const extra_rows & extra, int64_t T) {
    const scan_shape n = { 64, 2, T, 1, 1 };
    scan_inputs      x = make_scan(n, "ordinary", -INFINITY, false, false);
    x.cache            = normal(n.D * n.D * n.H * 5, 0, 0.3f);
    x.rows             = { 1 };
    x.zero_row         = extra.zero_row;

    runner                     r(2, false);
    const int64_t              size  = n.D * n.D * n.H;
    const int64_t              n_out = n.D * n.H * T;
    const scan_node            node(r, n, x, {});
    ggml_tensor * const        cache = node.cache;
    ggml_tensor * const        op    = node.op;
    ggml_tensor *              moved = ggml_new_tensor_1d(r.ctx, GGML_TYPE_I32, 2);
    std::vector<ggml_tensor *> nodes = { op };
    if (extra.zero_row >= 0) {
        ggml_tensor * row = ggml_view_1d(r.ctx, cache, size, extra.zero_row * cache->nb[1]);
        nodes.push_back(ggml_fill_inplace(r.ctx, row, 0.0f));
    }
    ggml_tensor * behind = ggml_view_2d(r.ctx, cache, size, 2, cache->nb[1], 2 * cache->nb[1]);
    nodes.push_back(ggml_cpy(r.ctx, ggml_get_rows(r.ctx, cache, moved), behind));
    ggml_tensor * from = ggml_view_3d(r.ctx, op, size, 1, 1, size * 4, size * 4, n_out * 4);
    ggml_tensor * to   = ggml_view_3d(r.ctx, cache, size, 1, 1, cache->nb[1], 5 * cache->nb[1], cache->nb[1]);
    nodes.push_back(ggml_cpy(r.ctx, from, to));
    nodes.push_back(ggml_scale(r.ctx, ggml_view_1d(r.ctx, op, n_out, 0), 1.0f));
    r.allocate(nodes);
    node.fill(x);
    put(moved, std::vector<int32_t>(extra.from, extra.from + 2));
    r.run();

    std::vector<float> want = x.cache;
    const auto         row  = [&](int32_t i) { return want.begin() + i * size; };
    if (extra.zero_row >= 0) {
        std::fill_n(row(extra.zero_row), size, 0.0f);
    }
    std::vector<float> gathered;
    for (const int32_t i : extra.from) {
        gathered.insert(gathered.end(), row(i), row(i) + size);
    }
    std::copy(gathered.begin(), gathered.end(), row(2));
    const scan_result y = scan(n, x);
    std::copy(y.states.begin(), y.states.end(), row(1));

    const float * got    = (const float *) cache->data;
    const bool    elided = std::isnan(((const float *) op->data)[n_out]);  // its states were left unwritten
    n_tests++;
    if (!(nmse(got, want.data(), want.size()) <= 1e-11) || elided != extra.elided) {
        n_failed++;
        printf("FAIL extra rows from %d and %d, zeros in %d, T=%d: NMSE %.1e, elided %d\n", extra.from[0],
               extra.from[1], extra.zero_row, (int) T, nmse(got, want.data(), want.size()), elided);
    }
}

int main() {
    for (const int64_t D : { 32, 64, 96, 128, 256 }) {
        for (const int64_t T : { 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100 }) {
            for (const int64_t K : { 1, 4 }) {
                options o;
                o.strided  = T % 2;
                o.permuted = T % 3 == 1;
                for (const bool in_place : { false, true }) {
                    o.in_place = in_place;
                    test_scan({ D, 2, T, 2, K }, "ordinary", -INFINITY, T % 3 == 0, o);
                    test_conv({ D, 2, T, 3, K }, T % 3 == 0, o);
                }
            }
        }
    }
    for (const char * gate : gates) {
        for (const int64_t T : { 1, 5, 64, 90 }) {
            for (const double bound : { -(double) INFINITY, -5.0 }) {
                test_scan({ 128, 2, T, 3, 2 }, gate, bound, true, {});
                test_scan({ 64, 1, T, 1, 1 }, gate, bound, false, {});
            }
        }
    }
    const extra_rows extras[] = {
        { { 3, 4 }, -1, true },
        { { 0, 4 }, 4, true },    // a new sequence takes row 0's place in row 2: zeros come from row 4
        { { 1, 4 }, -1, false },  // reads the row whose new state the operator would have written
        { { 0, 4 }, 1, false },   // the row of zeros is the one written
    };
    for (const extra_rows & extra : extras) {
        for (const int64_t T : { 1, 40 }) {
            test_extra_rows(extra, T);
        }
    }
    printf("%d checks, %d failed; largest NMSE that passed %.1e\n", n_tests, n_failed, worst);
    return n_failed != 0;
}
