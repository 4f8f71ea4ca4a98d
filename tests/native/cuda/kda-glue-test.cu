// ggml's side of the KDA operators on CUDA (kda-ggml.cu): runs graphs of ggml tensors through it and through the
// kernels on the CPU, against float64. Covers non-contiguous tensors, which copies of the states are elided, and which
// nodes are refused. A small interpreter replaces ggml-cuda.cu.

#include "ggml-cuda-standin.cuh"
#include "kda-ggml.cuh"
#include "kda-nodes.h"

#include <memory>

using namespace cuda_emulator;
using namespace kda_cases;

// Tensors, their memory, and the nodes in order.
struct graph {
    ggml_context *                                  ctx = ggml_init({ 4 << 20, nullptr, true });
    ggml_cgraph *                                   nodes;
    std::vector<std::unique_ptr<DeviceArray<char>>> arrays;
    ggml_backend_cuda_context                       cuda{ 0 };
    int                                             n_fused = 0;

    graph() : nodes(ggml_new_graph(ctx)) {}

    ~graph() { ggml_free(ctx); }

    void allocate() {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            if (t->view_src) {
                t->data = (char *) t->view_src->data + t->view_offs;
            } else {
                const bool   ours = t->op == GGML_OP_KDA_CONV || t->op == GGML_OP_KDA_SCAN;
                const size_t size = ours ? ggml_cuda_kda_size(0, t) : ggml_nbytes(t);
                arrays.push_back(std::make_unique<DeviceArray<char>>(size));
                t->data = arrays.back()->data();
                memset(t->data, 0xff, size);  // NaN
            }
        }
    }

    static void copy(const ggml_tensor * from, ggml_tensor * to) {
        for (int64_t c = 0; c < from->ne[2]; ++c) {
            for (int64_t b = 0; b < from->ne[1]; ++b) {
                memcpy(row_of(to, b, c), row_of(from, b, c), from->ne[0] * sizeof(float));
            }
        }
    }

    void run() {
        for (int i = 0; i < ggml_graph_n_nodes(nodes); ++i) {
            ggml_tensor * t = ggml_graph_node(nodes, i);
            if (t->op == GGML_OP_KDA_CONV || t->op == GGML_OP_KDA_SCAN) {
                CHECK(ggml_cuda_kda_refused(0, t) == nullptr);
                const int n = ggml_cuda_kda_elide_state_copy(cuda, nodes, i);
                if (n == 0) {
                    ggml_cuda_op_kda(cuda, t);
                }
                n_fused += n > 0;
                i += n;
            } else if (t->op == GGML_OP_CPY) {
                copy(t->src[0], t->src[1]);
            } else if (t->op == GGML_OP_GET_ROWS) {
                for (int64_t r = 0; r < t->ne[1]; ++r) {
                    memcpy(row_of(t, r), row_of(t->src[0], ((int32_t *) t->src[1]->data)[r]), t->nb[1]);
                }
            } else if (t->op == GGML_OP_FILL) {
                memset(t->data, 0, ggml_nbytes(t));
            } else {
                CHECK(t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE);
            }
        }
    }
};

// The nodes around the operator.
struct surroundings {
    const char * name;
    bool         copied;    // the states are copied into the cache
    bool         gathered;  // rows are moved to other cells in between
    bool         onto;      // these cells are among the destinations of the states
    bool         output;    // the operator is an output of the graph
    bool         reader;    // another node reads the states
    bool         fused;     // expected: the copy can be elided
};

static const surroundings all_surroundings[] = {
    { "alone", false, false, false, false, false, false },
    { "copied", true, false, false, false, false, true },
    { "rows gathered", true, true, false, false, false, true },
    { "rows gathered onto the states'", true, true, true, false, false, false },
    { "output", true, false, false, true, false, false },
    { "read", true, false, false, false, true, false },
};

// a [a, b, c, d] tensor with a row stride of twice its row length
static ggml_tensor * apart(graph & g, int64_t a, int64_t b, int64_t c, int64_t d) {
    ggml_tensor * t = ggml_new_tensor_4d(g.ctx, GGML_TYPE_F32, 2 * a, b, c, d);
    return ggml_view_4d(g.ctx, t, a, b, c, d, t->nb[1], t->nb[2], t->nb[3], a * sizeof(float));
}

