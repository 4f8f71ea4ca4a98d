// Matmuls by weights in ggml's AMX buffer type, whose tile registers are emulated here: a weight that the buffer type
// takes when a model is loaded is multiplied by any activations of a graph. Contiguous ones against sums in double;
// views and batches have the bits of the same rows, contiguous.
// Prints one line per failure; exit status 1 if there was a failure. Compile it for a processor with AVX-512 VNNI.

#include "amx-emulated.h"

#include <sys/syscall.h>
#include <unistd.h>

#define syscall(...) 0  // asks Linux for the tile registers

#include "check.h"
#include "ggml-alloc.h"

#include <random>
#include <thread>
#include <vector>

#undef __AMX_INT8__
#define __AMX_INT8__ 1
#include "amx/amx.cpp"
#include "amx/mmq.cpp"

extern "C" void ggml_barrier(ggml_threadpool *) {}  // one thread

static constexpr int K = 512, N = 96;

static auto & buffer_type() {
    return *(ggml::cpu::extra_buffer_type *) ggml_backend_amx_buffer_type()->context;
}

// The floats of a node, computed by one thread as the CPU backend does.
static std::vector<float> compute(ggml_tensor * node) {
    auto * traits = buffer_type().get_tensor_traits(node);
    size_t size   = 0;
    traits->work_size(1, node, size);
    std::vector<char>   work(size);
    ggml_compute_params params = {};
    params.nth                 = 1;
    params.wsize               = size;
    params.wdata               = work.data();
    traits->compute_forward(&params, node);
    const float * data = (const float *) node->data;
    return { data, data + ggml_nelements(node) };
}

// Tensors of a context have memory; fill() gives them values.
struct Context {
    ggml_context * ctx = ggml_init({ 64 << 20, nullptr, false });

    ~Context() { ggml_free(ctx); }
};

static void fill(ggml_tensor * x, std::mt19937 & random) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < ggml_nelements(x); ++i) {
        ((float *) x->data)[i] = normal(random);
    }
}

// The rows of all matrices of `x` (K, rows, matrices), one after the other.
static ggml_tensor * contiguous_copy(ggml_context * ctx, const ggml_tensor * x) {
    ggml_tensor * copy = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, K, x->ne[1] * x->ne[2]);
    for (int64_t i = 0; i < copy->ne[1]; ++i) {
        memcpy((char *) copy->data + i * copy->nb[1],
               (const char *) x->data + i % x->ne[1] * x->nb[1] + i / x->ne[1] * x->nb[2], K * sizeof(float));
    }
    return copy;
}

static void test_type(ggml_type type) {
    std::mt19937  random(type);
    Context       plain;
    ggml_tensor * floats = ggml_new_tensor_2d(plain.ctx, GGML_TYPE_F32, K, N);
    fill(floats, random);
    std::vector<char> values(ggml_row_size(type, K) * N);
    ggml_quantize_chunk(type, (const float *) floats->data, values.data(), 0, N, K, nullptr);
    ggml_get_type_traits(type)->to_float(values.data(), (float *) floats->data, (int64_t) K * N);

    ggml_context *        ctx    = ggml_init({ ggml_tensor_overhead() * 2, nullptr, true });
    ggml_tensor *         weight = ggml_new_tensor_2d(ctx, type, K, N);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_amx_buffer_type());
    ggml_backend_tensor_set(weight, values.data(), 0, values.size());

    for (int64_t rows : { 1, 2, 5, 16, 17, 32, 40 }) {
        ggml_tensor * x = ggml_new_tensor_2d(plain.ctx, GGML_TYPE_F32, K, rows);
        fill(x, random);
        ggml_tensor * node       = ggml_mul_mat(plain.ctx, weight, x);
        const auto    got        = compute(node);
        double        difference = 0, power = 0;
        for (int64_t i = 0; i < rows * N; ++i) {
            double sum = 0;
            for (int64_t k = 0; k < K; ++k) {
                sum +=
                    (double) ((const float *) x->data)[i / N * K + k] * ((const float *) floats->data)[i % N * K + k];
            }
            difference += (got[i] - sum) * (got[i] - sum);
            power += sum * sum;
        }
        expect(buffer_type().supports_op(nullptr, node) && difference <= 1e-4 * power,  // activations have 8 bits
               text("%s, %d rows: NMSE %g", ggml_type_name(type), (int) rows, difference / power));

        for (int64_t matrices :
             { 1, 3 }) {  // rows of a wider tensor, in the order (K, row, matrix) and (K, matrix, row)
            for (bool permuted : { false, true }) {
                ggml_tensor * wide = ggml_new_tensor_3d(plain.ctx, GGML_TYPE_F32, K + 64, permuted ? matrices : rows,
                                                        permuted ? rows : matrices);
                fill(wide, random);
                ggml_tensor * view =
                    ggml_view_3d(plain.ctx, wide, K, wide->ne[1], wide->ne[2], wide->nb[1], wide->nb[2], 32 * 4);
                view               = permuted ? ggml_permute(plain.ctx, view, 0, 2, 1, 3) : view;
                ggml_tensor * y    = ggml_mul_mat(plain.ctx, weight, view);
                bool          same = buffer_type().supports_op(nullptr, y);
                if (same) {
                    ggml_tensor * copy = contiguous_copy(plain.ctx, view);
                    const auto    all  = compute(y);
                    for (int64_t i = 0; i < matrices; ++i) {
                        ggml_tensor * part =
                            ggml_view_2d(plain.ctx, copy, K, rows, copy->nb[1], i * rows * copy->nb[1]);
                        const auto each = compute(ggml_mul_mat(plain.ctx, weight, part));
                        same = same && memcmp(each.data(), &all[i * rows * N], each.size() * sizeof(float)) == 0;
                    }
                }
                expect(same, text("%s, %d matrices of %d rows of a wider tensor%s", ggml_type_name(type),
                                  (int) matrices, (int) rows, permuted ? ", permuted" : ""));
            }
        }
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
}

// Only one matrix is packed, and memory is reserved for one. A loader asks with a buffer of no size.
static void test_three_dimensions(ggml_type type) {
    Context       context;
    ggml_tensor * weight = ggml_new_tensor_3d(context.ctx, type, K, N, 4);
    weight->buffer       = ggml_backend_buft_alloc_buffer(ggml_backend_amx_buffer_type(), 0);
    ggml_tensor * x      = ggml_new_tensor_3d(context.ctx, GGML_TYPE_F32, K, 8, 4);
    expect(!buffer_type().supports_op(nullptr, ggml_mul_mat(context.ctx, weight, x)),
           text("%s: a weight with three dimensions was accepted", ggml_type_name(type)));
    ggml_backend_buffer_free(weight->buffer);
}

int main() {
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K,
                            GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS }) {
        test_type(type);
        test_three_dimensions(type);
    }
    return report();
}
