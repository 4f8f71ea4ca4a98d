#pragma once

// K types: unpacks a super block of one row in registers, for quant-gemm-dot-rows.cpp.

#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "quant-gemm-vector.h"

#include <cstring>

namespace quant_gemm {

#if QUANT_GEMM_AVX512

// 256 weights of Q6_K: their quants in the order of k as unsigned bytes, and one factor per 16 of them.
struct SuperBlock {
    __m512i codes[4];
    __m512i factors;
};

// For ternary logic: second ? first : third, bit by bit. The first register is overwritten.
constexpr int CHOOSE = 0xe2;

inline __m512i choose(__m512i where, __m512i x, __m512i otherwise) {
    return _mm512_ternarylogic_epi32(x, where, otherwise, CHOOSE);
}

// 32 bytes, twice: once for 32 values, once for the 32 values in higher bits.
inline __m512i twice(const uint8_t * p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) p));
}

inline __m512i shifts(int first, int second) {
    return halves(_mm256_set1_epi16((short) first), _mm256_set1_epi16((short) second));
}

// Shifts the halves to the left by `first` and `second` bits, to the right if negative.
inline __m512i shifted(__m512i x, int first, int second) {
    return second >= 0 ? _mm512_sllv_epi16(x, shifts(first, second)) : _mm512_srlv_epi16(x, shifts(-first, -second));
}

// Each half of 128 values: 64 bytes of lower nibbles (low halves: values 0..63, high ones: 64..127), and 32 bytes of
// upper pairs of bits, pair q for values 32q .. 32q + 31.
inline SuperBlock load(const block_q6_K & w) {
    const __m512i six      = bytes(0x3f);
    const __m512i to_left  = shifts(4, 2);
    const __m512i to_right = shifts(0, 2);
    SuperBlock    s;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m512i low     = _mm512_loadu_si512(w.ql + 64 * half);
        const __m512i high    = _mm512_srli_epi16(low, 4);
        const __m512i upper   = twice(w.qh + 32 * half);
        const __m512i first   = _mm512_sllv_epi16(upper, to_left);
        const __m512i second  = _mm512_srlv_epi16(upper, to_right);
        s.codes[2 * half]     = _mm512_and_si512(choose(bytes(0x0f), low, first), six);
        s.codes[2 * half + 1] = _mm512_and_si512(choose(bytes(0x0f), high, second), six);
    }
    s.factors = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) w.scales));
    return s;
}

// ---- the other types

// The quants of a row as unsigned bytes, two blocks of 32 in a vector, and the factor of each lane. Quants of Q2_K are
// multiplied with their factors of four bits instead. Q3_K: also minus the offset of the quants, 4, times the factor of
// each 16 weights.
struct TwoBlocks {
    __m512i codes[4];
    __m512i factors[4];
    __m256i offsets;
};

template <typename Block> constexpr bool HAS_FACTORS = !IS_ONE_OF<Block, block_q2_K>;
template <typename Block> constexpr bool HAS_MINIMA  = !IS_ONE_OF<Block, block_q3_K>;

// The blocks of vector j: 64 bytes of Q2_K and Q3_K hold two bits of all eight blocks, those of Q4_K and Q5_K four blocks.
template <typename Block> constexpr bool TWO_BITS = IS_ONE_OF<Block, block_q2_K, block_q3_K>;

template <typename Block> constexpr int first_block(int j) {
    return TWO_BITS<Block> ? j : j / 2 * 4 + j % 2;
}

template <typename Block> constexpr int second_block(int j) {
    return first_block<Block>(j) + (TWO_BITS<Block> ? 4 : 2);
}

// Bytes a, b, c and d of each 128 bits: one for all N-byte numbers of a quarter of the vector.
template <int N> inline __m512i numbers(__m512i x, int a, int b, int c, int d) {
    constexpr uint32_t ZEROS  = N == 2 ? 0x80008000 : 0x80808000;
    constexpr uint32_t TIMES  = N == 2 ? 0x00010001 : 1;
    const auto         number = [](int i) { return _mm_set1_epi32((int) (ZEROS | TIMES * (uint32_t) i)); };
    return _mm512_shuffle_epi8(x,
                               halves(_mm256_set_m128i(number(b), number(a)), _mm256_set_m128i(number(d), number(c))));
}

