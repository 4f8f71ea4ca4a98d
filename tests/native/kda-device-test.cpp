// The KDA operators on a device of ggml, against their float64 oracles: lengths around the tiles, several sequences
// with permuted and new rows, snapshots, strided and permuted sources, hostile gates, and states that the device writes
// into the cache itself. Prints a hash of all results.
//
// Arguments: the backend's library, and the group of cases: conv, scan, gates, memory or split; or conv or scan and the
// sizes D H T S K of one case, whose states are written into the cache.

#include "check.h"
#include "ggml-backend.h"
#include "kda-nodes.h"

#include <cmath>

using namespace kda_cases;

static constexpr double LIMIT = 1e-7;

static ggml_backend_t backend;

struct options {
    bool    strided  = false;  // sources with gaps full of NaN between their rows
    bool    permuted = false;  // sources whose outer dimensions are in reverse order
    bool    copied   = false;  // followed by a copy of the states into the cache
    bool    own_rows = false;  // every sequence continues the row that it writes
    int64_t before   = 0;      // number of nodes before the operator
    bool    split    = false;  // operator and copy are in different parts of the graph
};

// Whether the device writes the new states into the cache: the copy is in the operator's part of the graph, and no
// sequence continues a row that is written for another one.
template <typename Shape, typename Inputs> static bool in_place(const Shape & n, const Inputs & x, const options & o) {
    const int64_t cells = n.S + 2;  // of each slot
    for (int64_t s = 0; s < n.S && n.S > 1; ++s) {
        const int64_t writer = x.rows[s] % cells;
        if (x.rows[s] != x.zero_row && writer < n.S && writer != s) {
            return false;
        }
    }
    static const bool elides = getenv("GGML_METAL_FUSION_DISABLE") == nullptr;
    return elides && o.copied && !o.split;
}

// a [a, b, c, d] tensor; strided: a view of rows of twice the length; permuted: stored as [a, d, c, b]
static ggml_tensor * source(ggml_context * ctx, const options & o, int64_t a, int64_t b, int64_t c = 1, int64_t d = 1) {
    if (o.permuted) {
        options inner  = o;
        inner.permuted = false;
        return ggml_permute(ctx, source(ctx, inner, a, d, c, b), 0, 3, 2, 1);
    }
    if (!o.strided) {
        return ggml_new_tensor_4d(ctx, GGML_TYPE_F32, a, b, c, d);
    }
    ggml_tensor * t = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, 2 * a, b, c, d);
    return ggml_view_4d(ctx, t, a, b, c, d, t->nb[1], t->nb[2], t->nb[3], a * sizeof(float));
}

struct result {
    std::vector<float> out;
    std::vector<float> states;    // of the slots that have to be written
    bool               in_place;  // whether the states in the operator's result were not written
};

static uint64_t hash = 14695981039346656037u;

static void add_to_hash(const std::vector<float> & values) {
    for (const float value : values) {
        uint32_t bits;
        memcpy(&bits, &value, sizeof(bits));
        hash = (hash ^ bits) * 1099511628211u;
    }
}

