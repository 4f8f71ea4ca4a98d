#pragma once

// Replaces convert.cu: ggml's CPU code for the kernels of ggml-cuda that convert a tensor's values to floats or halves.

#include "convert.cuh"

#include <algorithm>
#include <vector>

template <ggml_type TYPE> static void to_floats(const void * from, float * to, int64_t n, cudaStream_t) {
    ggml_get_type_traits(TYPE)->to_float(from, to, n);
}

to_fp32_cuda_t ggml_get_to_fp32_cuda(ggml_type type) {
    switch (type) {
    case GGML_TYPE_F16:
        return to_floats<GGML_TYPE_F16>;
    case GGML_TYPE_BF16:
        return to_floats<GGML_TYPE_BF16>;
    case GGML_TYPE_Q4_0:
        return to_floats<GGML_TYPE_Q4_0>;
    case GGML_TYPE_Q5_0:
        return to_floats<GGML_TYPE_Q5_0>;
    case GGML_TYPE_Q8_0:
        return to_floats<GGML_TYPE_Q8_0>;
    default:
        return nullptr;
    }
}

template <ggml_type TYPE> static void to_halves(const void * from, half * to, int64_t n, cudaStream_t) {
    std::vector<float> values(n);
    ggml_get_type_traits(TYPE)->to_float(from, values.data(), n);
    std::transform(values.begin(), values.end(), to, [](float x) { return __float2half(x); });
}

to_fp16_cuda_t ggml_get_to_fp16_cuda(ggml_type type) {
    return type == GGML_TYPE_Q8_0   ? to_halves<GGML_TYPE_Q8_0>
           : type == GGML_TYPE_Q4_0 ? to_halves<GGML_TYPE_Q4_0>
                                    : nullptr;
}
