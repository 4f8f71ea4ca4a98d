// Quantized matrices times one column (ggml_ops/matmul/cuda), next to upstream's kernel on the same Q8_1 input: types,
// numbers of rows and columns, batches, experts, gates, several nodes in one launch, and columns that the kernel quantizes.

#include "check.h"
#include "device-graph.cuh"
#include "ggml-op-marks.h"
#include "kimi/matvec.cuh"
#include "mmvq.cuh"
#include "quantize.cuh"

#include <cmath>
#include <map>
#include <memory>
#include <vector>

using namespace cuda_emulator;

constexpr int     DATA_CENTRE = 800, GEFORCE = 890;  // compute capabilities
constexpr int64_t SHORT = 512;                       // values of the longest column that the kernel quantizes

struct Graph : DeviceGraph {
    // Upstream's kernel of several rows per block reads, and does not use, rows after the last one.
    std::map<const ggml_tensor *, std::unique_ptr<DeviceArray<char>>> for_upstream;

    ggml_tensor * matrix(ggml_type type, int64_t n_columns, int64_t n_rows, int64_t n_matrices = 1) {
        ggml_tensor * t = place(ggml_new_tensor_3d(ctx, type, n_columns, n_rows, n_matrices), weights);
        std::normal_distribution<float> normal;
        std::vector<float>              values(ggml_nelements(t));
        for (float & x : values) {
            x = normal(rng);
        }
        ggml_quantize_chunk(type, values.data(), t->data, 0, ggml_nrows(t), n_columns, nullptr);
        const char *      data = static_cast<const char *>(t->data);
        std::vector<char> longer(data, data + ggml_nbytes(t));
        longer.resize(longer.size() + 4 * t->nb[1]);
        for_upstream[t] = std::make_unique<DeviceArray<char>>(longer);
        return t;
    }

    // In the fourth dimension.
    ggml_tensor * four_columns() {
        ggml_tensor * t = place(ggml_new_tensor_4d(ctx, GGML_TYPE_F32, 512, 1, 1, 4), results);
        memset(t->data, 0, ggml_nbytes(t));
        return t;
    }

    ggml_tensor * experts(const std::vector<int32_t> & which) {
        ggml_tensor * t = place(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, which.size(), 1), results);
        memcpy(t->data, which.data(), ggml_nbytes(t));
        return t;
    }

    // The node's result by upstream's kernel, which gets one expert at a time: with several, its blocks of four rows
    // write into the next expert's result if the number of rows is no multiple of four.
    std::vector<float> upstream(ggml_tensor * node, const ggml_cuda_mm_fusion_args_host * fusion) {
        standin_capability = GEFORCE;
        ggml_tensor w = *node->src[0], x = *node->src[1], out = *node, gate = {};
        const auto  matrix_of = [&](const ggml_tensor * t, int64_t i) {
            return static_cast<char *>(for_upstream.at(t)->data()) + i * t->nb[2];
        };
        ggml_cuda_mm_fusion_args_host fused;
        if (fusion != nullptr) {
            fused      = *fusion;
            gate       = *fusion->gate;
            fused.gate = &gate;
        }
        const bool has_experts = node->src[2] != nullptr;
        if (has_experts) {
            w.ne[2] = gate.ne[2] = x.ne[1] = out.ne[1] = 1;
        }
        for (int64_t slot = 0; slot < (has_experts ? node->ne[1] : 1); ++slot) {
            const int64_t expert = has_experts ? static_cast<const int32_t *>(node->src[2]->data)[slot] : 0;
            w.data               = matrix_of(node->src[0], expert);
            gate.data            = fusion != nullptr ? matrix_of(fusion->gate, expert) : nullptr;
            x.data               = static_cast<char *>(node->src[1]->data) + slot % node->src[1]->ne[1] * x.nb[1];
            out.data             = static_cast<char *>(node->data) + slot * out.nb[1];
            ggml_cuda_mul_mat_vec_q(cuda, &w, &x, nullptr, &out, fusion ? &fused : nullptr);
        }
        return values(node);
    }

    // Whether our kernel computes the node on a device of this capability; if so, its result is in the node.
    bool serves(int capability, ggml_tensor * node, const ggml_cuda_mm_fusion_args_host * fusion = nullptr) {
        return serves_as(capability, node, node, fusion);
    }

    // The same, with a column that the kernel quantizes.
    bool serves_floats(int capability, ggml_tensor * node, const ggml_cuda_mm_fusion_args_host * fusion = nullptr) {
        standin_capability = capability;
        return ggml_cuda_matvec(cuda, node->src[0], node->src[1], node->src[2], node, fusion, nullptr, nullptr);
    }

    // dst: the node itself or a GLU, for whose result there is a node.
    bool serves_as(int                                   capability,
                   ggml_tensor *                         node,
                   const ggml_tensor *                   dst,
                   const ggml_cuda_mm_fusion_args_host * fusion) {
        standin_capability     = capability;
        const ggml_tensor * x  = node->src[1];
        const int64_t       ne = GGML_PAD(x->ne[0], MATRIX_ROW_PADDING);
        const int64_t       s1 = x->nb[1] / sizeof(float), s2 = x->nb[2] / sizeof(float), s3 = x->nb[3] / sizeof(float);
        DeviceArray<char>   input(ggml_nrows(x) * ne / QK8_1 * sizeof(block_q8_1));
        quantize_row_q8_1_cuda(static_cast<const float *>(x->data), nullptr, input.data(), node->src[0]->type, x->ne[0],
                               s1, s2, s3, ne, x->ne[1], x->ne[2], x->ne[3], cuda.stream());
        return ggml_cuda_matvec(cuda, node->src[0], x, node->src[2], dst, fusion, nullptr, input.data());
    }
};

