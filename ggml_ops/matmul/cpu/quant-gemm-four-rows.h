#pragma once

// Q2_K and Q3_K, for quant-gemm-dot-rows.cpp: four rows at once.
//
// 64 bytes of a row, a vector, hold two bits of all its 256 quants. Quarter 2h + s of the vector has the bytes 16s ..
// 16s + 15 of half h, whose pairs of bits q belong to group 8h + 2q + s of 16 weights, which have one factor. Words of 32 bits
// are transposed among four rows, in each quarter: then each lane has words of one row, so that products of 16 weights
// are added in one lane. Two such sums fit in a lane as 16-bit integers; one instruction multiplies them with two factors.

#include "ggml-common.h"
#include "quant-gemm-panel.h"
#include "quant-gemm-super-block.h"

namespace quant_gemm {

#if QUANT_GEMM_AVX512

// Word j of each quarter, in quarter j.
inline __m512i transposed(__m512i x) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

// A number in all lanes of each quarter, which may be two of 16 bits.
inline __m512i quarters(int a, int b, int c, int d) {
    return halves(_mm256_set_m128i(_mm_set1_epi32(b), _mm_set1_epi32(a)),
                  _mm256_set_m128i(_mm_set1_epi32(d), _mm_set1_epi32(c)));
}

inline __m512i in_each_quarter(__m128i x) {
    return _mm512_broadcast_i32x4(x);
}

// 16 bytes of each of four rows.
inline __m512i load_16_of_4(const char * const * row, size_t offset) {
    const auto load = [&](int r) { return _mm_loadu_si128((const __m128i *) (row[r] + offset)); };
    const auto two  = [&](int r) { return _mm256_inserti128_si256(_mm256_castsi128_si256(load(r)), load(r + 1), 1); };
    return halves(two(0), two(2));
}

// Without this, GCC loads the vector from memory again for each use.
inline __m512i read_once(__m512i x) {
#if defined(__GNUC__)
    asm("" : "+v"(x));
#endif
    return x;
}

// Factors of 16 weights for the two pairs of sums, and minima: two 16-bit numbers in each lane.
struct FourFactors {
    __m512i products[2];
    __m512i minima[2];
};

// Four rows:
//   load, transpose   reads row r; transposes all four, once they are loaded
//   codes             their quants q as bytes that begin at bit BIT[q], the words j of each quarter
//   PAIRS             which two sums are multiplied at once. The first of them begins at bit 0 or is shifted to it
//   factors           the factors and minima of four rows
template <typename Block> struct FourRows;

template <> struct FourRows<block_q2_K> {
    static constexpr int BIT[4]      = { 0, 2, 0, 2 };
    static constexpr int PAIRS[2][2] = { { 0, 1 }, { 2, 3 } };

    __m512i two_bits[4];

    inline void load(int r, const block_q2_K & w) { two_bits[r] = read_once(_mm512_loadu_si512(w.qs)); }

    inline void transpose() { quant_gemm::transpose(two_bits); }

    inline void codes(int j, __m512i (&to)[4]) const {
        const __m512i low  = two_bits[j];
        const __m512i high = _mm512_srli_epi16(low, 4);
        to[0]              = _mm512_and_si512(low, bytes(0x03));
        to[1]              = _mm512_and_si512(low, bytes(0x0c));
        to[2]              = _mm512_and_si512(high, bytes(0x03));
        to[3]              = _mm512_and_si512(high, bytes(0x0c));
    }

    // Bytes: first numbers of the first and the second pair, then the second ones.
    static inline FourFactors factors(const char * const * row, size_t at) {
        const __m512i order     = in_each_quarter(_mm_setr_epi8(0, 4, 2, 6, 1, 5, 3, 7, 8, 12, 10, 14, 9, 13, 11, 15));
        const __m512i all       = load_16_of_4(row, at + offsetof(block_q2_K, scales));
        const __m512i x         = transposed(_mm512_shuffle_epi8(all, order));
        const auto    four_bits = [](__m512i y) { return _mm512_and_si512(y, _mm512_set1_epi32(0x000f000f)); };
        return { { four_bits(x), four_bits(_mm512_srli_epi32(x, 8)) },
                 { four_bits(_mm512_srli_epi32(x, 4)), four_bits(_mm512_srli_epi32(x, 12)) } };
    }
};

template <> struct FourRows<block_q3_K> {
    static constexpr int BIT[4]      = { 0, 1, 4, 5 };
    static constexpr int PAIRS[2][2] = { { 0, 2 }, { 1, 3 } };

    __m512i two_bits[4];
    __m512i thirds[4];  // those of quants 0 to 3 in bits 2, 3, 6, 7

#if QUANT_GEMM_GFNI
    static constexpr uint64_t to_thirds(int from) {
        return bit_move(from, 2) | bit_move(from + 1, 3) | bit_move(from + 2, 6) | bit_move(from + 3, 7);
    }
#endif

    // The third bits of half h are bits 4h .. 4h + 3 of 32 bytes.
    inline void load(int r, const block_q3_K & w) {
        two_bits[r] = read_once(_mm512_loadu_si512(w.qs));
#if QUANT_GEMM_GFNI
        thirds[r] = move_bits(twice(w.hmask), to_thirds(0), to_thirds(4));
#else
        const __m512i upper = _mm512_sllv_epi16(twice(w.hmask), shifts(4, 0));
        thirds[r]           = choose(bytes(0x0f), _mm512_srli_epi16(upper, 2), upper);
#endif
    }

    inline void transpose() {
        quant_gemm::transpose(two_bits);
        quant_gemm::transpose(thirds);
    }

    inline void codes(int j, __m512i (&to)[4]) const {
        const __m512i even = choose(bytes(0x33), two_bits[j], thirds[j]);
        const __m512i odd  = choose(bytes(0x66), _mm512_srli_epi16(two_bits[j], 1), thirds[j]);
        to[0]              = _mm512_and_si512(even, bytes(0x07));
        to[1]              = _mm512_and_si512(odd, bytes(0x0e));
        to[2]              = _mm512_and_si512(even, bytes(0x70));
        to[3]              = _mm512_and_si512(odd, bytes(0xe0));
    }

    // See load_scales_q3_K. Also loads the two bytes before the scales and the two after them. All six bits are moved to the upper
    // end of a byte, where inverting the highest one subtracts the offset of 32. Bytes: the numbers q in order.
    static inline FourFactors factors(const char * const * row, size_t at) {
        const __m512i nibbles = in_each_quarter(_mm_setr_epi8(2, 4, 6, 8, 3, 5, 7, 9, 2, 4, 6, 8, 3, 5, 7, 9));
        const __m512i pairs =
            in_each_quarter(_mm_setr_epi8(10, 12, 10, 12, 11, 13, 11, 13, 10, 12, 10, 12, 11, 13, 11, 13));
        const __m512i all = load_16_of_4(row, at + offsetof(block_q3_K, scales) - 2);
        const __m512i low =
            _mm512_rolv_epi32(_mm512_shuffle_epi8(all, nibbles), in_each_quarter(_mm_setr_epi32(2, 2, 30, 30)));
        const __m512i high =
            _mm512_sllv_epi16(_mm512_shuffle_epi8(all, pairs), in_each_quarter(_mm_setr_epi16(6, 4, 6, 4, 2, 0, 2, 0)));
        const __m512i x = transposed(_mm512_xor_si512(choose(bytes(0x3c), low, high), bytes(0x80)));
        return { { _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 10), _mm512_srai_epi16(x, 10) }, {} };
    }
};

