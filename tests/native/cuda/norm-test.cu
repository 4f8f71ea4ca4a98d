// Norms of one token with their residual and in Q8_1 (ggml_ops/fusion/cuda/norm.cu), next to float64 and to upstream's
// quantization; how long Q8_1 is kept, for which matmuls, also if a matmul has made it, and which nodes are left to
// upstream.

#include "check.h"
#include "device-graph.cuh"
#include "ggml-op-marks.h"
#include "kimi/norm.cuh"
#include "mmvq.cuh"
#include "quantize.cuh"

#include <cmath>
#include <vector>

using namespace cuda_emulator;

constexpr float EPS = 1e-5f;

static ggml_tensor * matrix_of(DeviceGraph & t, int64_t n, ggml_type type = GGML_TYPE_Q8_0) {
    ggml_tensor *            w = t.place(ggml_new_tensor_2d(t.ctx, type, n, 8), t.weights);
    const std::vector<float> values(ggml_nelements(w), 0.5f);
    ggml_quantize_chunk(w->type, values.data(), w->data, 0, 8, n, nullptr);
    return w;
}

// x + residual, its norm, and matmuls of that.
struct Norm : DeviceGraph {
    ggml_tensor * x, *residual, *sum, *norm, *factors, *out, *columns, *product, *expert_product;
    ggml_cgraph * graph;

    explicit Norm(int64_t n, bool adds = true, float deviation = 1, int64_t n_tokens = 1) {
        x        = column(n, n_tokens);
        residual = column(n, n_tokens);
        for (int64_t i = 0; i < n * n_tokens; ++i) {
            static_cast<float *>(x->data)[i] *= deviation;
            static_cast<float *>(residual->data)[i] *= deviation;
        }
        factors           = column(n);
        factors->buffer   = weights;
        sum               = adds ? result(ggml_add(ctx, x, residual)) : x;
        norm              = result(ggml_rms_norm(ctx, sum, EPS));
        out               = result(ggml_mul(ctx, norm, factors));
        columns           = ggml_reshape_3d(ctx, out, n, 1, n_tokens);
        product           = result(ggml_mul_mat(ctx, matrix_of(*this, n), out));
        ggml_tensor * ids = place(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n_tokens), results);
        memset(ids->data, 0, ggml_nbytes(ids));
        expert_product = result(ggml_mul_mat_id(ctx, matrix_of(*this, n), columns, ids));
        graph          = graph_of(product);
        ggml_build_forward_expand(graph, expert_product);
        if (adds) {  // the residual of the next layer
            ggml_build_forward_expand(graph, result(ggml_scale(ctx, sum, 2.0f)));
        }
    }

    const ggml_tensor * first() const { return sum == x ? norm : sum; }

    // The nodes that are done after the first.
    int fuse() {
        n_submitted = 0;
        cuda.begin_node(first());
        return ggml_cuda_norm(cuda, graph, index_of(graph, first()));
    }

    std::vector<char> quantized_by_upstream() {
        const int64_t     n      = out->ne[0];
        const int64_t     padded = GGML_PAD(n, MATRIX_ROW_PADDING);
        DeviceArray<char> q8_1(padded / QK8_1 * sizeof(block_q8_1));
        quantize_row_q8_1_cuda(static_cast<const float *>(out->data), nullptr, q8_1.data(), GGML_TYPE_Q8_0, n, n, n, n,
                               padded, 1, 1, 1, cuda.stream());
        return q8_1.values();
    }

    std::vector<char> quantized() {
        const char * from = cuda.q8_1->get();
        return std::vector<char>(from, from + cuda.q8_1->actual_size);
    }
};