// Products of blocks are the same integers, added in another order.
static void expect_same(const std::vector<float> & got, const std::vector<float> & want, const std::string & what) {
    double error = 0, power = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        error += std::pow(double(got[i]) - want[i], 2);
        power += std::pow(double(want[i]), 2);
    }
    expect(got.size() == want.size() && power > 0 && error <= 1e-12 * power, what + text(": NMSE %.1e", error / power));
}

static void expect_as_upstream(Graph & g, ggml_tensor * node, const ggml_tensor * gate, const std::string & what) {
    ggml_cuda_mm_fusion_args_host fusion;
    fusion.gate                     = gate;
    fusion.glu_op                   = GGML_GLU_OP_SWIGLU;
    const auto *             fused  = gate != nullptr ? &fusion : nullptr;
    const std::vector<float> want   = g.upstream(node, fused);
    const bool               serves = g.serves(DATA_CENTRE, node, fused);
    expect(serves, what + ": served");
    if (serves) {
        const std::vector<float> got = g.values(node);
        expect_same(got, want, what);
        const bool is_short = node->src[1]->ne[0] <= SHORT && gate == nullptr;
        expect(g.serves_floats(DATA_CENTRE, node, fused) == is_short, what + ": served without Q8_1");
        expect(!is_short || g.values(node) == got, what + ": the same bits without Q8_1");
    }
}

constexpr ggml_type TYPES[] = { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0,
                                GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K };

