#pragma once

// Nodes for the host code of ggml-cuda, with their data on the emulated device.

#include "ggml-backend.h"
#include "ggml-cuda-standin.cuh"

#include <memory>
#include <random>
#include <vector>

static std::mt19937 rng(1);

// Tensors, each in an array of its own.
struct DeviceGraph {
    ggml_context *                                                 ctx = ggml_init({ 8 << 20, nullptr, true });
    ggml_backend_buffer_t                                          weights, results;
    ggml_backend_cuda_context                                      cuda{ 0 };
    std::vector<std::unique_ptr<cuda_emulator::DeviceArray<char>>> arrays;

    DeviceGraph() {
        weights = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), 16);
        results = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), 16);
        ggml_backend_buffer_set_usage(weights, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_backend_buffer_set_usage(results, GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    }

    ~DeviceGraph() {
        cuda.begin_node(nullptr);
        ggml_backend_buffer_free(weights);
        ggml_backend_buffer_free(results);
        ggml_free(ctx);
    }

    ggml_tensor * place(ggml_tensor * t, ggml_backend_buffer_t buffer) {
        arrays.push_back(std::make_unique<cuda_emulator::DeviceArray<char>>(ggml_nbytes(t)));
        t->data   = arrays.back()->data();
        t->buffer = buffer;
        return t;
    }

    ggml_tensor * result(ggml_tensor * t) {
        t->flags |= GGML_TENSOR_FLAG_COMPUTE;
        return place(t, results);
    }

    ggml_tensor * column(int64_t n, int64_t n_columns = 1, int64_t n_batches = 1) {
        ggml_tensor * t = place(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n, n_columns, n_batches), results);
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < ggml_nelements(t); ++i) {
            static_cast<float *>(t->data)[i] = normal(rng);
        }
        return t;
    }

    // A graph with the node and all it is computed from.
    ggml_cgraph * graph_of(ggml_tensor * last) {
        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, last);
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            ggml_graph_node(graph, i)->flags |= GGML_TENSOR_FLAG_COMPUTE;
        }
        return graph;
    }

    // The values of a node, which is NaN afterwards, so that a kernel that does not write it is found.
    std::vector<float> values(const ggml_tensor * node) {
        CUDA_CHECK(cudaStreamSynchronize(cuda.stream()));
        const float *      data = static_cast<const float *>(node->data);
        std::vector<float> result(data, data + ggml_nelements(node));
        memset(node->data, 0xff, ggml_nbytes(node));
        return result;
    }
};

// The place of a node in the graph.
static int index_of(ggml_cgraph * graph, const ggml_tensor * node) {
    int i = 0;
    while (ggml_graph_node(graph, i) != node) {
        ++i;
    }
    return i;
}
