// ggml-cuda's matmuls of one to eight columns with quantized weights, with upstream's kernels on the CPU: nodes in a row
// that multiply the same tensor quantize it once, with the same bits as if each did, and never use what is out of date.

#include "check.h"
#include "ggml-backend.h"
#include "ggml-cuda-standin.cuh"
#include "mmvq.cuh"

#include <cmath>
#include <random>
#include <vector>

using namespace cuda_emulator;

constexpr int64_t N_IN  = 768;  // more than matvec.cu quantizes itself
constexpr int64_t N_OUT = 8;

static std::mt19937 rng(1);

// A tensor with its data on the device.
struct OnDevice {
    ggml_tensor *      t;
    std::vector<float> values;  // as floats
    DeviceArray<char>  data;

    OnDevice(ggml_context * ctx, ggml_backend_buffer_t buffer, ggml_type type, int64_t n_rows) :
        t(ggml_new_tensor_2d(ctx, type, N_IN, n_rows)), values(N_IN * n_rows), data(ggml_nbytes(t)) {
        t->data   = data.data();
        t->buffer = buffer;
        fill();
    }

    void fill() {
        std::normal_distribution<float> normal;
        for (float & x : values) {
            x = normal(rng);
        }
        if (t->type == GGML_TYPE_F32) {
            memcpy(t->data, values.data(), ggml_nbytes(t));
        } else {
            ggml_quantize_chunk(t->type, values.data(), t->data, 0, t->ne[1], N_IN, nullptr);
            ggml_get_type_traits(t->type)->to_float(t->data, values.data(), values.size());
        }
    }
};

struct Test {
    ggml_context *            ctx    = ggml_init({ 1 << 20, nullptr, true });
    ggml_backend_buffer_t     buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), 16);
    ggml_backend_cuda_context cuda{ 0 };
    OnDevice                  w8{ ctx, buffer, GGML_TYPE_Q8_0, N_OUT };
    OnDevice                  w4{ ctx, buffer, GGML_TYPE_Q4_K, N_OUT };
    OnDevice                  x, y;
    int                       n_launches = 0;

    explicit Test(int64_t n_columns) :
        x(ctx, buffer, GGML_TYPE_F32, n_columns), y(ctx, buffer, GGML_TYPE_F32, n_columns) {
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }

    ~Test() {
        cuda.begin_node(nullptr);
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }

    // Multiplies as a node of a graph, if is_node.
    std::vector<float> multiply(const OnDevice & w, const OnDevice & by, bool is_node = true) {
        ggml_tensor *      node = ggml_mul_mat(ctx, w.t, by.t);
        DeviceArray<float> out(ggml_nelements(node));
        node->data = out.data();
        if (is_node) {
            cuda.begin_node(node);
        }
        const int before = n_submitted;
        ggml_cuda_mul_mat_vec_q(cuda, w.t, by.t, nullptr, node);
        n_launches               = n_submitted - before;
        std::vector<float> got   = out.values();
        double             error = 0, power = 0;
        for (int64_t column = 0; column < by.t->ne[1]; ++column) {
            for (int64_t row = 0; row < N_OUT; ++row) {
                double want = 0;
                for (int64_t i = 0; i < N_IN; ++i) {
                    want += (double) w.values[row * N_IN + i] * by.values[column * N_IN + i];
                }
                error += std::pow(got[column * N_OUT + row] - want, 2);
                power += want * want;
            }
        }
        expect(error / power < 5e-4, text("NMSE of a matmul: %.1e", error / power));  // Q8_1's rounding
        return got;
    }
};

static void test(int64_t n_columns) {
    Test       t(n_columns);
    const auto quantizes = [&](const char * what, bool yes) {
        expect(t.n_launches == (yes ? 2 : 1), text("%s: %d launches", what, t.n_launches));
    };

    const std::vector<float> alone8 = t.multiply(t.w8, t.x, false);
    quantizes("outside a graph", true);
    const std::vector<float> alone4 = t.multiply(t.w4, t.x, false);
    quantizes("outside a graph", true);

    expect(t.multiply(t.w8, t.x) == alone8, "the first node");
    quantizes("the first node", true);
    expect(t.multiply(t.w4, t.x) == alone4, "the second node: same bits");
    quantizes("the second node", false);
    expect(t.multiply(t.w8, t.x) == alone8, "the third node: same bits");
    quantizes("the third node", false);

    t.multiply(t.w8, t.y);
    quantizes("another input", true);
    t.multiply(t.w8, t.x);
    quantizes("the first input again", true);

    const ggml_tensor slice = *t.x.t;  // as the experts of a MUL_MAT_ID node
    ggml_tensor *     first = ggml_mul_mat(t.ctx, t.w8.t, t.x.t);
    t.cuda.begin_node(first);
    expect(t.cuda.q8_1_src1 == t.x.t && t.cuda.q8_1_src1 != &slice, "the input is a tensor, not an address of data");

    t.x.fill();  // in another node
    t.cuda.begin_node(ggml_scale(t.ctx, t.x.t, 2.0f));
    t.multiply(t.w8, t.x);
    quantizes("after a node of another kind", true);

    t.cuda.begin_node(nullptr);
    t.x.fill();  // before the next graph
    t.multiply(t.w8, t.x);
    quantizes("in the next graph", true);

    t.cuda.curr_stream_no = 1;
    t.multiply(t.w8, t.x);
    quantizes("in another stream", true);
    t.cuda.curr_stream_no = 0;
}

int main() {
    test(1);
    test(3);
    return report();
}