static void test_values(int64_t n, bool adds, float deviation) {
    Norm                t(n, adds, deviation);
    const std::string   name = text("%d values, %s residual, deviation %g", int(n), adds ? "a" : "no", deviation);
    std::vector<double> sums(n);
    double              squares = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float x = static_cast<const float *>(t.x->data)[i], r = static_cast<const float *>(t.residual->data)[i];
        sums[i] = adds ? x + r : x;
        squares += sums[i] * sums[i];
    }
    const double scale = 1 / std::sqrt(squares / n + EPS);

    expect(t.fuse() == (adds ? 2 : 1) && n_submitted == 1, name + ": one launch");
    expect(t.quantized() == t.quantized_by_upstream(), name + ": Q8_1 has upstream's bits");
    if (adds) {
        const std::vector<float> got = t.values(t.sum);
        expect(std::equal(got.begin(), got.end(), sums.begin(), [](float a, double b) { return a == float(b); }),
               name + ": the sum");
    }
    double                   error = 0, power = 0;
    const std::vector<float> got = t.values(t.out);
    for (int64_t i = 0; i < n; ++i) {
        const double want = sums[i] * scale * static_cast<const float *>(t.factors->data)[i];
        error += std::pow(got[i] - want, 2);
        power += want * want;
    }
    expect(error <= 1e-13 * power, name + text(": NMSE %.1e", error / power));
}

// Results in the memory of what is no longer needed.
static void test_shared_memory() {
    Norm                     t(96);
    Norm                     same(96);
    const std::vector<float> x(static_cast<float *>(t.x->data), static_cast<float *>(t.x->data) + 96);
    const std::vector<float> r(static_cast<float *>(t.residual->data), static_cast<float *>(t.residual->data) + 96);
    const auto               fill = [&](Norm & n) {
        memcpy(n.x->data, x.data(), 96 * sizeof(float));
        memcpy(n.residual->data, r.data(), 96 * sizeof(float));
        memcpy(n.factors->data, t.factors->data, 96 * sizeof(float));
    };
    t.fuse();
    const std::vector<float> sum = t.values(t.sum), out = t.values(t.out);
    const auto               expect_same = [&](const char * what, ggml_tensor * sum_in, ggml_tensor * out_in) {
        Norm n(96);
        fill(n);
        void * const own_sum = n.sum->data;
        n.sum->data          = sum_in == nullptr ? own_sum : sum_in == t.x ? n.x->data : n.residual->data;
        n.out->data          = out_in == nullptr ? n.out->data
                               : out_in == t.sum ? n.sum->data
                               : out_in == t.x   ? n.x->data
                                                 : n.residual->data;
        expect(n.fuse() == 2, what);
        if (out_in != t.sum) {
            expect(n.values(n.sum) == sum, std::string(what) + ": the sum");
        }
        expect(n.values(n.out) == out, std::string(what) + ": the norm");
    };
    expect_same("the sum where x was", t.x, nullptr);
    expect_same("the sum where the residual was", t.residual, nullptr);
    expect_same("the norm where x was", nullptr, t.x);
    expect_same("the norm where the residual was", nullptr, t.residual);
    expect_same("the norm where the sum is, which is not needed", nullptr, t.sum);
    Norm moved(128);
    moved.out->data = static_cast<float *>(moved.sum->data) - 4;
    expect(moved.fuse() == 0 && n_submitted == 0, "the norm would overwrite another part of the sum");
}

// The launches of a matmul.
static int multiplies(DeviceGraph & t, ggml_tensor * node) {
    t.cuda.begin_node(node);
    n_submitted = 0;
    ggml_cuda_mul_mat_vec_q(t.cuda, node->src[0], node->src[1], node->src[2], node);
    return n_submitted;
}

constexpr int OWN = 2, KEPT = 1;

