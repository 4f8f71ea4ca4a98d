// The KDA operators on an emulated GPU, Metal or CUDA, against their float64 oracles: lengths around the tiles, several
// sequences with permuted and new rows, snapshots, strided and permuted sources, hostile gates, states that the device
// writes into the cache itself, and what it must not compute. Prints a hash of all results.
//
// Arguments: the backend's library, and the group of cases: conv, scan, gates, memory, split, rows, kept, extra or
// refused; or conv or scan and the sizes D H T S K of one case, whose states are written into the cache.

#include "check.h"
#include "common/ggml-op-marks.h"
#include "ggml-backend.h"
#include "kda-nodes.h"

#include <cmath>

using namespace kda_cases;

static constexpr double LIMIT = 1e-7;

static ggml_backend_t backend;

// Why a copy of the states has to be computed.
enum class keep { no, marked, output, read, read_by_view, elsewhere };

struct options {
    int64_t layouts  = 0;      // not 0: each source has another layout
    bool    copied   = false;  // followed by a copy of the states into the cache
    bool    own_rows = false;  // every sequence continues the row that it writes
    int64_t before   = 0;      // number of nodes before the operator
    bool    split    = false;  // operator and copy are in different parts of the graph
    int64_t first    = 0;      // the row that the first sequence writes
    int64_t gap      = 0;      // floats between the rows of the cache
    keep    kept     = keep::no;
};

// The number of rows of each slot.
template <typename Shape> static int64_t n_cells(const Shape & n) {
    return n.S + 2;
}

static bool on_metal() {
    return strcmp(ggml_backend_name(backend), "MTL0") == 0;
}

// Whether the device writes the new states into the cache: the copy is in the operator's part of the graph and nothing
// else needs it, and no sequence continues a row that is written for another one. On CUDA, rows of slots that are not
// written count, too.
template <typename Shape, typename Inputs> static bool in_place(const Shape & n, const Inputs & x, const options & o) {
    for (int64_t s = 0; s < n.S; ++s) {
        for (int64_t slot = 0; slot < (on_metal() ? std::min(n.T + 1, n.K) : n.K) && x.rows[s] != x.zero_row; ++slot) {
            const int64_t writer = x.rows[s] - o.first - slot * n_cells(n);
            if (writer >= 0 && writer < n.S && writer != s) {
                return false;
            }
        }
    }
    static const bool elides = getenv("GGML_METAL_FUSION_DISABLE") == nullptr;
    return elides && o.copied && !o.split && o.kept == keep::no;
}

