// Activations: quantized to the same quants and scales as in ggml for the type of the weights (if they are finite), and
// packed for tiles.
// Tests compare with quantize_row_q8_0 for x86, quantize_row_q8_K, ggml_cpu_fp32_to_bf16 and ggml_cpu_fp32_to_fp16.

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "quant-gemm-panel.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>

namespace quant_gemm {

#if QUANT_GEMM_KERNELS

constexpr int      VECTORS_OF_16 = 16 / LANES;
constexpr unsigned ALL_LANES     = (1u << LANES) - 1;

// Rounds 32 scaled values to quants; returns their sums by 16, contiguous. Where the scale is NaN, all are 0.
static inline void round_codes(const float * x, float scale, int8_t * codes, int32_t (&sums)[2]) {
    if (std::isnan(scale)) {
        std::fill(codes, codes + BLOCK, (int8_t) 0);
        sums[0] = sums[1] = 0;
        return;
    }
    for (int i = 0; i < 2; i++) {
        Ints sum = ints(0);
#pragma GCC unroll 4
        for (int v = i * VECTORS_OF_16; v < (i + 1) * VECTORS_OF_16; v++) {
            const Ints rounded = to_ints(mul(load_floats(x + LANES * v), floats(scale)));
            store_bytes(codes + LANES * v, rounded);
            sum = add_32(sum, rounded);
        }
        sums[i] = sum_lanes(sum);
    }
}

// The largest magnitude of n values; NaN if one of them is not finite, so that the result is NaN.
static inline float largest_of(const float * x, int n) {
    Floats largest = floats(0.0f);
    Floats nothing = floats(0.0f);  // NaN where a value is not finite
    for (int i = 0; i < n; i += LANES) {
        const Floats value = load_floats(x + i);
        largest            = max(abs(value), largest);
        nothing            = fma(value, floats(0.0f), nothing);
    }
    return lanes_equal(nothing, floats(0.0f)) == ALL_LANES ? max_lane(largest) : NAN;
}

// As ggml computes it on each processor.
static inline float inverse_of(float largest, float scale) {
    if (QUANT_GEMM_NEON) {
        return scale != 0.0f ? 1.0f / scale : 0.0f;
    }
    return largest != 0.0f ? 127.0f / largest : 0.0f;
}

// Sums that may overflow where values are not numbers or are infinite.
static inline int32_t sum_of(int32_t a, int32_t b) {
    return (int32_t) ((uint32_t) a + (uint32_t) b);
}

static inline int32_t start_of(int offset, int32_t sum) {
    return (int32_t) (0u - (uint32_t) offset * (uint32_t) sum);
}

static void pack_q8_0(int offset, const float * x, int64_t k, ActBlocks * packed) {
    for (int64_t i = 0; i < k; i += BLOCK) {
        const int b = i / BLOCK % N_BLOCKS;
        if (b == 0 && k - i < SLICE) {
            packed[i / SLICE] = {};
        }
        ActBlocks & to      = packed[i / SLICE];
        const float largest = largest_of(x + i, BLOCK);
        const float scale   = largest / 127.0f;
        int32_t     sums[2];
        round_codes(x + i, inverse_of(largest, scale), to.codes[b], sums);
        to.scales[b] = GGML_CPU_FP16_TO_FP32(GGML_CPU_FP32_TO_FP16(scale));
        to.starts[b] = start_of(offset, sum_of(sums[0], sums[1]));
    }
}

// The first of 256 values with the largest magnitude; NaN if one of them is not finite.
static inline float extreme(const float * x) {
    const float largest = largest_of(x, SLICE);
    if (std::isnan(largest)) {
        return largest;
    }
    const Floats all = floats(largest);
    for (int i = 0; i < SLICE; i += LANES) {
        const unsigned found = lanes_equal(abs(load_floats(x + i)), all);
        if (found != 0) {
            return x[i + __builtin_ctz(found)];
        }
    }
    return 0.0f;
}

// Stores the sums by 16 of block b as the scheme needs them.
static inline void put_sums(Scheme scheme, int offset, int b, const int32_t (&sums)[2], ActSuperBlock & packed) {
    const int32_t both = sum_of(sums[0], sums[1]);
    if (scheme == Scheme::q8_K_256) {
        packed.start = sum_of(b == 0 ? 0 : packed.start, start_of(offset, both));
    } else if (scheme == Scheme::q8_K_16 && has_starts(scheme)) {
        packed.starts[2 * b]     = start_of(offset, sums[0]);
        packed.starts[2 * b + 1] = start_of(offset, sums[1]);
        return;
    } else if (weights_per_minimum(scheme) != 16) {
        packed.starts[b] = start_of(offset, both);
        packed.sums[b]   = (int16_t) both;
        return;
    }
    packed.sums_16[2 * b]     = (int16_t) sums[0];
    packed.sums_16[2 * b + 1] = (int16_t) sums[1];
}

static void pack_q8_K(Scheme scheme, int offset, const float * x, int64_t k, ActSuperBlock * packed) {
    for (int64_t i = 0; i < k; i += SLICE, packed++) {
        const float largest = extreme(x + i);
        const float scale   = largest != 0.0f ? -127.0f / largest : 0.0f;
        packed->scale       = largest != 0.0f ? 1 / scale : 0.0f;
        for (int b = 0; b < N_BLOCKS; b++) {
            int32_t sums[2];
            round_codes(x + i + BLOCK * b, scale, packed->codes + BLOCK * b, sums);
            put_sums(scheme, offset, b, sums, *packed);
        }
    }
}

static void pack_f16(const float * x, int64_t k, float * packed) {
    for (int64_t i = 0; i < k; i += LANES) {
        store_floats(packed + i, rounded_to_half(load_floats(x + i)));
    }
}

static void pack_bf16(const float * x, int64_t k, char * packed) {
#if QUANT_GEMM_BF16
    ggml_cpu_fp32_to_bf16(x, (ggml_bf16_t *) packed, k);
#else
    for (int64_t i = 0; i < k; i++) {
        ((float *) packed)[i] = GGML_BF16_TO_FP32(GGML_FP32_TO_BF16(x[i]));
    }
#endif
}

void pack_row(const Format & format, const float * x, int64_t k, char * packed) {
    switch (format.scheme) {
    case Scheme::q8_0:
        return pack_q8_0(format.offset, x, k, (ActBlocks *) packed);
    case Scheme::bf16:
        return pack_bf16(x, k, packed);
    case Scheme::f16:
        return pack_f16(x, k, (float *) packed);
    default:
        return pack_q8_K(format.scheme, format.offset, x, k, (ActSuperBlock *) packed);
    }
}

#else

void pack_row(const Format &, const float *, int64_t, char *) {}  // never called: there is no format

#endif

}  // namespace quant_gemm