// Matmuls of one to eight columns in a row quantize the tensor that they share once.
static void test_shared_inputs(int64_t n_columns) {
    DeviceGraph   t;
    ggml_tensor * x     = t.column(768, n_columns);
    ggml_tensor * q8_0  = t.result(ggml_mul_mat(t.ctx, matrix_of(t, 768), x));
    ggml_tensor * q4_k  = t.result(ggml_mul_mat(t.ctx, matrix_of(t, 768, GGML_TYPE_Q4_K), x));
    ggml_tensor * other = t.result(ggml_mul_mat(t.ctx, matrix_of(t, 768), t.column(768, n_columns)));
    expect(multiplies(t, q8_0) == OWN, "alone");
    const std::vector<float> of_q8_0 = t.values(q8_0);
    t.cuda.begin_node(nullptr);
    expect(multiplies(t, q4_k) == OWN, "in the next graph");
    const std::vector<float> of_q4_k = t.values(q4_k);
    expect(multiplies(t, q8_0) == KEPT && t.values(q8_0) == of_q8_0, "the second node, the same bits");
    expect(multiplies(t, q4_k) == KEPT && t.values(q4_k) == of_q4_k, "the third node, the same bits");
    expect(multiplies(t, other) == OWN, "another input");
    expect(multiplies(t, q8_0) == OWN, "the first input again");
    t.cuda.begin_node(ggml_scale(t.ctx, x, 2.0f));
    expect(multiplies(t, q8_0) == OWN, "after a node of another kind");
    t.cuda.curr_stream_no = 1;
    expect(multiplies(t, q8_0) == OWN, "in another stream");
    t.cuda.curr_stream_no = 0;
}

static void test_how_long_q8_1_is_kept() {
    standin_capability = 890;
    {
        Norm t(2304);
        t.fuse();
        expect(multiplies(t, t.product) == KEPT, "the first matmul");
        const std::vector<float> got = t.values(t.product);
        t.cuda.begin_node(t.graph->nodes[0]);  // another node
        expect(multiplies(t, t.expert_product) == KEPT, "experts, after another node");
        const std::vector<float> of_expert = t.values(t.expert_product);
        expect(multiplies(t, t.product) == KEPT, "again");
        t.cuda.begin_node(nullptr);
        expect(multiplies(t, t.product) == OWN && t.values(t.product) == got, "in the next graph, the same bits");
        t.cuda.begin_node(nullptr);
        expect(multiplies(t, t.expert_product) == OWN && t.values(t.expert_product) == of_expert,
               "experts in the next graph, the same bits");
    }
    {
        Norm t(2304);
        t.fuse();
        ggml_tensor * other = t.result(ggml_mul_mat(t.ctx, matrix_of(t, 2304), t.x));
        expect(multiplies(t, other) == OWN, "a matmul of another column");
        expect(multiplies(t, t.product) == OWN, "after it");
    }
    {
        Norm t(2304);
        t.fuse();
        ggml_tensor * ids = t.expert_product->src[2];
        ggml_tensor * other =
            t.result(ggml_mul_mat_id(t.ctx, matrix_of(t, 2304), ggml_reshape_3d(t.ctx, t.x, 2304, 1, 1), ids));
        expect(multiplies(t, other) == OWN, "experts of another column");
        expect(multiplies(t, t.product) == KEPT, "after them");
    }
    {
        Norm t(2304);
        t.fuse();
        t.cuda.begin_node(ggml_scale_inplace(t.ctx, t.out, 2.0f));
        expect(multiplies(t, t.product) == OWN, "after the column was written again");
    }
    {
        Norm t(2304);
        t.fuse();
        ggml_tensor * changed = ggml_scale_inplace(t.ctx, t.out, 2.0f);  // computed together with another node
        ggml_tensor * shaped  = ggml_reshape_3d(t.ctx, changed, 2304, 1, 1);
        expect(!t.cuda.has_q8_1(changed) && !t.cuda.has_q8_1(shaped), "the result of an in-place node");
        expect(t.cuda.has_q8_1(t.out) && t.cuda.has_q8_1(t.columns), "the norm and a view of all of it");
    }
    {
        Norm t(2304);
        t.fuse();
        ggml_tensor * view  = ggml_view_1d(t.ctx, t.x, 2304, 0);
        ggml_tensor * other = t.result(ggml_mul_mat(t.ctx, matrix_of(t, 2304), view));
        expect(multiplies(t, other) == OWN, "a matmul of a view");
        t.cuda.begin_node(ggml_scale_inplace(t.ctx, t.x, 2.0f));
        expect(multiplies(t, other) == OWN, "after its tensor was written again");
    }
    {
        Norm t(2304);
        t.fuse();
        t.cuda.curr_stream_no = 1;
        expect(multiplies(t, t.product) == OWN, "in another stream");
        t.cuda.curr_stream_no = 0;
    }
    {
        Norm t(2304);
        t.fuse();
        ggml_tensor * half = ggml_view_1d(t.ctx, t.out, 1152, 0);
        ggml_tensor * node = t.result(ggml_mul_mat(t.ctx, matrix_of(t, 1152), half));
        expect(multiplies(t, node) == OWN, "a part of the column");
    }
}

