// Measures peak rates of a device with ggml: bytes moved by a copy, and multiply-adds of large matmuls, per second.
//
//   device NAME SECONDS     prints one line of JSON; null for operations that the device does not support
//
// Sizes grow until a graph takes long enough to be timed, or uses its share of the memory.

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace {

constexpr int    NODES    = 4;     // per graph, to amortize the launch
constexpr double ENOUGH   = 0.02;  // minimum seconds per graph
constexpr int    LARGEST  = 8192;  // maximum rows and columns of a matmul
constexpr size_t MEBIBYTE = size_t(1) << 20;

// Builds one result in a context; NODES of them make a graph.
using Build = std::function<ggml_tensor *(ggml_context *)>;

double seconds;  // spent repeating a graph

// The best time of a graph in seconds; 0 if the device does not support it or memory is too small.
double best(ggml_backend_t backend, const Build & build) {
    std::vector<uint8_t>   memory(ggml_tensor_overhead() * 8 * NODES + ggml_graph_overhead());
    const ggml_init_params params = { memory.size(), memory.data(), true };
    ggml_context *         ctx    = ggml_init(params);
    ggml_cgraph *          graph  = ggml_new_graph(ctx);
    bool                   able   = true;
    for (int i = 0; i < NODES; ++i) {
        ggml_tensor * result = build(ctx);
        able                 = able && ggml_backend_supports_op(backend, result);
        ggml_build_forward_expand(graph, result);
    }
    ggml_backend_buffer_t buffer = able ? ggml_backend_alloc_ctx_tensors(ctx, backend) : nullptr;
    double                least  = 0;
    if (buffer) {
        ggml_backend_buffer_clear(buffer, 0);
        const int64_t began = ggml_time_us();
        for (int turn = 0; turn < 3 || ggml_time_us() - began < seconds * 1e6; ++turn) {
            const int64_t from = ggml_time_us();
            if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
                least = 0;
                break;
            }
            const double took = std::max<int64_t>(1, ggml_time_us() - from) / 1e6;
            least             = turn < 2 ? took : std::min(least, took);  // the first run includes warm-up
        }
        ggml_backend_buffer_free(buffer);
    }
    ggml_free(ctx);
    return least;
}

// Bytes read and written per second by a copy.
double copying(ggml_backend_t backend, size_t room) {
    double rate = 0;
    for (size_t size = 16 * MEBIBYTE; 2 * NODES * size <= room; size *= 2) {
        const Build build = [size](ggml_context * ctx) {
            const int64_t n    = size / sizeof(float);
            ggml_tensor * from = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n);
            return ggml_cpy(ctx, from, ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n));
        };
        const double took = best(backend, build);
        if (took == 0) {
            break;
        }
        rate = 2.0 * size * NODES / took;
        if (took >= ENOUGH) {
            break;
        }
    }
    return rate;
}

// Multiply-adds per second with weights of a type and float32 activations.
double matmul(ggml_backend_t backend, ggml_type type) {
    double rate = 0;
    for (int n = 512; n <= LARGEST; n *= 2) {
        const Build build = [type, n](ggml_context * ctx) {
            ggml_tensor * weights = ggml_new_tensor_2d(ctx, type, n, n);
            return ggml_mul_mat(ctx, weights, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n));
        };
        const double took = best(backend, build);
        if (took == 0) {
            break;
        }
        rate = std::max(rate, (double) n * n * n * NODES / took);
        if (took >= ENOUGH) {
            break;
        }
    }
    return rate;
}

std::string number(double value) {
    return value > 0 ? std::to_string(value) : "null";
}

}  // namespace

int main(int argc, char ** argv) {
    seconds = argc == 3 ? atof(argv[2]) : 0;
    if (!(seconds > 0)) {
        fprintf(stderr, "usage: device NAME SECONDS\n");
        return 2;
    }
    ggml_time_init();
    ggml_backend_load_all();
    ggml_backend_dev_t device = ggml_backend_dev_by_name(argv[1]);
    if (!device) {
        fprintf(stderr, "device: no device %s\n", argv[1]);
        return 1;
    }
    ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
    if (!backend) {
        fprintf(stderr, "device: %s cannot be used\n", argv[1]);
        return 1;
    }
    size_t free, total;
    ggml_backend_dev_memory(device, &free, &total);
    printf("{\"threads\": 0, \"read\": %s, \"f32\": %s, \"f16\": %s, \"bf16\": %s, \"int8\": %s}\n",
           number(copying(backend, free / 2)).c_str(), number(matmul(backend, GGML_TYPE_F32)).c_str(),
           number(matmul(backend, GGML_TYPE_F16)).c_str(), number(matmul(backend, GGML_TYPE_BF16)).c_str(),
           number(matmul(backend, GGML_TYPE_Q8_0)).c_str());
    ggml_backend_free(backend);
    return 0;
}
