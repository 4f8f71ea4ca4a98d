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

// Between operator and copy, rows are gathered for the cells after the batch's, as llama.cpp does when n_rs > n_seqs:
// one sequence, in row 1, of a cache of five rows; rows 2 and 3 receive the contents of rows[0] and rows[1], or zeros.
struct extra_rows {
    int32_t from[2];
    int32_t zero_row;  // filled with zeros first; -1: none
    bool    elided;    // whether the operator may write to the cache itself
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
    const auto                 make  = [&](auto... ne) { return source(r, {}, ne...); };
    const scan_node            node(r.ctx, n, x, make);
    ggml_tensor * const        cache = node.cache;
    ggml_tensor * const        op    = node.op;
    ggml_tensor *              moved = ggml_new_tensor_1d(r.ctx, GGML_TYPE_I32, 2);
    std::vector<ggml_tensor *> nodes = { op };
    if (extra.zero_row >= 0) {
        ggml_tensor * row = ggml_view_1d(r.ctx, cache, size, extra.zero_row * cache->nb[1]);
        nodes.push_back(ggml_fill_inplace(r.ctx, row, 0.0f));
    }
    ggml_tensor * others = ggml_view_2d(r.ctx, cache, size, 2, cache->nb[1], 2 * cache->nb[1]);
    nodes.push_back(ggml_cpy(r.ctx, ggml_get_rows(r.ctx, cache, moved), others));
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
    const bool    elided = std::isnan(((const float *) op->data)[n_out]);  // its states were not written to the result
    const double  error  = nmse(got, want.data(), want.size());
    expect(error <= 1e-11 && elided == extra.elided,
           text("extra rows from %d and %d, zeros in %d, T=%d: NMSE %.1e, elided %d", extra.from[0], extra.from[1],
                extra.zero_row, (int) T, error, elided));
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
        { { 0, 4 }, 4, true },    // a new sequence replaces row 0 in row 2: zeros are read from row 4
        { { 1, 4 }, -1, false },  // reads the row whose new state the operator would have overwritten
        { { 0, 4 }, 1, false },   // the row of zeros is the row written
    };
    for (const extra_rows & extra : extras) {
        for (const int64_t T : { 1, 40 }) {
            test_extra_rows(extra, T);
        }
    }
    printf("largest NMSE that passed %.1e\n", worst);
    return report();
}
