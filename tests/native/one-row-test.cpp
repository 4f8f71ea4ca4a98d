// MUL_MAT of many matrices with one row each, as one token of MLA multiplies k_b and v_b: against sums in double, and
// bit-identical for any number of threads, including more threads than matrices and numbers that do not divide evenly.
// Prints one line per failure; exit status 1 if there was a failure.

#include "check.h"
#include "cpu_backend.h"
#include "ggml-alloc.h"

#include <cmath>
#include <cstring>
#include <random>

static std::vector<float> compute(int64_t n_matrices, int n_threads, double & error) {
    constexpr int64_t K = 128, ROWS = 96;
    ggml_backend_t    backend = cpu_backend();
    cpu_backend_use(backend, n_threads, false);
    ggml_context * ctx = ggml_init({ ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true });
    ggml_tensor *  w   = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, K, ROWS, n_matrices);
    ggml_tensor *  x   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, K, 1, n_matrices);
    ggml_tensor *  y   = ggml_mul_mat(ctx, w, x);
    ApartBuffers   buffers;
    buffers.allocate(ctx, backend);

    std::mt19937                    random(n_matrices);
    std::normal_distribution<float> normal;
    std::vector<ggml_fp16_t>        weights(ggml_nelements(w));
    std::vector<float>              inputs(ggml_nelements(x));
    for (auto & each : weights) {
        each = ggml_fp32_to_fp16(normal(random));
    }
    for (float & each : inputs) {
        each = ggml_fp16_to_fp32(ggml_fp32_to_fp16(normal(random)));  // MUL_MAT rounds it to the weights' type
    }
    ggml_backend_tensor_set(w, weights.data(), 0, ggml_nbytes(w));
    ggml_backend_tensor_set(x, inputs.data(), 0, ggml_nbytes(x));
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);
    std::vector<float> result(ggml_nelements(y));
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        exit(2);
    }
    ggml_backend_tensor_get(y, result.data(), 0, ggml_nbytes(y));

    double difference = 0, power = 0;
    for (int64_t i = 0; i < (int64_t) result.size(); ++i) {
        double sum = 0;
        for (int64_t k = 0; k < K; ++k) {
            sum += (double) ggml_fp16_to_fp32(weights[i * K + k]) * inputs[i / ROWS * K + k];
        }
        difference += (result[i] - sum) * (result[i] - sum);
        power += sum * sum;
    }
    error = difference / power;
    ggml_free(ctx);
    ggml_backend_free(backend);
    return result;
}

int main() {
    for (int64_t n_matrices : { 1, 3, 4, 5, 13, 32 }) {
        double     error;
        const auto expected = compute(n_matrices, 1, error);
        for (int n_threads : { 1, 2, 3, 4, 8 }) {
            const auto got  = compute(n_matrices, n_threads, error);
            const bool same = memcmp(got.data(), expected.data(), expected.size() * sizeof(float)) == 0;
            expect(same && error <= 1e-10, text("%d matrices, %d threads: %s, NMSE %g", (int) n_matrices, n_threads,
                                                same ? "same bits" : "other bits", error));
        }
    }
    return report();
}
