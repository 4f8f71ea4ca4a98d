// ggml's side of LATENT_ATTN on CUDA (latent-attn-ggml.cu): which nodes it claims on which device, and that what it
// claims comes out right, with weights of several types.

#include "../check.h"
#include "../latent-attn-case.h"
#include "ggml-cuda-standin.cuh"
#include "latent-attn-ggml.cuh"
#include "on-device.cuh"
#include "to-floats.cuh"

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

int main() {
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
    printf("all as it should be\n");
}