// The device's memory is that of the host, and is full of NaN at first.
template <typename Node, typename Shape, typename Inputs>
static result run(const Shape & n, const Inputs & x, const options & o) {
    ggml_context * ctx   = ggml_init({ 4 << 20, nullptr, true });
    ggml_cgraph *  graph = ggml_new_graph(ctx);
    const Node     node(ctx, n, x, [&](auto... ne) { return source(ctx, o, ne...); });
    const int64_t  size    = node.cache->ne[0];
    const int64_t  n_slots = std::min(n.T + 1, n.K);
    const int64_t  n_out   = ggml_nelements(node.op) - size * n.S * n.K;
    const size_t   row     = node.cache->nb[1];
    const int64_t  cells   = node.cache->ne[1] / n_slots;
    ggml_tensor *  from    = ggml_view_3d(ctx, node.op, size, n.S, n_slots, size * 4, size * n.S * 4, n_out * 4);
    ggml_tensor *  to      = ggml_view_3d(ctx, node.cache, size, n.S, n_slots, row, cells * row, 0);
    ggml_tensor *  other   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 4);
    ggml_tensor *  after   = nullptr;
    for (int64_t i = 0; i < o.before; ++i) {
        ggml_build_forward_expand(graph, ggml_scale(ctx, other, i));
    }
    ggml_build_forward_expand(graph, node.op);
    if (o.copied) {
        // the nodes after the copy read what the operator has written in its place
        after = ggml_scale(ctx, ggml_view_1d(ctx, node.cache, ggml_nelements(node.cache), 0), 1.0f);
        ggml_build_forward_expand(graph, ggml_cpy(ctx, from, to));
        ggml_build_forward_expand(graph, after);
        ggml_build_forward_expand(graph, ggml_scale(ctx, ggml_view_1d(ctx, node.op, n_out, 0), 1.0f));
    }
    const ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    ggml_backend_buffer_clear(buffer, 0xff);
    node.fill(x);
    put(other, std::vector<float>(4));
    CHECK(ggml_backend_supports_op(backend, node.op));
    CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);

    result              y;
    const float * const data = (const float *) node.op->data;
    y.out.assign(data, data + n_out);
    y.in_place = std::all_of(data + n_out, data + ggml_nelements(node.op), [](float f) { return std::isnan(f); });
    for (int64_t k = 0; k < n_slots; ++k) {
        for (int64_t s = 0; s < n.S; ++s) {
            const float * p = (const float *) row_of(o.copied ? to : from, s, k);
            y.states.insert(y.states.end(), p, p + size);
        }
    }
    for (int64_t i = 0; after && i < ggml_nelements(after); ++i) {
        const float seen = ((const float *) after->data)[i], kept = ((const float *) node.cache->data)[i];
        CHECK(seen == kept || (std::isnan(seen) && std::isnan(kept)));
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    add_to_hash(y.out);
    add_to_hash(y.states);
    return y;
}

static double worst;

template <typename Shape, typename Want>
static void
judge(const std::string & name, const Shape & n, const Want & want, const result & got, bool in_place = false) {
    const size_t n_states = want.states.size() / n.K * std::min(n.T + 1, n.K);
    const double e_out    = nmse(got.out.data(), want.out.data(), want.out.size());
    const double e_state  = nmse(got.states.data(), want.states.data(), n_states);
    const bool   ok       = e_out <= LIMIT && e_state <= LIMIT;
    worst                 = ok ? std::max({ worst, e_out, e_state }) : worst;
    expect(ok && got.in_place == in_place, name + text(": NMSE of the output %.2e, of the states %.2e, limit %.0e; "
                                                       "states in place: %d instead of %d",
                                                       e_out, e_state, LIMIT, got.in_place, in_place));
}

template <typename Shape>
static std::string describe(const char * what, const Shape & n, bool new_seq, const options & o) {
    return text("%s D=%d H=%d T=%d S=%d K=%d new=%d strided=%d permuted=%d copied=%d own_rows=%d", what, (int) n.D,
                (int) n.H, (int) n.T, (int) n.S, (int) n.K, new_seq, o.strided, o.permuted, o.copied, o.own_rows);
}

static void test_scan(const scan_shape & n, const char * gate, double bound, bool new_seq, const options & o) {
    const scan_inputs x = make_scan(n, gate, bound, new_seq, o.own_rows);
    judge(describe("scan", n, new_seq, o) + text(" gate=%s bound=%g", gate, bound), n, scan(n, x),
          run<scan_node>(n, x, o), in_place(n, x, o));
}

static void test_conv(const conv_shape & n, bool new_seq, const options & o) {
    const conv_inputs x = make_conv(n, new_seq, o.own_rows);
    judge(describe("conv", n, new_seq, o), n, conv(n, x), run<conv_node>(n, x, o), in_place(n, x, o));
}

