// ggml's side of latent attention on CUDA (latent-ggml.cu): which nodes of FLASH_ATTN_EXT it takes and of LATENT_ATTN it
// claims on which device, what it leaves alone, and that what it computes comes out right, with weights of several types.

#include "../check.h"
#include "../latent-attn-case.h"
#include "ggml-cuda-standin.cuh"
#include "latent-ggml.cuh"
#include "on-device.cuh"
#include "to-floats.cuh"

static constexpr float UNTOUCHED = 12345.0f;

// Whether the node of this shape is taken. Its result is then right, and untouched otherwise.
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
        CHECK(attention.nmse(shape.n_rows()) <= (ggml_is_quantized(shape.cache) ? 2e-5 : 1e-7));
    } else {
        CHECK(std::count(got, got + ggml_nelements(node), UNTOUCHED) == ggml_nelements(node));
    }
    return yes;
}

static void test_absorbed() {
    LatentShape one;
    one.n_keys  = 70;
    one.n_heads = 2;
    one.cache   = GGML_TYPE_Q8_0;
    for (const ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_BF16, GGML_TYPE_F32 }) {
        LatentShape s = one;
        s.cache       = type;
        CHECK(taken(s));
    }
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q5_1 }) {
        LatentShape s = one;
        s.cache       = type;
        CHECK(!taken(s));
    }
    LatentShape few = one;
    few.n_queries   = 8;
    few.n_streams   = 2;
    CHECK(taken(few));
    few.n_queries = 9;
    CHECK(!taken(few));

    CHECK(!taken(one, 750));
    CHECK(taken(one, 1200));

    LatentShape off = one;
    off.plain       = true;
    CHECK(!taken(off));
    LatentShape small = one;
    small.n_latent    = 256;
    CHECK(!taken(small));
}

static bool supported(const LatentShape & shape, int capability = 800) {
    standin_capability = capability;
    LatentCase attention(shape);
    return ggml_cuda_latent_attn_supported(0, attention.node());
}

static double error_of(const LatentShape & shape) {
    LatentCase                attention(shape);
    ggml_backend_cuda_context cuda(0);
    OnDevice                  device(attention.node());
    ggml_cuda_op_latent_attn(cuda, device.node());
    device.fetch();
    return attention.nmse(shape.n_rows());
}

static void test_decompressed() {
    LatentShape few;
    few.expand    = true;
    few.n_keys    = 40;
    few.n_queries = 3;
    few.n_heads   = 2;
    CHECK(supported(few));
    CHECK(supported(few, 1200));
    CHECK(!supported(few, 750));
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0 }) {
        LatentShape s = few;
        s.weights     = type;
        CHECK(supported(s));
        CHECK(error_of(s) <= 1e-7);
    }
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        LatentShape s = few;
        s.cache       = type;
        CHECK(supported(s));
        CHECK(error_of(s) <= (ggml_is_quantized(type) ? 2e-5 : 1e-7));
    }
    LatentShape unread = few;
    unread.weights     = GGML_TYPE_Q4_1;
    CHECK(!supported(unread));
    LatentShape five = few;
    five.cache       = GGML_TYPE_Q5_1;
    CHECK(!supported(five));
    LatentShape small = few;
    small.n_latent    = 256;
    CHECK(!supported(small));
    small         = few;
    small.n_value = 64;
    CHECK(!supported(small));
}

int main() {
    test_absorbed();
    test_decompressed();
    printf("all as it should be\n");
}