// With few multiprocessors one warp computes two rows, with many four warps do.
static void test_products(ggml_type type, int n_multiprocessors) {
    standin_multiprocessors = n_multiprocessors;
    const bool        k     = ggml_blck_size(type) == 256;
    const std::string name  = ggml_type_name(type) + text(", %d multiprocessors", n_multiprocessors);
    for (const int64_t n_columns : { k ? 256 : 96, 768, 2304 }) {
        for (const int64_t n_rows : { 2048, 2051 }) {
            Graph         g;
            ggml_tensor * node = g.result(ggml_mul_mat(g.ctx, g.matrix(type, n_columns, n_rows), g.column(n_columns)));
            expect_as_upstream(g, node, nullptr, name + text(", %d x %d", int(n_rows), int(n_columns)));
        }
    }
    for (const int64_t n_rows : { 1, 7, 40 }) {
        Graph               g;
        ggml_tensor *       up   = g.matrix(type, 512, n_rows);
        const ggml_tensor * gate = g.matrix(type, 512, n_rows);
        ggml_tensor *       node = g.result(ggml_mul_mat(g.ctx, up, g.column(512)));
        expect_as_upstream(g, node, gate, name + text(", %d rows and a gate", int(n_rows)));
    }
    for (const int64_t n_columns : { k ? 256 : 160, 768 }) {  // in Q8_1 a column has 512 or 1024 values
        for (const int64_t n_inputs : { 1, 3 }) {             // of experts
            Graph               g;
            ggml_tensor *       up   = g.matrix(type, n_columns, 701, 5);
            const ggml_tensor * gate = g.matrix(type, n_columns, 701, 5);
            ggml_tensor *       x    = g.column(n_columns, n_inputs);
            ggml_tensor *       node = g.result(ggml_mul_mat_id(g.ctx, up, x, g.experts({ 4, 0, 3 })));
            const std::string   of   = text(", %d values, %d inputs", int(n_columns), int(n_inputs));
            expect_as_upstream(g, node, nullptr, name + ", experts" + of);
            expect_as_upstream(g, node, gate, name + ", experts with gates" + of);
        }
        for (const int64_t n_shared : { 1, 2 }) {  // columns that multiply the same matrix of a batch
            Graph         g;
            ggml_tensor * w    = g.matrix(type, n_columns, 701, 3);
            ggml_tensor * node = g.result(ggml_mul_mat(g.ctx, w, g.column(n_columns, 1, 3 * n_shared)));
            expect_as_upstream(g, node, nullptr,
                               name + text(", a batch of %d, %d values", int(3 * n_shared), int(n_columns)));
        }
    }
}

// Keys of a cache, whose rows are those of all heads: of three heads, each for two queries' heads.
static void test_cache() {
    Graph             g;
    ggml_tensor *     cache = g.matrix(GGML_TYPE_Q8_0, 3 * 128, 701);
    const ggml_tensor rows  = *cache;
    ggml_tensor *     keys  = ggml_view_3d(g.ctx, cache, 128, 701, 3, rows.nb[1], rows.nb[1] / 3, 0);
    ggml_tensor *     node  = g.result(ggml_mul_mat(g.ctx, keys, g.column(128, 1, 6)));
    keys->data              = cache->data;
    keys->buffer            = cache->buffer;
    g.for_upstream[keys]    = std::move(g.for_upstream.at(cache));
    expect_as_upstream(g, node, nullptr, "keys of a cache");
}

// What upstream's kernel is for.
static void test_refusals() {
    Graph      g;
    const auto node = [&](ggml_type type, int64_t n_columns, int64_t n_rows, int64_t n = 1) {
        return g.result(ggml_mul_mat(g.ctx, g.matrix(type, n_columns, n_rows), g.column(n_columns, n)));
    };
    ggml_tensor * usual = node(GGML_TYPE_Q4_0, 512, 2048);
    for (const int capability : { 750, 860, 890, 1200, GGML_CUDA_CC_OFFSET_AMD + 0x90a }) {
        expect(!g.serves(capability, usual), text("capability %d", capability));
    }
    for (const int capability : { 800, 900, 1000 }) {
        expect(g.serves(capability, usual), text("capability %d", capability));
    }
    expect(!g.serves(DATA_CENTRE, node(GGML_TYPE_IQ4_XS, 512, 2048)), "another type");
    expect(!g.serves(DATA_CENTRE, node(GGML_TYPE_Q4_0, 512, 2048, 2)), "two columns");
    ggml_tensor * four = g.result(ggml_mul_mat(g.ctx, g.matrix(GGML_TYPE_Q4_0, 512, 2048), g.four_columns()));
    expect(!g.serves(DATA_CENTRE, four), "four dimensions");
    expect(!g.serves(DATA_CENTRE, node(GGML_TYPE_Q4_0, 4128, 2048)), "long rows");
    expect(g.serves(DATA_CENTRE, node(GGML_TYPE_Q4_0, 4096, 2048)), "rows as long as allowed");
    expect(!g.serves(DATA_CENTRE, node(GGML_TYPE_Q4_0, 4096, 2047)), "few long rows");
    expect(g.serves(DATA_CENTRE, node(GGML_TYPE_Q4_0, 2304, 8)), "few rows");
    expect(!g.serves(DATA_CENTRE, node(GGML_TYPE_Q2_K, 2304, 8)), "few rows of Q2_K");
    expect(!g.serves(DATA_CENTRE, node(GGML_TYPE_Q3_K, 2304, 8)), "few rows of Q3_K");

    ggml_cuda_mm_fusion_args_host fusion;
    fusion.glu_op = GGML_GLU_OP_SWIGLU;
    fusion.x_bias = g.column(2048);
    expect(!g.serves(DATA_CENTRE, usual, &fusion), "a bias");
    fusion.gate = usual->src[0];
    expect(!g.serves(DATA_CENTRE, usual, &fusion), "a gate and a bias");
    fusion.x_bias = nullptr;
    expect(g.serves(DATA_CENTRE, usual, &fusion), "a gate");
    fusion.glu_op = GGML_GLU_OP_GEGLU;
    expect(!g.serves(DATA_CENTRE, usual, &fusion), "another activation");

    ggml_op_set_mark(usual, GGML_OP_MARK_UPSTREAM);
    expect(!g.serves(DATA_CENTRE, usual), "a marked node");
    fusion.glu_op           = GGML_GLU_OP_SWIGLU;
    const ggml_tensor * glu = g.result(ggml_swiglu_split(g.ctx, usual, usual));
    expect(!g.serves_as(DATA_CENTRE, usual, glu, &fusion), "a gate of a marked node");
}

