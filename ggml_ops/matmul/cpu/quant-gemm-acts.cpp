// Activations: quantized to the same quants and scales as in ggml for the type of the weights, and packed for tiles.
// Tests compare with quantize_row_q8_0 for x86, quantize_row_q8_K, ggml_cpu_fp32_to_bf16 and ggml_cpu_fp32_to_fp16.

#include "ggml-cpu.h"
#include "quant-gemm-panel.h"
#include "simd-mappings.h"

namespace quant_gemm {

size_t act_row_size(Scheme scheme, int64_t k) {
    switch (scheme) {
    case Scheme::q8_0:
        return (k + SLICE - 1) / SLICE * sizeof(ActBlocks);
    case Scheme::bf16:
        return k * sizeof(ggml_bf16_t);
    case Scheme::f16:
        return k * sizeof(float);
    default:
        return k / SLICE * sizeof(ActSuperBlock);
    }
}

#if QUANT_GEMM_VNNI

// Rounds 32 scaled values to quants; returns their sums by 16, contiguous.
static inline void round_codes(const float * x, float scale, int8_t * codes, int32_t (&sums)[2]) {
    for (int i = 0; i < 2; i++) {
        const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), _mm512_set1_ps(scale)));
        _mm_storeu_si128((__m128i *) (codes + 16 * i), _mm512_cvtsepi32_epi8(v));
        sums[i] = _mm512_reduce_add_epi32(v);
    }
}

static void pack_q8_0(int offset, const float * x, int64_t k, ActBlocks * packed) {
    for (int64_t i = 0; i < k; i += BLOCK) {
        const int b = i / BLOCK % N_BLOCKS;
        if (b == 0 && k - i < SLICE) {
            packed[i / SLICE] = {};
        }
        ActBlocks &  to      = packed[i / SLICE];
        const __m512 low     = _mm512_abs_ps(_mm512_loadu_ps(x + i));
        const __m512 high    = _mm512_abs_ps(_mm512_loadu_ps(x + i + 16));
        const float  largest = _mm512_reduce_max_ps(_mm512_max_ps(low, high));
        int32_t      sums[2];
        round_codes(x + i, largest != 0.0f ? 127.0f / largest : 0.0f, to.codes[b], sums);
        to.scales[b] = GGML_CPU_FP16_TO_FP32(GGML_CPU_FP32_TO_FP16(largest / 127.0f));
        to.starts[b] = -offset * (sums[0] + sums[1]);
    }
}

// The first of 256 values with the largest magnitude.
static inline float extreme(const float * x) {
    __m512 largest = _mm512_setzero_ps();
    for (int i = 0; i < SLICE; i += 16) {
        largest = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + i)), largest);
    }
    const __m512 all = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int i = 0; i < SLICE; i += 16) {
        const __mmask16 found = _mm512_cmpeq_ps_mask(_mm512_abs_ps(_mm512_loadu_ps(x + i)), all);
        if (found != 0) {
            return x[i + __builtin_ctz(found)];
        }
    }
    return 0.0f;
}

// Stores the sums by 16 of block b as the scheme needs them.
static inline void put_sums(Scheme scheme, int offset, int b, const int32_t (&sums)[2], ActSuperBlock & packed) {
    const int32_t both = sums[0] + sums[1];
    switch (scheme) {
    case Scheme::q8_K_16:
        packed.starts[2 * b]     = -offset * sums[0];
        packed.starts[2 * b + 1] = -offset * sums[1];
        return;
    case Scheme::q8_K_256:
        packed.start = (b == 0 ? 0 : packed.start) - offset * both;
        [[fallthrough]];
    case Scheme::q8_K_256_mins:
        packed.sums_16[2 * b]     = (int16_t) sums[0];
        packed.sums_16[2 * b + 1] = (int16_t) sums[1];
        return;
    default:
        packed.starts[b] = -offset * both;
        packed.sums[b]   = (int16_t) both;
    }
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
    for (int64_t i = 0; i < k; i += 16) {
        const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
        _mm512_storeu_ps(packed + i, _mm512_cvtph_ps(halves));
    }
}

void pack_row(const Format & format, const float * x, int64_t k, char * packed) {
    switch (format.scheme) {
    case Scheme::q8_0:
        return pack_q8_0(format.offset, x, k, (ActBlocks *) packed);
    case Scheme::bf16:
        return ggml_cpu_fp32_to_bf16(x, (ggml_bf16_t *) packed, k);
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
