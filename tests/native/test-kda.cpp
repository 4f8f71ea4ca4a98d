// The KDA operators against their float64 oracles: ordinary and hostile inputs, every head size, lengths around
// the tiles, several sequences with permuted and new rows, snapshots, strided and permuted sources, states written
// into the cache in place, rows copied in between for cells after the batch's, and bit-equality over thread counts.

#include "cpu_backend.h"
#include "kda-nodes.h"

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

struct options {
    int  threads  = 2;
    bool use_ref  = false;
    bool strided  = false;  // sources with gaps full of NaN between their rows
    bool permuted = false;  // sources whose outer dimensions are in reverse order
    bool in_place = false;  // followed by a copy of the states into the cache
};

// a [a, b, c, d] tensor; strided: a view of rows of twice the length; permuted: stored as [a, d, c, b]
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

struct result {
    std::vector<float> out;
    std::vector<float> states;
};

// With `in_place` the states are read from the rows of the cache to which they are copied, from its first row on.
template <typename Node, typename Shape, typename Inputs>
static result run(const Shape & n, const Inputs & x, const options & o) {
    runner        r(o.threads, o.use_ref);
    const Node    node(r.ctx, n, x, [&](auto... ne) { return source(r, o, ne...); });
    const int64_t size    = node.cache->ne[0];
    const int64_t n_slots = std::min(n.T + 1, n.K);
    const int64_t n_out   = ggml_nelements(node.op) - size * n.S * n.K;
    const size_t  row     = node.cache->nb[1];
    const int64_t cells   = node.cache->ne[1] / n_slots;
    ggml_tensor * from    = ggml_view_3d(r.ctx, node.op, size, n.S, n_slots, size * 4, size * n.S * 4, n_out * 4);
    ggml_tensor * to      = ggml_view_3d(r.ctx, node.cache, size, n.S, n_slots, row, cells * row, 0);
    ggml_tensor * out     = ggml_view_1d(r.ctx, node.op, n_out, 0);
    if (o.in_place) {
        r.allocate({ node.op, ggml_cpy(r.ctx, from, to), ggml_scale(r.ctx, out, 1.0f) });
    } else {
        r.allocate({ node.op });
    }
    node.fill(x);
    r.run();

    result y;
    y.out.assign((float *) node.op->data, (float *) node.op->data + n_out);
    for (int64_t k = 0; k < n_slots; ++k) {
        for (int64_t s = 0; s < n.S; ++s) {
            const float * p = (const float *) row_of(o.in_place ? to : from, s, k);
            y.states.insert(y.states.end(), p, p + size);
        }
    }
    return y;
}

static double worst;

template <typename Want, typename Shape>
static void compare(const std::string & name, const result & got, const Want & want, const Shape & n, double limit) {
    const size_t n_states = want.states.size() / n.K * std::min(n.T + 1, n.K);
    const double e_out    = nmse(got.out.data(), want.out.data(), want.out.size());
    const double e_state  = nmse(got.states.data(), want.states.data(), n_states);
    const bool   ok       = e_out <= limit && e_state <= limit;
    worst                 = ok ? std::max({ worst, e_out, e_state }) : worst;
    expect(ok, name + text(": NMSE of the output %.2e, of the states %.2e, limit %.0e", e_out, e_state, limit));
}

template <typename Shape>
static std::string describe(const char * what, const Shape & n, bool new_seq, const options & o) {
    return text("%s D=%d H=%d T=%d S=%d K=%d new=%d strided=%d permuted=%d in_place=%d", what, (int) n.D, (int) n.H,
                (int) n.T, (int) n.S, (int) n.K, new_seq, o.strided, o.permuted, o.in_place);
}

// The operator with the kernels that ggml selects, bit-identical for any number of threads, and its plain path.
template <typename Node, typename Shape, typename Inputs, typename Want>
static void
test(const std::string & name, const Shape & n, const Inputs & x, const Want & want, double limit, options o) {
    o.threads        = 1;
    const result one = run<Node>(n, x, o);
    compare(name, one, want, n, limit);
    for (const int threads : thread_counts()) {
        o.threads      = threads;
        const result y = run<Node>(n, x, o);
        expect(same_bits(one.out, y.out) && same_bits(one.states, y.states),
               name + text(": %d threads give other bits", threads));
    }
    o.use_ref = true;
    compare(name + " plain", run<Node>(n, x, o), want, n, limit);
}

static void test_scan(const scan_shape & n, const char * gate, double lower_bound, bool new_seq, const options & o) {
    if (chosen()) {
        const scan_inputs x = make_scan(n, gate, lower_bound, new_seq, o.in_place);
        test<scan_node>(describe("scan", n, new_seq, o) + text(" gate=%s bound=%g", gate, lower_bound), n, x,
                        scan(n, x), 1e-11, o);
    }
}

static void test_conv(const conv_shape & n, bool new_seq, const options & o) {
    if (chosen()) {
        const conv_inputs x = make_conv(n, new_seq, o.in_place);
        test<conv_node>(describe("conv", n, new_seq, o), n, x, conv(n, x), 1e-12, o);
    }
}

static void test_extra_rows(const extra_rows & extra, int64_t T) {
    runner               r(2, false);
    const gathered_scan  g(extra, T);
    const auto           dense = [&](auto... ne) { return source(r, {}, ne...); };
    const gathered_nodes nodes(r.ctx, g, dense);
    r.allocate(nodes.all);
    nodes.fill(g);
    r.run();
    const float * op     = (const float *) nodes.scan.op->data;
    const bool    elided = std::isnan(op[g.n_out()]);  // its states were not written to the result
    const double  error  = nmse((const float *) nodes.scan.cache->data, g.want().data(), g.want().size());
    expect(error <= 1e-11 && elided == extra.elided, g.name() + text(": NMSE %.1e, elided %d", error, elided));
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
    for (const extra_rows & extra : all_extra_rows) {
        for (const int64_t T : { 1, 40 }) {
            test_extra_rows(extra, T);
        }
    }
    printf("largest NMSE that passed %.1e\n", worst);
    return report();
}