// A [a, b, c, d] tensor. Odd layouts: a view of rows of twice the length; each third one: stored as [a, d, c, b].
static ggml_tensor * source(ggml_context * ctx, int64_t layout, int64_t a, int64_t b, int64_t c = 1, int64_t d = 1) {
    if (layout % 3 == 1) {
        return ggml_permute(ctx, source(ctx, layout % 2 * 3, a, d, c, b), 0, 3, 2, 1);
    }
    if (layout % 2 == 0) {
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

// What a tensor's memory contains, with the gaps between its rows.
static std::vector<float> values_of(const ggml_tensor * t) {
    std::vector<float> values(ggml_nbytes(t) / sizeof(float));
    ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
    return values;
}

// The device's memory is full of NaN at first.
template <typename Node, typename Shape, typename Inputs>
static result run(const Shape & n, const Inputs & x, const options & o) {
    ggml_context * ctx      = ggml_init({ 4 << 20, nullptr, true });
    ggml_cgraph *  graph    = ggml_new_graph(ctx);
    int64_t        n_source = 0;
    const Node     node(ctx, n, x,
                        [&](auto... ne) { return source(ctx, o.layouts == 0 ? 0 : o.layouts + n_source++, ne...); });
    node.cache->nb[1] += o.gap * sizeof(float);
    node.cache->nb[2] = node.cache->nb[3] = node.cache->ne[1] * node.cache->nb[1];
    const int64_t size                    = node.cache->ne[0];
    const int64_t n_slots                 = std::min(n.T + 1, n.K);
    const int64_t n_out                   = ggml_nelements(node.op) - size * n.S * n.K;
    const size_t  row                     = node.cache->nb[1];
    ggml_tensor * from  = ggml_view_3d(ctx, node.op, size, n.S, n_slots, size * 4, size * n.S * 4, n_out * 4);
    ggml_tensor * to    = o.kept == keep::elsewhere
                              ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, size, n.S, n_slots)
                              : ggml_view_3d(ctx, node.cache, size, n.S, n_slots, row, n_cells(n) * row, o.first * row);
    ggml_tensor * other = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 4);
    ggml_tensor * after = nullptr;
    ggml_tensor * read  = nullptr;
    for (int64_t i = 0; i < o.before; ++i) {
        ggml_build_forward_expand(graph, ggml_scale(ctx, other, i));
    }
    if (o.kept == keep::marked) {
        ggml_op_set_mark(node.op, GGML_OP_MARK_KEEP_COPY);
    } else if (o.kept == keep::output) {
        ggml_set_output(node.op);
    } else if (o.kept == keep::read) {
        read = ggml_scale(ctx, from, 1.0f);
    } else if (o.kept == keep::read_by_view) {
        read = ggml_scale(ctx, ggml_view_1d(ctx, node.op, ggml_nelements(from), n_out * 4), 1.0f);
    }
    ggml_build_forward_expand(graph, node.op);
    if (o.copied) {
        // the nodes after the copy read what the operator has written in its place
        after = ggml_scale(ctx, ggml_view_1d(ctx, node.cache, ggml_nelements(node.cache), 0), 1.0f);
        ggml_build_forward_expand(graph, ggml_cpy(ctx, from, to));
        ggml_build_forward_expand(graph, after);
        ggml_build_forward_expand(graph, ggml_scale(ctx, ggml_view_1d(ctx, node.op, n_out, 0), 1.0f));
    }
    if (read) {
        ggml_build_forward_expand(graph, read);
    }
    const ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    ggml_backend_buffer_clear(buffer, 0xff);
    node.fill(x);
    put(other, std::vector<float>(4));
    CHECK(ggml_backend_supports_op(backend, node.op));
    CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);

    result                   y;
    const std::vector<float> data = values_of(node.op), cache = values_of(node.cache);
    const ggml_tensor *      states = o.copied ? to : from;
    const std::vector<float> stored = values_of(states);
    y.out.assign(data.begin(), data.begin() + n_out);
    y.in_place = std::all_of(data.begin() + n_out, data.end(), [](float f) { return std::isnan(f); });
    for (int64_t k = 0; k < n_slots; ++k) {
        for (int64_t s = 0; s < n.S; ++s) {
            const auto p = stored.begin() + (s * states->nb[1] + k * states->nb[2]) / sizeof(float);
            y.states.insert(y.states.end(), p, p + size);
        }
    }
    if (after) {
        const std::vector<float> seen = values_of(after);
        CHECK(std::equal(seen.begin(), seen.end(), cache.begin(),
                         [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }));
    }
    if (read) {
        CHECK(memcmp(values_of(read).data(), y.states.data(), ggml_nbytes(read)) == 0);
    }
    for (int64_t r = 0; r < node.cache->ne[1]; ++r) {
        const int64_t slot = (r - o.first + n_cells(n)) / n_cells(n) - 1, s = r - o.first - slot * n_cells(n);
        const bool    written = o.copied && o.kept != keep::elsewhere && slot >= 0 && slot < n_slots && s < n.S;
        CHECK(written || memcmp(&cache[r * row / sizeof(float)], &x.cache[r * size], size * sizeof(float)) == 0);
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
    return text("%s D=%d H=%d T=%d S=%d K=%d new=%d layouts=%d copied=%d own_rows=%d first=%d gap=%d kept=%d", what,
                (int) n.D, (int) n.H, (int) n.T, (int) n.S, (int) n.K, new_seq, (int) o.layouts, o.copied, o.own_rows,
                (int) o.first, (int) o.gap, (int) o.kept);
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
    o.layouts  = i % 6;
    o.copied   = i % 4 < 2;
    o.own_rows = i % 4 == 0;
    return o;
}

static const options CONTINUED = [] {
    options o;
    o.copied = o.own_rows = true;
    return o;
}();

