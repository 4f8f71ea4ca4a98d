#pragma once

// Few columns and types of 256 values whose blocks' scales are integers of few bits (Q2_K, Q3_K): codes are multiplied with
// them as bytes, so that 256 products are one exact integer sum. For quant-gemm-dot.cpp.

#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "quant-gemm-dot.h"

#include <cstring>
#include <type_traits>

namespace quant_gemm {

#if QUANT_GEMM_VNNI

// 256 weights: their codes times their blocks' integers, in the order of k as unsigned bytes, and for each 16 of them an
// integer that belongs to the sum of the activations' codes.
struct ScaledBlock {
    __m512i codes[4];
    __m256i minima;
    float   scale;
    float   minimum_scale;
};

// Bytes 4i .. 4i + 3 of each quarter, each of them in all bytes of one quarter, ...
inline __m512i spread_bytes(__m512i x, int i) {
    const __m512i quarter = _mm512_set_epi64(0x0303030303030303, 0x0303030303030303, 0x0202020202020202,
                                             0x0202020202020202, 0x0101010101010101, 0x0101010101010101, 0, 0);
    return _mm512_shuffle_epi8(x, _mm512_add_epi8(quarter, bytes(4 * i)));
}

// ... and as numbers of 16 bits.
inline __m512i spread_numbers(__m512i x, int i) {
    return _mm512_maskz_mov_epi8(0x5555555555555555, spread_bytes(x, i));
}

// Values 64i .. 64i + 63 of Q2_K and Q3_K in the lower two bits of bytes, others above: 32 bytes hold four times 32 values.
inline __m512i pairs_of_bits(const uint8_t * qs, int i) {
    const __m512i x     = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) (qs + i / 2 * 32)));
    const __m512i shift = halves(_mm256_set1_epi16((short) (i % 2 * 4)), _mm256_set1_epi16((short) (i % 2 * 4 + 2)));
    return _mm512_srlv_epi16(x, shift);
}

inline ScaledBlock load_scaled(const block_q2_K & w) {
    ScaledBlock   s;
    const __m128i both   = _mm_loadu_si128((const __m128i *) w.scales);
    const __m512i scales = low_nibbles(_mm512_broadcast_i32x4(both));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i codes = _mm512_and_si512(pairs_of_bits(w.qs, i), bytes(3));
        s.codes[i]          = _mm512_mullo_epi16(codes, spread_numbers(scales, i));
    }
    s.minima = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(both, 4), _mm_set1_epi8(0x0f)));
    uint16_t d[2];  // of the scales, of the minima
    memcpy(d, (const char *) &w + offsetof(block_q2_K, GGML_COMMON_AGGR_U), sizeof(d));
    s.scale         = _cvtsh_ss(d[0]);
    s.minimum_scale = -_cvtsh_ss(d[1]);
    return s;
}

// Scales of six bits: the low nibbles of the first 8 of 12 bytes, then the high ones; their upper pairs of bits stand in the
// last 4 bytes, pair i for scales 4i ..
inline __m512i scales_of(const block_q3_K & w) {
    uint64_t nibbles;
    uint32_t pairs;
    memcpy(&nibbles, w.scales, sizeof(nibbles));
    memcpy(&pairs, w.scales + sizeof(nibbles), sizeof(pairs));
    const __m128i low = _mm_and_si128(_mm_set_epi64x((int64_t) (nibbles >> 4), (int64_t) nibbles), _mm_set1_epi8(0x0f));
    const __m128i up  = _mm_srlv_epi32(_mm_set1_epi32((int32_t) pairs), _mm_setr_epi32(0, 2, 4, 6));
    const __m128i six = _mm_or_si128(low, _mm_slli_epi16(_mm_and_si128(up, _mm_set1_epi8(3)), 4));
    return _mm512_broadcast_i32x4(_mm_sub_epi8(six, _mm_set1_epi8(32)));
}

inline ScaledBlock load_scaled(const block_q3_K & w) {
    ScaledBlock     s;
    const ScalesQ3K scales(scales_of(w));
    const __m512i   third = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) w.hmask));  // bit b: block b
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i to_left  = halves(_mm256_set1_epi16(2), _mm256_set1_epi16(1));
        const __m512i to_right = halves(_mm256_set1_epi16((short) (2 * i - 2)), _mm256_set1_epi16((short) (2 * i - 1)));
        const __m512i bit      = i == 0 ? _mm512_sllv_epi16(third, to_left) : _mm512_srlv_epi16(third, to_right);
        const __m512i codes    = codes_q3_K(pairs_of_bits(w.qs, i), bit, spread_bytes(scales.flips, i));
        const __m512i times    = _mm512_mullo_epi16(codes, spread_numbers(scales.magnitudes, i));
        s.codes[i]             = _mm512_add_epi8(times, spread_bytes(scales.rests, i));
    }
    s.scale = _cvtsh_ss(w.d);
    return s;
}

// A row times N_C columns.
template <typename Block, int N_C>
void dot_scaled_blocks(const char * row, int64_t k, const char * const * columns, float * sums) {
    constexpr bool HAS_MINIMA = std::is_same_v<Block, block_q2_K>;
    const Block *  w          = (const Block *) row;
    __m512         total[N_C];
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        total[c] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < k / SLICE; i++) {
        prefetch_behind(w + i, sizeof(Block));
        const ScaledBlock s = load_scaled(w[i]);
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const ActSuperBlock & a = ((const ActSuperBlock *) columns[c])[i];
            __m512i z = HAS_MINIMA ? _mm512_setzero_si512() : _mm512_zextsi128_si512(_mm_cvtsi32_si128(a.starts[0]));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                z = _mm512_dpbusd_epi32(z, s.codes[j], _mm512_loadu_si512(a.codes + 64 * j));
            }
            total[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(z), _mm512_set1_ps(s.scale * a.scale), total[c]);
            if constexpr (HAS_MINIMA) {
                const __m256i z16 = _mm256_madd_epi16(s.minima, _mm256_loadu_si256((const __m256i *) a.sums_16));
                const __m512  m   = _mm512_cvtepi32_ps(_mm512_zextsi256_si512(z16));
                total[c]          = _mm512_fmadd_ps(m, _mm512_set1_ps(s.minimum_scale * a.scale), total[c]);
            }
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        sums[c * PANEL_ROWS] = _mm512_reduce_add_ps(total[c]);
    }
}

#endif

}  // namespace quant_gemm
