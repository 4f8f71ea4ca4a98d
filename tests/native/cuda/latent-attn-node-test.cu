// ggml's side of LATENT_ATTN on CUDA (latent-attn-ggml.cu): which nodes it claims on which device, and that what it
// claims comes out right, with weights of several types. ggml's CPU code stands in for the kernels of ggml-cuda that
// make floats of them.

#include "../check.h"
#include "../latent-attn-case.h"
#include "convert.cuh"
#include "ggml-cuda-standin.cuh"
#include "latent-attn-ggml.cuh"

#include <deque>

using namespace cuda_emulator;

template <ggml_type TYPE> static void to_floats(const void * from, float * to, int64_t n, cudaStream_t) {
    ggml_get_type_traits(TYPE)->to_float(from, to, n);
}

to_fp32_cuda_t ggml_get_to_fp32_cuda(ggml_type type) {
    switch (type) {
    case GGML_TYPE_F16:
        return to_floats<GGML_TYPE_F16>;
    case GGML_TYPE_Q8_0:
        return to_floats<GGML_TYPE_Q8_0>;
    case GGML_TYPE_Q5_0:
        return to_floats<GGML_TYPE_Q5_0>;
    default:
        return nullptr;
    }
}

static bool supported(const LatentShape & shape, int capability = 800) {
    standin_capability = capability;
    LatentCase attention(shape);
    return ggml_cuda_latent_attn_supported(0, attention.node());
}

static double error_of(const LatentShape & shape) {
    LatentCase                    attention(shape);
    ggml_backend_cuda_context     cuda(0);
    ggml_tensor *                 node = attention.node();
    ggml_tensor                   dst  = *node;
    ggml_tensor                   src[5];
    std::deque<DeviceArray<char>> arrays;
    const auto                    move_to_device = [&](ggml_tensor & t) {
        arrays.emplace_back(std::vector<char>((char *) t.data, (char *) t.data + ggml_nbytes(&t)));
        t.data = arrays.back().data();
    };
    for (int i = 0; i < 5; ++i) {
        dst.src[i] = &(src[i] = *node->src[i]);
        move_to_device(src[i]);
    }
    move_to_device(dst);
    ggml_cuda_op_latent_attn(cuda, &dst);
    cudaDeviceSynchronize();
    memcpy(node->data, dst.data, ggml_nbytes(&dst));
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