// Which columns the kernel quantizes: short ones that can be read four values at a time.
static void test_short_columns() {
    Graph      g;
    const auto serves = [&](int64_t n, int64_t from, int64_t stride) {
        ggml_tensor * all = g.column(3 * stride + from);
        ggml_tensor * x =
            ggml_view_3d(g.ctx, all, n, 1, 3, n * sizeof(float), stride * sizeof(float), from * sizeof(float));
        return g.serves_floats(DATA_CENTRE, g.result(ggml_mul_mat(g.ctx, g.matrix(GGML_TYPE_Q4_0, n, 2048, 3), x)));
    };
    expect(serves(512, 0, 512), "columns of 512 values");
    expect(!serves(544, 0, 544), "longer columns");
    expect(serves(128, 4, 196), "columns in multiples of 16 bytes");
    expect(!serves(128, 2, 196), "the first one elsewhere");
    expect(!serves(128, 0, 194), "the others elsewhere");
}

// A batch with short columns and the tensor that is put after each result: queries of an MLA layer.
struct Concat {
    Graph         g;
    ggml_tensor * q;  // 5 heads of 128 values for the matrices and 64 for the tail
    ggml_tensor * node;
    ggml_tensor * concat;
    ggml_cgraph * graph;

    explicit Concat(ggml_type type = GGML_TYPE_Q8_0, int64_t n_tokens = 1, int dim = 0) {
        constexpr int64_t HEADS = 5, NOPE = 128, ROPE = 64, LATENT = 301;
        q               = g.column(NOPE + ROPE, HEADS, n_tokens);
        const auto part = [&](int64_t n, int64_t from) {
            return ggml_view_3d(g.ctx, q, n, HEADS, n_tokens, q->nb[1], q->nb[2], from * sizeof(float));
        };
        ggml_tensor * nope = ggml_permute(g.ctx, part(NOPE, 0), 0, 2, 1, 3);
        node               = g.result(ggml_mul_mat(g.ctx, g.matrix(type, NOPE, dim == 0 ? LATENT : ROPE, HEADS), nope));
        ggml_tensor * heads = ggml_permute(g.ctx, node, 0, 2, 1, 3);
        concat              = g.result(ggml_concat(g.ctx, heads, part(ROPE, NOPE), dim));
        graph               = g.graph_of(concat);
    }

    // The nodes that are done after the matmul.
    int fuse(int capability = DATA_CENTRE) {
        standin_capability = capability;
        n_submitted        = 0;
        g.cuda.begin_node(node);
        return ggml_cuda_matvec_concat(g.cuda, graph, index_of(graph, node));
    }
};

