#pragma once

// Functions common to all unpacking. They process 16 rows at once, one row per 32-bit lane: 16 bytes of 16 rows are
// transposed into four vectors, and the type's bit fields are extracted in the lanes.

#define GGML_COMMON_IMPL_CPP
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "repack.h"
#include "simd-mappings.h"

#include <algorithm>

namespace quant_gemm {

#if QUANT_GEMM_VNNI

// 16 rows of a panel, from `first` on.
struct HalfPanel {
    Panel & panel;
    int     first;

    inline void codes(int b, int j, __m512i x) const { _mm512_store_si512(panel.codes[b][j][first], x); }

    inline void scales(int b, __m512 x) const { _mm512_store_ps(panel.scales[b] + first, x); }

    inline void factors(int b, __m512i x) const { _mm512_store_si512(panel.factors[b] + first, x); }

    inline void super_scales(__m512 x) const { _mm512_store_ps(panel.super_scales + first, x); }

    inline void minima(int pair, __m512i x) const { _mm512_store_si512(panel.minima[pair][first], x); }

    inline void minimum_scales(__m512 x) const { _mm512_store_ps(panel.minimum_scales + first, x); }
};

// The addresses of 16 rows; the last one is repeated past the end.
struct Rows16 {
    const char * row[16];

    Rows16(const char * weights, size_t stride, int64_t first, int64_t n_rows) {
        for (int i = 0; i < 16; i++) {
            row[i] = weights + std::min(first + i, n_rows - 1) * stride;
        }
    }

    // x[j]: bytes offset + 4j .. + 3 of every row
    inline void load16(size_t offset, __m512i * x) const {
        __m512i four_rows[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512i v    = _mm512_castsi128_si512(load(4 * i, offset));
            v            = _mm512_inserti32x4(v, load(4 * i + 1, offset), 1);
            v            = _mm512_inserti32x4(v, load(4 * i + 2, offset), 2);
            four_rows[i] = _mm512_inserti32x4(v, load(4 * i + 3, offset), 3);
        }
        const __m512i first_pair  = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
        const __m512i second_pair = _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
        const __m512i a           = _mm512_permutex2var_epi32(four_rows[0], first_pair, four_rows[1]);
        const __m512i b           = _mm512_permutex2var_epi32(four_rows[2], first_pair, four_rows[3]);
        const __m512i c           = _mm512_permutex2var_epi32(four_rows[0], second_pair, four_rows[1]);
        const __m512i d           = _mm512_permutex2var_epi32(four_rows[2], second_pair, four_rows[3]);
        x[0]                      = _mm512_shuffle_i64x2(a, b, 0x44);
        x[1]                      = _mm512_shuffle_i64x2(a, b, 0xee);
        x[2]                      = _mm512_shuffle_i64x2(c, d, 0x44);
        x[3]                      = _mm512_shuffle_i64x2(c, d, 0xee);
    }

    // x[j]: bytes offset + 4j .. + 3 of every row, of 32 bytes
    inline void load32(size_t offset, __m512i * x) const {
        load16(offset, x);
        load16(offset + 16, x + 4);
    }

    // the F16 numbers at an offset
    inline __m512 load_half(size_t offset) const {
        alignas(32) uint16_t x[16];
        for (int i = 0; i < 16; i++) {
            memcpy(&x[i], row[i] + offset, sizeof(x[i]));
        }
        return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *) x));
    }

    // half of the power of two for the exponents at an offset (MXFP4, whose values are doubled)
    inline __m512 load_power(size_t offset) const {
        alignas(64) float x[16];
        for (int i = 0; i < 16; i++) {
            x[i] = GGML_CPU_E8M0_TO_FP32_HALF(row[i][offset]);
        }
        return _mm512_load_ps(x);
    }

    inline __m512i load_word(size_t offset) const {
        alignas(64) uint32_t x[16];
        for (int i = 0; i < 16; i++) {
            memcpy(&x[i], row[i] + offset, sizeof(x[i]));
        }
        return _mm512_load_si512(x);
    }

  private:
    inline __m128i load(int i, size_t offset) const { return _mm_loadu_si128((const __m128i *) (row[i] + offset)); }
};

// The addresses of two groups of 8 interleaved rows. A group of n rows is n strides long.
struct Groups2 {
    const char * group[2];

    Groups2(const char * weights, size_t stride, int64_t first, int64_t n_rows) {
        for (int i = 0; i < 2; i++) {
            group[i] = weights + std::min(first + 8 * i, n_rows - 8) * stride;
        }
    }

    // x[j]: bytes 4j .. 4j + 3 of every row, of 16 bytes, interleaved by 8
    inline void load16(size_t offset, __m512i * x) const {
        load8(offset, x);
        load8(offset + 64, x + 2);
    }

    inline void load32(size_t offset, __m512i * x) const {
        load16(offset, x);
        load16(offset + 128, x + 4);
    }

    // 8 F16 numbers of each group
    inline __m512 load_half(size_t offset) const { return _mm512_cvtph_ps(load_16_bytes(offset)); }

    // 2 bytes per row, in the lower halves of the lanes
    inline __m512i load_pair(size_t offset) const { return _mm512_cvtepu16_epi32(load_16_bytes(offset)); }

    // 8 exponents of each group
    inline __m512 load_power(size_t offset) const {
        alignas(64) float x[16];
        for (int i = 0; i < 16; i++) {
            x[i] = GGML_CPU_E8M0_TO_FP32_HALF(group[i / 8][offset + i % 8]);
        }
        return _mm512_load_ps(x);
    }

  private:
    // x[0], x[1]: the first and the second four of the 8 bytes that are contiguous for each row
    inline void load8(size_t offset, __m512i * x) const {
        const __m512i a    = _mm512_loadu_si512(group[0] + offset);
        const __m512i b    = _mm512_loadu_si512(group[1] + offset);
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd  = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        x[0]               = _mm512_permutex2var_epi32(a, even, b);
        x[1]               = _mm512_permutex2var_epi32(a, odd, b);
    }

    // of each group
    inline __m256i load_16_bytes(size_t offset) const {
        const __m128i a = _mm_loadu_si128((const __m128i *) (group[0] + offset));
        const __m128i b = _mm_loadu_si128((const __m128i *) (group[1] + offset));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    }
};

// Unpacks `n_blocks` blocks of 16 rows, from block `block` on. Rows: Rows16 or Groups2.
template <typename Rows> using UnpackHalf = void(const Rows & rows, int64_t block, int n_blocks, const HalfPanel & to);

// Types of 256 values (quant-gemm-unpack-k.cpp).
UnpackHalf<Rows16>  unpack_q2_K, unpack_q3_K, unpack_q4_K, unpack_q5_K, unpack_q6_K, unpack_iq4_xs;
UnpackHalf<Groups2> unpack_q2_K_groups, unpack_q4_K_groups;

inline __m512 lower_half(__m512i x) {  // the F16 number in the lower half of each lane
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
}

inline __m512 upper_half(__m512i x) {
    return lower_half(_mm512_srli_epi32(x, 16));
}

// Nibbles of a block: bytes 0..15 hold values 0..15 in their low nibbles and 16..31 in their high ones.
template <typename Decode>
inline void store_nibbles(const HalfPanel & to, int b, const __m512i (&x)[4], Decode decode) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        to.codes(b, j, decode(low_nibbles(x[j])));
        to.codes(b, j + 4, decode(high_nibbles(x[j])));
    }
}

#endif

}  // namespace quant_gemm