inline TwoBlocks load_two_blocks(const block_q2_K & w) {
    const __m512i x      = _mm512_loadu_si512(w.qs);
    const __m512i scales = low_nibbles(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) w.scales)));
    TwoBlocks     to;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i codes = _mm512_and_si512(_mm512_srli_epi16(x, 2 * j), bytes(3));
        to.codes[j]         = _mm512_mullo_epi16(codes, numbers<2>(scales, 2 * j, 2 * j + 1, 2 * j + 8, 2 * j + 9));
    }
    return to;
}

// 16 scales of six bits with an offset of 32: low nibbles of the first 8 bytes, high ones, and upper pairs of bits in the
// last 4 bytes, pair i for scales 4i ... Loads two bytes in front of them and two behind.
inline __m128i scales_of(const block_q3_K & w) {
    const __m128i x      = _mm_loadu_si128((const __m128i *) (w.scales - 2));
    const __m128i nibble = _mm_shuffle_epi8(x, _mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9));
    const __m128i pairs =
        _mm_shuffle_epi8(x, _mm_setr_epi8(10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13));
    const __m128i low  = _mm_srlv_epi64(nibble, _mm_set_epi64x(4, 0));
    const __m128i high = _mm_rorv_epi32(pairs, _mm_setr_epi32(28, 30, 0, 2));  // to bits 4 and 5
    const __m128i both = _mm_ternarylogic_epi32(low, _mm_set1_epi8(0x0f), high, CHOOSE);
    const __m128i six  = _mm_and_si128(both, _mm_set1_epi8(0x3f));
    return _mm_sub_epi8(six, _mm_set1_epi8(32));
}

// Number a in the 32-bit lanes of the first quarter, a + 1 in the second, a + 8 and a + 9 in the others.
inline __m512i in_quarters(__m256i numbers, int a) {
    const __m512i which = halves(_mm256_set_m128i(_mm_set1_epi32(a + 1), _mm_set1_epi32(a)),
                                 _mm256_set_m128i(_mm_set1_epi32(a + 9), _mm_set1_epi32(a + 8)));
    return _mm512_maskz_permutexvar_epi16(0x55555555, which, _mm512_castsi256_si512(numbers));
}

// The third bit of block b is bit b of 32 bytes.
inline TwoBlocks load_two_blocks(const block_q3_K & w) {
    const __m512i x      = _mm512_loadu_si512(w.qs);
    const __m512i thirds = _mm512_srlv_epi16(twice(w.hmask), shifts(0, 4));
    const __m256i scales = _mm256_cvtepi8_epi16(scales_of(w));
    TwoBlocks     to;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i third = j < 2 ? _mm512_slli_epi16(thirds, 2 - j) : _mm512_srli_epi16(thirds, j - 2);
        to.codes[j]         = _mm512_and_si512(choose(bytes(3), _mm512_srli_epi16(x, 2 * j), third), bytes(7));
        to.factors[j]       = in_quarters(scales, 2 * j);
    }
    to.offsets = _mm256_mullo_epi16(scales, _mm256_set1_epi16(-4));
    return to;
}

// The factors of Q4_K and Q5_K, a byte each, from 12 bytes (see give_scales_and_minima).
inline uint64_t eight_factors(const uint8_t (&scales)[K_SCALE_SIZE]) {
    uint32_t x[3];
    memcpy(x, scales, sizeof(x));
    const uint32_t high = (x[2] & 0x0f0f0f0f) | (x[0] >> 2 & 0x30303030);
    return (uint64_t) high << 32 | (x[0] & 0x3f3f3f3f);
}

template <typename Block> inline TwoBlocks load_two_blocks(const Block & w) {
    const __m512i factors = _mm512_set1_epi64((long long) eight_factors(w.scales));
    TwoBlocks     to;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const int     first  = first_block<Block>(j);
        const int     second = second_block<Block>(j);
        const __m512i x      = _mm512_loadu_si512(w.qs + j / 2 * 64);
        to.codes[j]          = j % 2 == 0 ? low_nibbles(x) : high_nibbles(x);
        if constexpr (IS_ONE_OF<Block, block_q5_K>) {  // bit b of a byte of qh is the fifth bit of block b
            const __m512i fifth = shifted(twice(w.qh), 4 - first, 4 - second);
            to.codes[j]         = _mm512_or_si512(to.codes[j], _mm512_and_si512(fifth, bytes(16)));
        }
        to.factors[j] = numbers<4>(factors, first, first, second, second);
    }
    return to;
}

#endif

}  // namespace quant_gemm