static options vary(int64_t i) {
    options o;
    o.strided  = i % 2;
    o.permuted = i % 3 == 1;
    o.copied   = i % 4 < 2;
    o.own_rows = i % 4 == 0;
    return o;
}

static const options CONTINUED = [] {
    options o;
    o.copied = o.own_rows = true;
    return o;
}();

static void test_convs() {
    int64_t i = 0;
    for (const int64_t D : { 64, 128 }) {
        for (const int64_t T : { 1, 2, 3, 15, 16, 17, 18, 33 }) {
            for (const int64_t K : { 1, 4 }) {
                for (const int64_t S : { 1, 3 }) {
                    test_conv({ D, 3, T, S, K }, i % 3 == 0, vary(i));
                    ++i;
                }
            }
        }
    }
}

static void test_scans() {
    int64_t i = 0;
    for (const int64_t D : { 64, 128 }) {
        for (const int64_t T : { 1, 2, 7, 8, 9, 16, 17 }) {
            for (const int64_t K : { 1, 4 }) {
                test_scan({ D, 2, T, 1 + i % 3, K }, "ordinary", -INFINITY, i % 3 == 0, vary(i));
                ++i;
            }
        }
    }
}

static void test_gates() {
    int64_t i = 0;
    for (const char * gate : gates) {
        for (const double bound : { -(double) INFINITY, -5.0 }) {
            test_scan({ 128, 1, 10, 2, 2 }, gate, bound, true, vary(i));
            test_scan({ 64, 2, 40, 1, 1 }, gate, bound, false, vary(i));
            ++i;
        }
    }
}

// A decay of 1 - 1.2e-4 at every one of 4096 tokens: an error in it accumulates over all of them.
static void test_memory() {
    const scan_shape n = { 64, 1, 4096, 1, 1 };
    scan_inputs      x = make_scan(n, "ordinary", -INFINITY, false, false);
    std::fill(x.f.begin(), x.f.end(), -9.0f);
    std::fill(x.dt_bias.begin(), x.dt_bias.end(), 0.0f);
    std::fill(x.a.begin(), x.a.end(), -1.0f);
    judge("a long memory", n, scan(n, x), run<scan_node>(n, x, {}));
}

// A graph is divided after its first 64 nodes: operator, views and copy are in one part, or in two.
static void test_split() {
    for (const int64_t before : { 60, 61, 63 }) {
        options o = CONTINUED;
        o.before  = before;
        o.split   = before > 60;
        test_scan({ 64, 1, 2, 2, 1 }, "ordinary", -INFINITY, false, o);
    }
}

int main(int argc, char ** argv) {
    const struct {
        const char * name;
        void (*run)();
    } groups[] = {
        { "conv", test_convs },    { "scan", test_scans },  { "gates", test_gates },
        { "memory", test_memory }, { "split", test_split },
    };

    CHECK(argc == 3 || argc == 8);
    const ggml_backend_reg_t reg = ggml_backend_load(argv[1]);
    CHECK(reg);
    backend = ggml_backend_dev_init(ggml_backend_reg_dev_get(reg, 0), nullptr);
    CHECK(backend);
    const std::string chosen = argv[2];
    if (argc == 8) {
        const int64_t D = atol(argv[3]), H = atol(argv[4]), T = atol(argv[5]), S = atol(argv[6]), K = atol(argv[7]);
        if (chosen == "conv") {
            test_conv({ D, H, T, S, K }, false, CONTINUED);
        } else {
            test_scan({ D, H, T, S, K }, "ordinary", -INFINITY, false, CONTINUED);
        }
    } else {
        for (const auto & group : groups) {
            if (chosen == group.name) {
                group.run();
            }
        }
    }
    ggml_backend_free(backend);
    printf("largest NMSE that passed %.1e\n", worst);
    printf("hash %016llx\n", (unsigned long long) hash);
    return report();
}