// The word of each of four rows, in each quarter, that holds the scales of the super block. Q3_K: in its upper half.
template <typename Block> inline __m512i scales_of_four(const char * const * row, size_t at) {
    const auto word = [&](int r) {
        const char * p = row[r] + at;
        int          x;
        if constexpr (IS_ONE_OF<Block, block_q2_K>) {
            memcpy(&x, p + offsetof(block_q2_K, GGML_COMMON_AGGR_U), sizeof(x));
        } else {
            memcpy(&x, p + offsetof(block_q3_K, d) - 2, sizeof(x));
        }
        return x;
    };
    __m512i x = _mm512_set1_epi32(word(0));
    x         = _mm512_mask_set1_epi32(x, 0x2222, word(1));
    x         = _mm512_mask_set1_epi32(x, 0x4444, word(2));
    return _mm512_mask_set1_epi32(x, 0x8888, word(3));
}

// The sums of pair p, as halves. A sum begins at the bit of its quants: the upper half needs no bits below.
template <typename Block> inline __m512i two_sums(const __m512i (&sums)[4], int p) {
    using Four         = FourRows<Block>;
    const int     low  = Four::PAIRS[p][0];
    const int     high = Four::PAIRS[p][1];
    const __m512i x    = Four::BIT[low] == 0 ? sums[low] : _mm512_srli_epi32(sums[low], Four::BIT[low]);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, x, _mm512_slli_epi32(sums[high], 16 - Four::BIT[high]));
}

template <typename Block> constexpr bool HAS_MINIMA = IS_ONE_OF<Block, block_q2_K>;

// 256 activations for four rows: all lanes of a quarter have the same word. Bounds of the sums of 16 products: 48 * 127
// (Q2_K), and with minus the offset times the activations 64 * 127 (Q3_K); both fit in 16 bits.
template <typename Block> struct FourActs {
    __m512i codes[4][4];  // for quants q, words j
    __m512i starts[4];  // Q3_K: minus the offset of the quants, 4, times the sum of 16 activations, from bit BIT[q] on
    __m512i sums[2];    // Q2_K: sums of 16 activations, for pairs of minima
    float   scale;

    inline void load(const ActSuperBlock & a) {
        scale = a.scale;
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            const auto    load = [&](int b) { return _mm256_loadu_si256((const __m256i *) (a.codes + BLOCK * b)); };
            const __m512i x    = halves(load(q), load(q + 4));
            codes[q][0]        = _mm512_shuffle_epi32(x, _MM_PERM_AAAA);
            codes[q][1]        = _mm512_shuffle_epi32(x, _MM_PERM_BBBB);
            codes[q][2]        = _mm512_shuffle_epi32(x, _MM_PERM_CCCC);
            codes[q][3]        = _mm512_shuffle_epi32(x, _MM_PERM_DDDD);
        }
        const __m256i all = _mm256_loadu_si256((const __m256i *) a.sums_16);
        if constexpr (HAS_MINIMA<Block>) {
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) {
                const auto    both  = [&](int i) { return (i + 4 * p + 2) << 16 | (i + 4 * p); };
                const __m512i which = quarters(both(0), both(1), both(8), both(9));
                sums[p]             = _mm512_permutexvar_epi16(which, _mm512_castsi256_si512(all));
            }
        } else {
            const __m512i less = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_cvtepi16_epi32(all));
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) {
                const __m512i which = quarters(2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9);
                starts[q] = _mm512_slli_epi32(_mm512_permutexvar_epi32(which, less), 2 + FourRows<Block>::BIT[q]);
            }
        }
    }

    inline __m512i start(int q) const { return HAS_MINIMA<Block> ? _mm512_setzero_si512() : starts[q]; }
};

#endif

}  // namespace quant_gemm
