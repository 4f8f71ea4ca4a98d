#pragma once

// Quantizes activations to Q8_1 inside a kernel. The bits are those of upstream's kernel quantize_q8_1.

#include "kimi-rows.cuh"

namespace kimi_cuda {

constexpr int Q8_1_LANES = QK8_1 / VALUES_PER_LANE;  // that share a block

static __device__ __forceinline__ float quant(float x, float d) {
    return d == 0.0f ? 0.0f : roundf(x / d);
}

// The sum of the values of Q8_1_LANES lanes, added in upstream's order.
static __device__ __forceinline__ float sum_of_block(float4 x) {
    x.x = warp_reduce_sum<Q8_1_LANES>(x.x);
    x.y = warp_reduce_sum<Q8_1_LANES>(x.y);
    x.z = warp_reduce_sum<Q8_1_LANES>(x.z);
    x.w = warp_reduce_sum<Q8_1_LANES>(x.w);
    return (x.x + x.z) + (x.y + x.w);
}

// Quantizes the lane's values x, the first of which is value `at` of the row. All lanes of a warp must call it.
// stores: whether these values belong to the row.
static __device__ __forceinline__ void quantize_q8_1(block_q8_1 * row, int at, float4 x, bool stores) {
    const float most = warp_reduce_max<Q8_1_LANES>(fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))));
    const float sum  = sum_of_block(x);
    const float d    = most / 127.0f;
    if (!stores) {
        return;
    }
    block_q8_1 & block = row[at / QK8_1];
    *reinterpret_cast<char4 *>(block.qs + at % QK8_1) =
        make_char4(quant(x.x, d), quant(x.y, d), quant(x.z, d), quant(x.w, d));
    if (at % QK8_1 == 0) {
        block.ds = make_half2(d, sum);
    }
}

}  // namespace kimi_cuda