static void test_concat() {
    for (const ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0 }) {
        Concat            c(type);
        const int64_t     n_head = c.node->ne[0], n_tail = c.concat->ne[0] - n_head, n_slots = c.node->ne[2];
        const std::string name = ggml_type_name(type) + std::string(", concatenated");
        const float *     q    = static_cast<const float *>(c.q->data);
        expect(c.g.serves_floats(DATA_CENTRE, c.node), name + ": the matmul alone");
        const std::vector<float> heads = c.g.values(c.node);
        const int                last  = index_of(c.graph, c.concat) - index_of(c.graph, c.node);
        expect(c.fuse() == last && n_submitted == 1, name + text(": %d launches", n_submitted));
        const std::vector<float> got = c.g.values(c.concat);
        for (int64_t s = 0; s < n_slots; ++s) {
            const float * row = got.data() + s * (n_head + n_tail);
            expect(std::equal(row, row + n_head, heads.data() + s * n_head), name + ": the matmul's bits");
            expect(std::equal(row + n_head, row + n_head + n_tail, q + s * c.q->ne[0] + c.q->ne[0] - n_tail),
                   name + ": the tail");
        }
    }
    const auto expect_not = [](Concat & c, const char * what, int capability = DATA_CENTRE) {
        expect(c.fuse(capability) == 0 && n_submitted == 0, std::string("not concatenated: ") + what);
    };
    Concat usual;
    expect_not(usual, "other devices", GEFORCE);
    Concat two(GGML_TYPE_Q8_0, 2);
    expect_not(two, "two tokens");
    Concat below(GGML_TYPE_Q8_0, 1, 1);
    expect_not(below, "another dimension");
    Concat other_type(GGML_TYPE_IQ4_NL);
    expect_not(other_type, "another type");
    Concat marked;
    ggml_op_set_mark(marked.node, GGML_OP_MARK_UPSTREAM);
    expect_not(marked, "marked");
    Concat unfused;
    ggml_op_set_mark(unfused.node, GGML_OP_MARK_UNFUSED);
    expect_not(unfused, "marked as not to be fused");
    Concat placed;
    placed.concat->data = placed.q->data;
    expect_not(placed, "the result overwrites the queries");
    Concat tail;
    tail.concat->data = static_cast<char *>(tail.concat->src[1]->data) + sizeof(float);
    tail.node->src[1] = ggml_permute(tail.g.ctx, tail.g.column(128, 5), 0, 2, 1, 3);
    expect_not(tail, "the result overwrites the tail");
    Concat branch;
    branch.g.cuda.curr_stream_no = 1;
    expect_not(branch, "another stream");
    branch.g.cuda.curr_stream_no = 0;
    Concat used;
    ggml_build_forward_expand(used.graph, ggml_scale(used.g.ctx, used.node, 2.0f));
    expect_not(used, "the matmul's result is used elsewhere");
    Concat computed;
    computed.node->src[0]->buffer = computed.g.results;
    expect_not(computed, "matrices that are no weights");
}