// Appends the operator and the nodes around it. Returns the view of the cache for the final states.
template <typename Node, typename Shape>
static ggml_tensor *
surround(graph & g, const surroundings & around, const Node & node, const Shape & n, int32_t zero_row) {
    ggml_tensor * op    = node.op;
    ggml_tensor * cache = node.cache;
    const int64_t size  = cache->ne[0];
    const int64_t cells = cache->ne[1] / n.K;
    const int64_t n_out = ggml_nelements(op) - size * n.S * n.K;
    ggml_build_forward_expand(g.nodes, op);
    if (around.output) {
        ggml_set_output(op);
    }
    ggml_tensor * from = ggml_view_3d(g.ctx, op, size, n.S, n.K, size * 4, size * n.S * 4, n_out * 4);
    ggml_tensor * to   = ggml_view_3d(g.ctx, cache, size, n.S, n.K, cache->nb[1], cells * cache->nb[1], 0);
    if (around.gathered) {
        if (zero_row >= 0) {
            ggml_tensor * zeros = ggml_view_1d(g.ctx, cache, size, zero_row * cache->nb[1]);
            ggml_build_forward_expand(g.nodes, ggml_fill_inplace(g.ctx, zeros, 0.0f));
        }
        ggml_tensor * moved = ggml_new_tensor_1d(g.ctx, GGML_TYPE_I32, 2);
        ggml_set_name(moved, "moved");
        ggml_tensor * others =
            ggml_view_2d(g.ctx, cache, size, 2, cache->nb[1], (around.onto ? n.S - 1 : n.S) * cache->nb[1]);
        ggml_build_forward_expand(g.nodes, ggml_cpy(g.ctx, ggml_get_rows(g.ctx, cache, moved), others));
    }
    if (around.copied) {
        ggml_build_forward_expand(g.nodes, ggml_cpy(g.ctx, from, to));
    }
    if (around.reader) {
        ggml_tensor * other = ggml_new_tensor_3d(g.ctx, GGML_TYPE_F32, size, n.S, n.K);
        ggml_build_forward_expand(g.nodes, ggml_cpy(g.ctx, from, other));
    }
    return around.copied ? to : from;
}

// Whether the kernels write the states directly to the cache: not if a sequence reads a row that another one writes.
static bool is_direct(const std::vector<int32_t> & rows, int32_t zero_row, int64_t cells, int64_t K) {
    for (size_t s = 0; s < rows.size(); ++s) {
        for (size_t other = 0; other < rows.size(); ++other) {
            for (int64_t slot = 0; slot < K; ++slot) {
                if (other != s && rows[s] != zero_row && rows[s] == (int64_t) other + slot * cells) {
                    return false;
                }
            }
        }
    }
    return true;
}

// The rows that the sequences continue.
enum class reading { permuted, own, own_snapshot };

static int n_cases;

// x: the inputs. states: where the final states are.
template <typename Node, typename Inputs, typename Want>
static void judge(const std::string & name,
                  const graph &       g,
                  bool                fused,
                  bool                direct,
                  const Node &        node,
                  const ggml_tensor * states,
                  const Inputs &      x,
                  const Want &        want) {
    const ggml_tensor * op    = node.op;
    const double        e_out = nmse((const float *) op->data, want.out.data(), want.out.size());
    size_t              n     = 0;
    double              worst = 0;
    for (int64_t k = 0; k < states->ne[2]; ++k) {
        for (int64_t s = 0; s < states->ne[1]; ++s, n += states->ne[0]) {
            worst = std::max(worst, nmse((const float *) row_of(states, s, k), want.states.data() + n, states->ne[0]));
        }
    }
    // the states in the result are not written if the kernels write to the cache
    const float * tail    = (const float *) op->data + ggml_nelements(op) - ggml_nelements(states);
    const bool    written = std::any_of(tail, tail + ggml_nelements(states), [](float x) { return !std::isnan(x); });
    bool          moved   = true;
    if (const ggml_tensor * rows = ggml_get_tensor(g.ctx, "moved"); rows && fused) {
        for (int64_t i = 0; i < rows->ne[0]; ++i) {
            const int32_t            row = ((const int32_t *) rows->data)[i];
            const std::vector<float> zeros(states->ne[0]);
            const float *            from = row == x.zero_row ? zeros.data() : x.cache.data() + row * zeros.size();
            moved = moved && memcmp(row_of(node.cache, states->ne[1] + i), from, node.cache->nb[1]) == 0;
        }
    }
    ++n_cases;
    if (e_out <= 1e-7 && worst <= 1e-7 && (g.n_fused == 1) == fused && written == !(fused && direct) && moved) {
        return;
    }
    printf("%s: NMSE of the output %.1e, of the worst state %.1e; %s%s%s\n", name.c_str(), e_out, worst,
           g.n_fused ? "copy taken over" : "copy as it stands", written ? ", by way of the result" : "",
           moved ? "" : "; rows not moved");
    exit(1);
}