static void test_refusals() {
    const auto expect_not = [](Norm & t, const char * what) {
        expect(t.fuse() == 0 && n_submitted == 0, std::string("left to upstream: ") + what);
    };
    Norm two(96, true, 1, 2);
    expect_not(two, "two tokens");
    Norm longest(8192);
    expect(longest.fuse() == 2, "8192 values");
    Norm too_long(8224);
    expect_not(too_long, "more than 8192 values");
    Norm marked(96);
    ggml_op_set_mark(marked.sum, GGML_OP_MARK_UNFUSED);
    expect_not(marked, "a marked sum");
    Norm marked_norm(96, false);
    ggml_op_set_mark(marked_norm.norm, GGML_OP_MARK_UNFUSED);
    expect_not(marked_norm, "a marked norm");
    Norm used(96);
    ggml_build_forward_expand(used.graph, ggml_scale(used.ctx, used.norm, 2.0f));
    expect_not(used, "a norm that is used without the factors");
    Norm other_sum(96);
    other_sum.norm->src[0] = other_sum.x;
    expect_not(other_sum, "a sum that the norm does not read");
    Norm square(96, false);
    square.out->src[1] = square.norm;
    expect_not(square, "a norm times itself");
    Norm sum_twice(96);
    sum_twice.out->src[1] = sum_twice.sum;
    expect_not(sum_twice, "a norm times the sum");
    Norm branch(96);
    branch.cuda.curr_stream_no = 1;
    expect_not(branch, "another stream");
    branch.cuda.curr_stream_no = 0;
    Norm odd(96);
    odd.x->data = static_cast<char *>(odd.x->data) + sizeof(float);
    expect_not(odd, "an address that is no multiple of 16");
    Norm idle(96, false);
    idle.graph = idle.graph_of(idle.out);
    expect_not(idle, "a norm that no matmul reads");
    Norm sum_only(96);
    sum_only.graph = sum_only.graph_of(sum_only.out);
    ggml_build_forward_expand(sum_only.graph, sum_only.result(ggml_scale(sum_only.ctx, sum_only.sum, 2.0f)));
    expect(sum_only.fuse() == 2 && sum_only.cuda.q8_1 == nullptr, "a sum and a norm that no matmul reads");
    Norm          floats(96, false);
    ggml_tensor * w = floats.place(ggml_new_tensor_2d(floats.ctx, GGML_TYPE_F32, 96, 8), floats.weights);
    floats.graph    = floats.graph_of(floats.result(ggml_mul_mat(floats.ctx, w, floats.out)));
    expect_not(floats, "a matmul of floats");
}

int main() {
    for (const int64_t n : { 32, 96, 576, 2304, 4096, 7168, 8192 }) {
        for (const bool adds : { false, true }) {
            for (const float deviation : { 1e-4f, 1.0f, 300.0f }) {
                test_values(n, adds, deviation);
            }
        }
    }
    test_shared_memory();
    test_shared_inputs(1);
    test_shared_inputs(3);
    test_how_long_q8_1_is_kept();
    test_refusals();
    return report();
}