// Nodes in a row with the same column: how many are computed together, and the same bits as alone.
static void test_groups(int64_t n_columns) {
    standin_multiprocessors = 108;
    Graph                      g;
    ggml_tensor *              x = g.column(n_columns);
    std::vector<ggml_tensor *> nodes;
    const auto                 add = [&](ggml_type type, int64_t n_rows, ggml_tensor * by) {
        nodes.push_back(g.result(ggml_mul_mat(g.ctx, g.matrix(type, n_columns, n_rows), by)));
        return nodes.back();
    };
    const auto group = [&](int capability, size_t first, size_t n_nodes) {
        standin_capability  = capability;
        ggml_cgraph * graph = ggml_new_graph(g.ctx);
        for (size_t i = 0; i < n_nodes; ++i) {
            ggml_graph_add_node(graph, nodes[i]);
        }
        g.cuda.begin_node(nodes[first]);
        n_submitted     = 0;
        const int after = ggml_cuda_matvec_group(g.cuda, graph, int(first));
        g.cuda.begin_node(nullptr);
        return after;
    };
    const auto alone = [&](ggml_tensor * node) {
        expect(g.serves(DATA_CENTRE, node), "a node alone: served");
        return g.values(node);
    };
    for (const int64_t n_rows : { 2048, 7, 130 }) {
        add(GGML_TYPE_Q4_0, n_rows, x);
        nodes.push_back(ggml_reshape_2d(g.ctx, nodes.back(), 1, n_rows));
    }
    add(GGML_TYPE_Q8_0, 33, x);
    add(GGML_TYPE_Q8_0, 34, x);
    add(GGML_TYPE_Q8_0, 33, g.column(n_columns));
    std::vector<std::vector<float>> want;
    for (ggml_tensor * node : nodes) {
        want.push_back(node->op == GGML_OP_MUL_MAT ? alone(node) : std::vector<float>());
    }
    const auto expect_group = [&](size_t first, size_t last) {
        const std::string name = text("a group from node %d on", int(first));
        expect(group(DATA_CENTRE, first, nodes.size()) == int(last - first), name);
        expect(n_submitted == (n_columns > SHORT ? 2 : 1), name + text(": %d launches", n_submitted));
        for (size_t i = first; i <= last; ++i) {
            if (!want[i].empty()) {
                expect(g.values(nodes[i]) == want[i], name + text(", node %d: the same bits as alone", int(i)));
            }
        }
    };
    expect_group(0, 4);  // as far as the type is the same
    expect_group(6, 7);  // as far as the column is the same
    expect(group(DATA_CENTRE, 8, nodes.size()) == 0 && n_submitted == 0, "one node is no group");
    expect(group(DATA_CENTRE, 0, 2) == 0 && n_submitted == 0, "nor is the last one");
    expect(group(GEFORCE, 0, nodes.size()) == 0 && n_submitted == 0, "other devices");
    g.cuda.curr_stream_no = 1;
    expect(group(DATA_CENTRE, 0, nodes.size()) == 0, "another stream");
    g.cuda.curr_stream_no = 0;

    nodes[2]->src[0]->buffer = g.results;  // may have been written in the same graph
    expect(group(DATA_CENTRE, 0, nodes.size()) == 0, "a matrix that is no weight");
    nodes[2]->src[0]->buffer = g.weights;
    void * own               = nodes[2]->data;
    nodes[2]->data           = nodes[0]->data;  // an allocator may do so if nothing reads node 0
    expect(group(DATA_CENTRE, 0, nodes.size()) == 0, "results in the same place");
    nodes[2]->data = own;
    nodes[2]->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
    expect(group(DATA_CENTRE, 0, nodes.size()) == 0, "a node that is not computed");
    nodes[2]->flags |= GGML_TENSOR_FLAG_COMPUTE;
    ggml_op_set_mark(nodes[2], GGML_OP_MARK_UPSTREAM);
    expect(group(DATA_CENTRE, 0, nodes.size()) == 0, "a marked node");

    const auto pair = [&](int64_t n_matrices, ggml_tensor * by) {
        nodes.clear();
        for (int i = 0; i < 2; ++i) {
            nodes.push_back(g.result(ggml_mul_mat(g.ctx, g.matrix(GGML_TYPE_Q4_0, n_columns, 2048, n_matrices), by)));
        }
        return group(DATA_CENTRE, 0, 2);
    };
    expect(pair(1, x) == 1, "two nodes");
    expect(pair(1, g.column(n_columns, 2)) == 0, "two columns");
    expect(pair(2, g.column(n_columns, 1, 2)) == 0, "a batch");
    ggml_tensor * longer  = g.column(2 * n_columns);
    ggml_tensor * strided = ggml_view_2d(g.ctx, longer, n_columns, 1, 2 * n_columns * sizeof(float), 0);
    strided->nb[0] *= 2;
    expect(pair(1, strided) == 0, "values that are not in a row");

    nodes.clear();
    want.clear();
    for (int i = 0; i < 9; ++i) {
        want.push_back(alone(add(GGML_TYPE_Q5_K, 301 + i, x)));
    }
    expect_group(0, 7);  // as many as a launch has
}

int main() {
    const int n_multiprocessors[] = { 8, 30, 132 };
    for (size_t i = 0; i < std::size(TYPES); ++i) {
        test_products(TYPES[i], n_multiprocessors[i % 3]);
    }
    for (const int n : { 8, 132 }) {
        test_products(GGML_TYPE_Q4_1, n);
    }
    standin_multiprocessors = 108;
    test_cache();
    test_refusals();
    test_short_columns();
    test_concat();
    test_groups(512);
    test_groups(768);
    return report();
}
