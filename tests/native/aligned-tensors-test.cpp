// Tensors that ggml allocates in buffers of the CPU backend begin at a cache line, also behind a small tensor. Exit status
// 1 if not.

#include "check.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cstdint>
#include <initializer_list>

static void expect_aligned(const ggml_tensor * t) {
    expect((uintptr_t) t->data % 64 == 0, text("%s begins at %p", t->name, t->data));
}

static ggml_tensor * named(ggml_tensor * t, const char * name) {
    return ggml_set_name(t, name);
}

int main() {
    ggml_backend_buffer_type_t type = ggml_backend_cpu_buffer_type();
    ggml_init_params           params{ 1 << 20, nullptr, /*no_alloc=*/true };

    // weights and caches
    ggml_context * weights = ggml_init(params);
    for (int64_t n : { 1, 8, 24, 1000 }) {
        named(ggml_new_tensor_1d(weights, GGML_TYPE_F32, n), "a tensor of a context");
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(weights, type);
    for (ggml_tensor * t = ggml_get_first_tensor(weights); t != nullptr; t = ggml_get_next_tensor(weights, t)) {
        expect_aligned(t);
    }

    // a graph, whose first input is a single number
    ggml_context * ctx   = ggml_init(params);
    ggml_tensor *  one   = named(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1), "the first input");
    ggml_tensor *  x     = named(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 40, 3), "the second input");
    ggml_tensor *  sum   = named(ggml_add(ctx, x, one), "the sum");
    ggml_tensor *  norm  = named(ggml_rms_norm(ctx, sum, 1e-5f), "the norm");
    ggml_tensor *  both  = named(ggml_mul(ctx, norm, sum), "the product");
    ggml_cgraph *  graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, both);
    for (ggml_tensor * t : { one, x }) {
        ggml_set_input(t);
    }
    ggml_gallocr_t allocator = ggml_gallocr_new(type);
    CHECK(ggml_gallocr_alloc_graph(allocator, graph));
    for (ggml_tensor * t : { one, x, sum, norm, both }) {
        expect_aligned(t);
    }

    ggml_gallocr_free(allocator);
    ggml_free(ctx);
    ggml_backend_buffer_free(buffer);
    ggml_free(weights);
    return report();
}
