// Activations: quantised exactly as ggml does it for the weight's type, then packed for the tiles.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-cpu.h"
#include "quant-gemm-panel.h"
#include "simd-mappings.h"

#include <algorithm>
#include <numeric>

namespace quant_gemm {

size_t act_row_size(Scheme scheme, int64_t k) {
    return scheme == Scheme::q8_0 ? k / BLOCK * sizeof(ActBlock) : k / SLICE * sizeof(ActSuperBlock);
}

static int32_t sum_of(const int8_t * codes, int n) {
    return std::accumulate(codes, codes + n, int32_t(0));
}

static void pack_q8_0(int offset, const float * x, int64_t k, ActBlock * packed) {
    static const ggml_from_float_t quantise = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float;
    block_q8_0                     blocks[N_BLOCKS];
    for (int64_t i = 0; i < k; i += SLICE) {
        const int64_t n = std::min<int64_t>(SLICE, k - i);
        quantise(x + i, blocks, n);
        for (int64_t b = 0; b < n / BLOCK; b++, packed++) {
            memcpy(packed->codes, blocks[b].qs, BLOCK);
            packed->scale = GGML_CPU_FP16_TO_FP32(blocks[b].d);
            packed->start = -offset * sum_of(blocks[b].qs, BLOCK);
        }
    }
}

static void pack_q8_K(int offset, bool by_16, const float * x, int64_t k, ActSuperBlock * packed) {
    static const ggml_from_float_t quantise = ggml_get_type_traits_cpu(GGML_TYPE_Q8_K)->from_float;
    block_q8_K                     block;
    for (int64_t i = 0; i < k; i += SLICE, packed++) {
        quantise(x + i, &block, SLICE);
        memcpy(packed->codes, block.qs, SLICE);
        packed->scale = block.d;
        for (int b = 0; b < N_BLOCKS; b++) {
            const int32_t one = sum_of(block.qs + BLOCK * b, 16);
            const int32_t two = sum_of(block.qs + BLOCK * b + 16, 16);
            packed->sums[b]   = (int16_t) (one + two);
            if (by_16) {
                packed->starts[2 * b]     = -offset * one;
                packed->starts[2 * b + 1] = -offset * two;
            } else {
                packed->starts[b] = -offset * (one + two);
            }
        }
    }
}

void pack_row(const Format & format, const float * x, int64_t k, char * packed) {
    if (format.scheme == Scheme::q8_0) {
        pack_q8_0(format.offset, x, k, (ActBlock *) packed);
    } else {
        pack_q8_K(format.offset, format.scheme == Scheme::q8_K_16, x, k, (ActSuperBlock *) packed);
    }
}

}  // namespace quant_gemm