template <typename Node, typename Shape, typename Inputs, typename Want>
static void
test(const char * what, const Shape & n, Inputs x, const Want & oracle, const surroundings & around, reading how) {
    const int64_t cells = n.S + 2;
    for (int32_t s = 0; s < n.S && how == reading::own_snapshot; ++s) {
        x.rows[s] = x.rows[s] == x.zero_row ? x.zero_row : s + cells;
    }
    const bool direct = n.S == 1 || is_direct(x.rows, x.zero_row, cells, n.K);
    in_all_orders([&](const char * order) {
        graph         g;
        const Node    node(g.ctx, n, x, [&](auto... ne) { return apart(g, ne...); });
        ggml_tensor * states = surround(g, around, node, n, x.zero_row);
        g.allocate();
        node.fill(x);
        if (ggml_tensor * moved = ggml_get_tensor(g.ctx, "moved")) {  // a row with a new state, and the row of zeros
            put(moved, std::vector<int32_t>{ 0, x.zero_row >= 0 ? x.zero_row : 1 });
        }
        g.run();
        judge(text("%s %s T=%d %s", what, around.name, (int) n.T, order), g, around.fused, direct, node, states, x,
              oracle(n, x));
    });
}

static void test_scan(const scan_shape & n, const surroundings & around, bool new_seq, reading how) {
    test<scan_node>("scan", n, make_scan(n, "ordinary", -INFINITY, new_seq, how != reading::permuted), scan, around,
                    how);
}

static void test_conv(const conv_shape & n, const surroundings & around, bool new_seq, reading how) {
    test<conv_node>("conv", n, make_conv(n, new_seq, how != reading::permuted), conv, around, how);
}

// Why a node with q at `offset` floats and `gap` floats between rows is refused on a device of this capability.
static std::string refused(int64_t D, int64_t gap, int64_t offset, int cc) {
    standin_capability    = cc;
    ggml_context * ctx    = ggml_init({ 1 << 20, nullptr, true });
    const int64_t  C      = 2 * D;
    ggml_tensor *  all    = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, C + gap + offset, 4);
    ggml_tensor *  q      = ggml_view_3d(ctx, all, C, 4, 1, (C + gap) * 4, (C + gap) * 16, offset * 4);
    ggml_tensor *  w      = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 4, C);
    ggml_tensor *  rows   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    ggml_tensor *  cache  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 9 * C, 1);
    ggml_tensor *  src[]  = { q, q, q, w, w, w, cache, rows };
    ggml_tensor *  op     = ggml_kda_conv(ctx, src, { (int32_t) D, 1, -1, 1e-6f });
    const char *   reason = ggml_cuda_kda_refused(0, op);
    ggml_free(ctx);
    standin_capability = 800;
    return reason != nullptr ? reason : "";
}

int main() {
    standin_multiprocessors = 2;  // so that 130 tokens are three runs
    for (const surroundings & around : all_surroundings) {
        for (const reading how : { reading::permuted, reading::own, reading::own_snapshot }) {
            test_conv({ 32, 2, 5, 3, 2 }, around, true, how);
            test_scan({ 32, 2, 5, 3, 2 }, around, true, how);
            test_scan({ 32, 2, 130, 2, 2 }, around, false, how);
        }
        test_conv({ 32, 2, 5, 1, 2 }, around, false, reading::permuted);
        test_scan({ 32, 2, 5, 1, 2 }, around, false, reading::permuted);
    }
    standin_capability = 750;
    test_scan({ 32, 2, 130, 2, 2 }, all_surroundings[1], false, reading::permuted);
    standin_capability = 800;

    CHECK(refused(64, 4, 4, 750) == "");
    CHECK(refused(64, 4, 4, 610) == "a device older than compute capability 7.0");
    CHECK(refused(48, 4, 4, 800) == "a head size other than 32, 64, 96, 128, 256");
    CHECK(refused(64, 2, 4, 800) == "a source whose rows are not aligned to 16 bytes");
    CHECK(refused(64, 4, 2, 800) == "a source whose rows are not aligned to 16 bytes");
    printf("%d cases, all as they should be\n", n_cases);
}
