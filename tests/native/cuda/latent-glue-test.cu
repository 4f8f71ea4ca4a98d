// ggml's side of latent attention on CUDA: which nodes are supported on which device, absorbed and decompressed
// (latent-ggml.cu), that other nodes are not touched, and that the results are correct.

#include "../latent-attn-case.h"
#include "ggml-cuda-standin.cuh"
#include "latent-ggml.cuh"
#include "on-device.cuh"
#include "to-floats.cuh"

static constexpr float UNTOUCHED = 12345.0f;

// Whether the absorbed node of this shape is computed. Its result has to be correct then, and untouched otherwise.
static bool taken(const LatentShape & shape, int capability = 800) {
    standin_capability = capability;
    LatentCase                attention(shape);
    ggml_backend_cuda_context cuda(0);
    ggml_tensor *             node = attention.node();
    std::fill((float *) node->data, (float *) node->data + ggml_nelements(node), UNTOUCHED);
    OnDevice   device(node);
    const bool yes = ggml_cuda_latent_attention(cuda, device.node());
    device.fetch();
    const float * got = (const float *) node->data;
    if (yes) {
        CHECK(attention.nmse(shape.n_rows()) <= limit_of(shape.cache));
    } else {
        CHECK(std::count(got, got + ggml_nelements(node), UNTOUCHED) == ggml_nelements(node));
    }
    return yes;
}

// Whether the decompressed node of this shape is supported. Its result has to be correct then.
static bool claimed(const LatentShape & shape, int capability = 800) {
    standin_capability = capability;
    LatentCase attention(shape);
    if (!ggml_cuda_latent_attn_supported(0, attention.node())) {
        return false;
    }
    ggml_backend_cuda_context cuda(0);
    OnDevice                  device(attention.node());
    ggml_cuda_op_latent_attn(cuda, device.node());
    device.fetch();
    CHECK(attention.nmse(shape.n_rows()) <= limit_of(shape.cache));
    return true;
}

static LatentShape with_cache(LatentShape shape, ggml_type type) {
    shape.cache = type;
    return shape;
}

static LatentShape with_weights(LatentShape shape, ggml_type type) {
    shape.weights = type;
    return shape;
}

static void test_absorbed() {
    LatentShape one = with_cache(LatentShape().with(1, 70), GGML_TYPE_Q8_0);
    one.n_heads     = 2;
    for (const ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_BF16, GGML_TYPE_F32 }) {
        CHECK(taken(with_cache(one, type)));
    }
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q5_1 }) {
        CHECK(!taken(with_cache(one, type)));
    }
    LatentShape two = one;
    two.n_streams   = 2;
    CHECK(taken(two.with(8, 70)));
    CHECK(!taken(two.with(9, 70)));

    CHECK(!taken(one, 750));
    CHECK(taken(one, 1200));

    LatentShape off = one;
    off.plain       = true;
    CHECK(!taken(off));
    LatentShape small = one;
    small.n_latent    = 256;
    CHECK(!taken(small));
}

static void test_decompressed() {
    LatentShape few = LatentShape().with(3, 40);
    few.expand      = true;
    few.n_heads     = 2;
    CHECK(claimed(few));
    CHECK(claimed(few, 1200));
    CHECK(!claimed(few, 750));
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0 }) {
        CHECK(claimed(with_weights(few, type)));
    }
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        CHECK(claimed(with_cache(few, type)));
    }
    CHECK(!claimed(with_weights(few, GGML_TYPE_Q4_1)));
    CHECK(!claimed(with_cache(few, GGML_TYPE_Q5_1)));
    LatentShape small = few;
    small.n_latent    = 256;
    CHECK(!claimed(small));
    small         = few;
    small.n_value = 64;
    CHECK(!claimed(small));
}

int main() {
    test_absorbed();
    test_decompressed();
    printf("all as it should be\n");
}