// The variants have periods of 12, which 5 n passes through: each length meets each of them.
static void test_convs() {
    int64_t n = 0;
    for (const int64_t D : { 64, 128 }) {
        for (const int64_t T : { 1, 2, 3, 15, 16, 17, 18, 33 }) {
            int64_t i = 5 * n++;
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
    int64_t n = 0;
    for (const int64_t D : { 64, 128 }) {
        for (const int64_t T : { 1, 2, 7, 8, 9, 16, 17 }) {
            int64_t i = 5 * n++;
            for (const int64_t K : { 1, 4 }) {
                test_scan({ D, 2, T, 1 + n / 2 % 3, K }, "ordinary", -INFINITY, i % 3 == 0, vary(i));
                ++i;
            }
        }
    }
}

static void test_gates() {
    int64_t i = 0;
    for (const char * gate : gates) {
        for (const double bound : { -(double) INFINITY, i % 4 < 2 ? -5.0 : -1.5 }) {
            test_scan({ 128, 1, 10, 2, 2 }, gate, bound, true, vary(i));
            test_scan({ 64, 2, 40, 1, 1 }, gate, bound, false, vary(i));
            ++i;
        }
    }
    test_scan({ 64, 2, 9, 1, 1 }, "small", -INFINITY, false, {});
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

// The inputs with these rows, and a cache in which they are.
template <typename Inputs>
static Inputs with_rows(Inputs x, std::vector<int32_t> rows, int32_t zero_row, int64_t n_rows) {
    const int64_t size = x.cache.size() / ((x.rows.size() + 2) * 2);
    x.rows             = std::move(rows);
    x.zero_row         = zero_row;
    x.cache            = normal(size * n_rows, 0, 0.3f);
    if (zero_row >= 0) {
        std::fill_n(x.cache.begin() + zero_row * size, size, NAN);
    }
    return x;
}

// Which rows the sequences continue, if they write the rows 1 to 3 and 6 to 8: in two slots, of three.
static void test_rows() {
    const struct {
        std::vector<int32_t> rows;
        int32_t              zero_row;
    } cases[] = {
        { { 1, 2, 3 }, -1 },     // their own
        { { 6, 7, 8 }, -1 },     // in the other slot
        { { 3, 1, 2 }, -1 },     // of others
        { { 7, 6, 8 }, -1 },     //
        { { 2, 2, 2 }, -1 },     // the same
        { { 1, 2, 7 }, -1 },     //
        { { 0, 4, 0 }, -1 },     // not written: in front of those that are, and between the slots
        { { 12, 11, 13 }, -1 },  // not written: in the last slot
        { { 2, 2, 3 }, 2 },      // new ones, whose row is written for another one
        { { 1, 3, 3 }, 3 },      //
    };
    options o;
    o.copied = true;
    o.first  = 1;
    for (const auto & each : cases) {
        const conv_shape  c  = { 64, 1, 1, 3, 3 };
        const scan_shape  n  = { 64, 1, 1, 3, 3 };
        const conv_inputs xc = with_rows(make_conv(c, false, true), each.rows, each.zero_row, 3 * n_cells(c));
        const scan_inputs xs =
            with_rows(make_scan(n, "ordinary", -INFINITY, false, true), each.rows, each.zero_row, 3 * n_cells(n));
        const std::string rows = text(" rows %d %d %d", each.rows[0], each.rows[1], each.rows[2]);
        o.gap                  = o.gap == 0 ? 4 : 0;
        judge(describe("conv", c, each.zero_row >= 0, o) + rows, c, conv(c, xc), run<conv_node>(c, xc, o),
              in_place(c, xc, o));
        judge(describe("scan", n, each.zero_row >= 0, o) + rows, n, scan(n, xs), run<scan_node>(n, xs, o),
              in_place(n, xs, o));
    }
    // more sequences than lanes: none, one of the first, or one of the last continues the row of another one
    for (const int64_t cross : { -1, 1, 33 }) {
        const conv_shape c = { 64, 1, 1, 35, 1 };
        conv_inputs      x = make_conv(c, false, true);
        if (cross >= 0) {
            x.rows[cross] = 5;
        }
        judge(describe("conv", c, false, CONTINUED) + text(" cross %d", (int) cross), c, conv(c, x),
              run<conv_node>(c, x, CONTINUED), in_place(c, x, CONTINUED));
    }
}

// On CUDA the operator also elides the copy if rows are gathered in between: into memory of its own, before it computes.
static void test_extra_rows() {
    for (const extra_rows & extra : all_extra_rows) {
        for (const int64_t T : { 1, 40 }) {
            ggml_context *       ctx = ggml_init({ 4 << 20, nullptr, true });
            const gathered_scan  g(extra, T);
            const gathered_nodes nodes(ctx, g, [&](auto... ne) { return source(ctx, 0, ne...); });
            ggml_cgraph *        graph = ggml_new_graph(ctx);
            for (ggml_tensor * t : nodes.all) {
                ggml_build_forward_expand(graph, t);
            }
            const ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
            ggml_backend_buffer_clear(buffer, 0xff);
            nodes.fill(g);
            CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);
            const std::vector<float> cache = values_of(nodes.scan.cache), want = g.want();
            const bool               elided = std::isnan(values_of(nodes.scan.op)[g.n_out()]);
            const double             error  = nmse(cache.data(), want.data(), want.size());
            expect(error <= LIMIT && elided == !on_metal(), g.name() + text(": NMSE %.1e, elided %d", error, elided));
            ggml_backend_buffer_free(buffer);
            ggml_free(ctx);
        }
    }
}

static void test_kept() {
    for (const keep kept : { keep::marked, keep::output, keep::read, keep::read_by_view, keep::elsewhere }) {
        options o = CONTINUED;
        o.kept    = kept;
        test_conv({ 64, 1, 2, 2, 2 }, false, o);
        test_scan({ 64, 1, 2, 2, 2 }, "ordinary", -INFINITY, false, o);
    }
}

// `any`: whether the device has the operator if source i has strides, or an offset, that are multiples of one float or
// two only.
static void test_strides(ggml_tensor * op, int i, bool any) {
    ggml_tensor * const given = op->src[i];
    for (const int floats : { 1, 2 }) {
        for (int dim = 1; dim < GGML_MAX_DIMS; ++dim) {
            ggml_tensor t = *given;
            t.nb[dim] += floats * sizeof(float);
            op->src[i] = &t;
            expect(ggml_backend_supports_op(backend, op) == any,
                   text("%s: stride %d of source %d, %d floats more", ggml_op_name(op->op), dim, i, floats));
        }
    }
    op->src[i] = given;
}

static void test_offset(ggml_tensor * op, int i, bool any) {
    ggml_tensor * const given = op->src[i];
    for (const int floats : { 1, 2 }) {
        ggml_tensor t = *given;
        t.view_offs += floats * sizeof(float);
        op->src[i] = &t;
        expect(ggml_backend_supports_op(backend, op) == any,
               text("%s: offset of source %d, %d floats more", ggml_op_name(op->op), i, floats));
    }
    op->src[i] = given;
}

// Kernels access four floats at once. On Metal there are kernels for two head sizes, of which that of KDA_SCAN needs eight
// threads for each value, and weights are vectors, too.
static void test_refused() {
    const char *   most  = getenv("KIMI_METAL_MAX_THREADS");
    const int64_t  limit = most ? atol(most) : 1024;
    const bool     metal = on_metal();
    ggml_context * ctx   = ggml_init({ 4 << 20, nullptr, true });
    const auto     dense = [&](auto... ne) { return source(ctx, 0, ne...); };
    for (const int64_t D : { 32, 64, 96, 128, 192, 256 }) {
        const conv_shape c = { D, 2, 2, 2, 1 };
        const scan_shape n = { D, 2, 2, 2, 1 };
        const conv_node  conv(ctx, c, make_conv(c, false, false), dense);
        const scan_node  scan(ctx, n, make_scan(n, "ordinary", -INFINITY, false, false), dense);
        const bool       has_kernels = metal ? D == 64 || D == 128 : D != 192;
        expect(ggml_backend_supports_op(backend, conv.op) == has_kernels, text("KDA_CONV, head size %d", (int) D));
        expect(ggml_backend_supports_op(backend, scan.op) == (has_kernels && (!metal || 8 * D <= limit)),
               text("KDA_SCAN, head size %d", (int) D));
        if (D == 64) {
            for (int i = GGML_KDA_CONV_Q; i <= GGML_KDA_CONV_CACHE; ++i) {
                if (metal || i < GGML_KDA_CONV_WQ || i > GGML_KDA_CONV_WV) {
                    test_strides(conv.op, i, false);
                }
                test_offset(conv.op, i, false);
            }
            for (const int i : { GGML_KDA_SCAN_QKV, GGML_KDA_SCAN_F, GGML_KDA_SCAN_GATE, GGML_KDA_SCAN_CACHE }) {
                test_strides(scan.op, i, false);
                test_offset(scan.op, i, false);
            }
            test_offset(scan.op, GGML_KDA_SCAN_DT_BIAS, !metal);
            test_offset(scan.op, GGML_KDA_SCAN_NORM, !metal);
            test_strides(scan.op, GGML_KDA_SCAN_BETA, true);
            test_offset(scan.op, GGML_KDA_SCAN_BETA, true);
            test_offset(scan.op, GGML_KDA_SCAN_A, true);
        }
    }
    ggml_free(ctx);
}

int main(int argc, char ** argv) {
    const struct {
        const char * name;
        void (*run)();
    } groups[] = {
        { "conv", test_convs },    { "scan", test_scans },       { "gates", test_gates },
        { "memory", test_memory }, { "split", test_split },      { "rows", test_rows },
        { "kept", test_kept },     { "extra", test_extra_rows }, { "refused", test_refused },
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
