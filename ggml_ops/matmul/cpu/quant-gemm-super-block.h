#pragma once

// Q4_K, Q5_K and Q6_K: unpacks a super block of one row in registers, for quant-gemm-dot-rows.cpp.

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

// Moves bits within bytes in one instruction. Bits that are not moved become zero.
#if defined(__GFNI__)
#define QUANT_GEMM_GFNI 1

constexpr uint64_t bit_move(int from, int to) {
    return 1ull << (8 * (7 - to) + from);
}

// Bytes of the lower half, and of the upper one.
inline __m512i move_bits(__m512i x, uint64_t first, uint64_t second) {
    const __m512i moves = halves(_mm256_set1_epi64x((long long) first), _mm256_set1_epi64x((long long) second));
    return _mm512_gf2p8affine_epi64_epi8(x, moves, 0);
}
#else
#define QUANT_GEMM_GFNI 0
#endif

// Each half of 128 values: 64 bytes of lower nibbles (low halves: values 0..63, high ones: 64..127), and 32 bytes of
// upper pairs of bits, pair q for values 32q .. 32q + 31.
inline SuperBlock load(const block_q6_K & w) {
    const __m512i six      = bytes(0x3f);
    const __m512i to_left  = shifts(4, 2);
    const __m512i to_right = shifts(0, 2);
    SuperBlock    s;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m512i low   = _mm512_loadu_si512(w.ql + 64 * half);
        const __m512i high  = _mm512_srli_epi16(low, 4);
        const __m512i upper = twice(w.qh + 32 * half);
#if QUANT_GEMM_GFNI
        const auto    to_4_5  = [](int from) { return bit_move(from, 4) | bit_move(from + 1, 5); };
        const __m512i first   = move_bits(upper, to_4_5(0), to_4_5(2));
        const __m512i second  = move_bits(upper, to_4_5(4), to_4_5(6));
        s.codes[2 * half]     = choose(bytes(0x0f), low, first);
        s.codes[2 * half + 1] = choose(bytes(0x0f), high, second);
#else
        const __m512i first   = _mm512_sllv_epi16(upper, to_left);
        const __m512i second  = _mm512_srlv_epi16(upper, to_right);
        s.codes[2 * half]     = _mm512_and_si512(choose(bytes(0x0f), low, first), six);
        s.codes[2 * half + 1] = _mm512_and_si512(choose(bytes(0x0f), high, second), six);
#endif
    }
    s.factors = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) w.scales));
    return s;
}

// ---- Q4_K and Q5_K

// The quants of a row as unsigned bytes, two blocks of 32 in a vector, and the factor of each lane.
struct TwoBlocks {
    __m512i codes[4];
    __m512i factors[4];
};

// The first block of vector j; the other one is the second after it.
constexpr int first_block(int j) {
    return j / 2 * 4 + j % 2;
}

// Byte a of each 128 bits in the 32-bit lanes of the lower half, byte b in those of the upper half.
inline __m512i numbers(__m512i x, int a, int b) {
    const auto number = [](int i) { return _mm256_set1_epi32((int) (0x80808000 | (uint32_t) i)); };
    return _mm512_shuffle_epi8(x, halves(number(a), number(b)));
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
        const int     first  = first_block(j);
        const int     second = first + 2;
        const __m512i x      = _mm512_loadu_si512(w.qs + j / 2 * 64);
        to.codes[j]          = j % 2 == 0 ? low_nibbles(x) : high_nibbles(x);
        if constexpr (IS_ONE_OF<Block, block_q5_K>) {  // bit b of a byte of qh is the fifth bit of block b
            const __m512i fifth = shifted(twice(w.qh), 4 - first, 4 - second);
            to.codes[j]         = _mm512_or_si512(to.codes[j], _mm512_and_si512(fifth, bytes(16)));
        }
        to.factors[j] = numbers(factors, first, second);
    }
    return to;
}

#endif

}  // namespace quant_gemm
