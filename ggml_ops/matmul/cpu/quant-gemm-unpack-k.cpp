// Unpacking of types of 256 values (the others and the table are in quant-gemm-unpack.cpp).

#include "quant-gemm-unpack.h"

namespace quant_gemm {

#if QUANT_GEMM_VNNI

// Byte i of every lane, repeated in all of its bytes, ...
static inline __m512i spread_byte(__m512i x, int i) {
    const __m512i within = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    return _mm512_shuffle_epi8(x, _mm512_add_epi8(within, bytes(i)));
}

// ... and as two 16-bit numbers.
static inline __m512i spread_number(__m512i x, int i) {
    return _mm512_maskz_mov_epi8(0x5555555555555555, spread_byte(x, i));
}

// Block b of Q2_K, two bits per value: quants times their 4-bit scales are at most 45 and are stored as one byte.
// x: 32 bytes of each row, whose pairs of bits b % 4 are the block; scales: the block's two bytes of scale and minimum.
static inline void store_q2_K(const HalfPanel & to, int b, const __m512i (&x)[8], __m512i scales) {
    const __m512i low    = low_nibbles(scales);
    const __m512i first  = spread_number(low, 0);
    const __m512i second = spread_number(low, 1);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        const __m512i codes = _mm512_and_si512(_mm512_srli_epi16(x[j], 2 * (b % 4)), bytes(3));
        to.codes(b, j, _mm512_mullo_epi16(codes, j < 4 ? first : second));
    }
    const __m512i minima    = _mm512_and_si512(high_nibbles(scales), _mm512_set1_epi32(0xffff));
    const __m512i second_up = _mm512_slli_epi32(minima, 8);
    to.minima(b, _mm512_and_si512(_mm512_or_si512(minima, second_up), _mm512_set1_epi32(0xff00ff)));
}

// Each half of 128 values: 32 bytes, pair of bits q for values 32q .. 32q + 31; before both, 16 bytes with scales in
// their low nibbles and minima in their high ones.
void unpack_q2_K(const Rows16 & rows, int64_t block, int, const HalfPanel & to) {
    const size_t at = block / N_BLOCKS * sizeof(block_q2_K);
    __m512i      scales[4];
    rows.load16(at + offsetof(block_q2_K, scales), scales);
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
        __m512i x[8];
        rows.load32(at + offsetof(block_q2_K, qs) + 32 * part, x);
#pragma GCC unroll 4
        for (int b = 4 * part; b < 4 * part + 4; b++) {
            store_q2_K(to, b, x, _mm512_srli_epi32(scales[b / 2], 16 * (b % 2)));
        }
    }
    const __m512i d = rows.load_word(at + offsetof(block_q2_K, GGML_COMMON_AGGR_U));
    to.super_scales(lower_half(d));
    to.minimum_scales(upper_half(d));
}

// Q2_K of 8 interleaved rows; for each block of 32, two bytes of scales and minima of every row.
void unpack_q2_K_groups(const Groups2 & groups, int64_t block, int, const HalfPanel & to) {
    const size_t at = block / N_BLOCKS * sizeof(block_q2_Kx8);
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
        __m512i x[8];
        groups.load32(at + offsetof(block_q2_Kx8, qs) + 256 * part, x);
#pragma GCC unroll 4
        for (int b = 4 * part; b < 4 * part + 4; b++) {
            store_q2_K(to, b, x, groups.load_pair(at + offsetof(block_q2_Kx8, scales) + 16 * b));
        }
    }
    to.super_scales(groups.load_half(at + offsetof(block_q2_Kx8, d)));
    to.minimum_scales(groups.load_half(at + offsetof(block_q2_Kx8, dmin)));
}

// Values of Q3_K times their scales, -4 .. 3 times -32 .. 31, plus an offset of 124, are in 0 .. 252: the magnitude of
// the scale times c plus a remainder, all of them bytes; c is value + 4, or 3 - value if the scale is negative.
struct ScalesQ3K {
    __m512i magnitudes;
    __m512i flips;  // 7 if the scale is negative
    __m512i rests;

    explicit ScalesQ3K(__m512i scales) {
        const __mmask64 negative = _mm512_movepi8_mask(scales);
        magnitudes               = _mm512_abs_epi8(scales);
        const __m512i three      = _mm512_add_epi8(magnitudes, _mm512_add_epi8(magnitudes, magnitudes));
        flips                    = _mm512_maskz_mov_epi8(negative, bytes(7));
        rests                    = _mm512_sub_epi8(bytes(124), three);
        rests                    = _mm512_mask_sub_epi8(rests, (__mmask64) ~negative, rests, magnitudes);
    }
};

// c of values, from their lower two bits (pairs) and their third bit (thirds).
static inline __m512i codes_q3_K(__m512i pairs, __m512i thirds, __m512i flips) {
    const __m512i three_bits = _mm512_ternarylogic_epi32(bytes(3), pairs, thirds, 0xca);  // first ? second : third
    return _mm512_ternarylogic_epi32(three_bits, bytes(7), flips, 0x6a);                  // (first & second) ^ third
}

// Scales of Q3_K: 16 numbers of six bits, offset 32, in 12 bytes:
//   bytes 0 .. 3:  the lower four bits of numbers 0 .. 3 (low nibbles) and 8 .. 11 (high nibbles)
//   bytes 4 .. 7:  the lower four bits of numbers 4 .. 7 (low nibbles) and 12 .. 15 (high nibbles)
//   bytes 8 .. 11: the upper two bits; bits 2i and 2i + 1 of byte 8 + j are those of number 4i + j
static inline void load_scales_q3_K(const Rows16 & rows, size_t at, __m512i (&scales)[4]) {
    __m512i x[4];
    rows.load16(at + offsetof(block_q3_K, scales) - 4, x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i low = i < 2 ? low_nibbles(x[1 + i]) : high_nibbles(x[i - 1]);
        const __m512i up  = _mm512_and_si512(_mm512_srli_epi16(x[3], 2 * i), bytes(3));
        scales[i]         = _mm512_sub_epi8(_mm512_or_si512(low, _mm512_slli_epi16(up, 4)), bytes(32));
    }
}

// Two bits of a value are stored as in Q2_K, the third in bit b of 32 bytes, b the block. Stores values times scales.
void unpack_q3_K(const Rows16 & rows, int64_t block, int, const HalfPanel & to) {
    const size_t at = block / N_BLOCKS * sizeof(block_q3_K);
    __m512i      scales[4], third[8], x[8];
    load_scales_q3_K(rows, at, scales);
    rows.load32(at + offsetof(block_q3_K, hmask), third);
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        if (b % 4 == 0) {
            rows.load32(at + offsetof(block_q3_K, qs) + 8 * b, x);
        }
        const ScalesQ3K parts(scales[b / 2]);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const int     i     = 2 * (b % 2) + j / 4;
            const __m512i pair  = _mm512_srli_epi16(x[j], 2 * (b % 4));
            const __m512i bit   = b < 2 ? _mm512_slli_epi16(third[j], 2 - b) : _mm512_srli_epi16(third[j], b - 2);
            const __m512i codes = codes_q3_K(pair, bit, spread_byte(parts.flips, i));
            const __m512i times = _mm512_mullo_epi16(codes, spread_number(parts.magnitudes, i));
            to.codes(b, j, _mm512_add_epi8(times, spread_byte(parts.rests, i)));
        }
    }
    to.super_scales(rows.load_half(at + offsetof(block_q3_K, d)));
}

// Scales and minima of Q4_K and Q5_K, from d, dmin and 12 bytes of 6-bit numbers at the start of the block.
static inline void unpack_scales_and_minima(const Rows16 & rows, size_t at, const HalfPanel & to) {
    __m512i x[4];
    rows.load16(at, x);
    const __m512i lower6 = bytes(0x3f);
    const __m512i upper2 = bytes(0x30);
    const __m512i m_low  = _mm512_and_si512(x[2], lower6);
    const __m512i s_low  = _mm512_and_si512(x[1], lower6);
    const __m512i s_high = _mm512_or_si512(low_nibbles(x[3]), _mm512_and_si512(_mm512_srli_epi16(x[1], 2), upper2));
    const __m512i m_high = _mm512_or_si512(high_nibbles(x[3]), _mm512_and_si512(_mm512_srli_epi16(x[2], 2), upper2));
    const __m512i byte   = _mm512_set1_epi32(0xff);
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        const __m512i s = _mm512_and_si512(_mm512_srli_epi32(b < 4 ? s_low : s_high, 8 * (b % 4)), byte);
        to.factors(b, s);
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < N_BLOCKS / 2; pair++) {
        const __m512i m   = _mm512_srli_epi32(pair < 2 ? m_low : m_high, 16 * (pair % 2));
        const __m512i one = _mm512_and_si512(m, byte);
        const __m512i two = _mm512_slli_epi32(_mm512_and_si512(m, _mm512_set1_epi32(0xff00)), 8);
        to.minima(pair, _mm512_or_si512(one, two));
    }
    to.super_scales(lower_half(x[0]));
    to.minimum_scales(upper_half(x[0]));
}

// Blocks 2i and 2i + 1 of Q4_K: one in the low nibbles, one in the high ones.
static inline void store_two_blocks(const HalfPanel & to, int i, const __m512i (&x)[8]) {
#pragma GCC        unroll 8
    for (int j = 0; j < 8; j++) {
        to.codes(2 * i, j, low_nibbles(x[j]));
        to.codes(2 * i + 1, j, high_nibbles(x[j]));
    }
}

void unpack_q4_K(const Rows16 & rows, int64_t block, int, const HalfPanel & to) {
    const size_t at = block / N_BLOCKS * sizeof(block_q4_K);
    unpack_scales_and_minima(rows, at, to);
    for (int i = 0; i < N_BLOCKS / 2; i++) {
        __m512i x[8];
        rows.load32(at + offsetof(block_q4_K, qs) + 32 * i, x);
        store_two_blocks(to, i, x);
    }
}

void unpack_q5_K(const Rows16 & rows, int64_t block, int, const HalfPanel & to) {
    const size_t at = block / N_BLOCKS * sizeof(block_q5_K);
    unpack_scales_and_minima(rows, at, to);
    __m512i fifth[8];
    rows.load32(at + offsetof(block_q5_K, qh), fifth);
    for (int i = 0; i < N_BLOCKS / 2; i++) {
        __m512i x[8];
        rows.load32(at + offsetof(block_q5_K, qs) + 32 * i, x);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const __m512i   low  = low_nibbles(x[j]);
            const __m512i   high = high_nibbles(x[j]);
            const __mmask64 even = _mm512_test_epi8_mask(fifth[j], bytes(1 << (2 * i)));
            const __mmask64 odd  = _mm512_test_epi8_mask(fifth[j], bytes(2 << (2 * i)));
            to.codes(2 * i, j, _mm512_mask_add_epi8(low, even, low, bytes(16)));
            to.codes(2 * i + 1, j, _mm512_mask_add_epi8(high, odd, high, bytes(16)));
        }
    }
}

// Each half of 128 values: 64 bytes of lower nibbles (low halves: values 0..63, high ones: 64..127), and 32 bytes of
// upper pairs of bits, pair q for values 32q .. 32q + 31.
void unpack_q6_K(const Rows16 & rows, int64_t block, int, const HalfPanel & to) {
    const size_t at = block / N_BLOCKS * sizeof(block_q6_K);
    for (int part = 0; part < 2; part++) {
        __m512i upper[8];
        rows.load32(at + offsetof(block_q6_K, qh) + 32 * part, upper);
        for (int i = 0; i < 2; i++) {
            __m512i x[8];
            rows.load32(at + offsetof(block_q6_K, ql) + 64 * part + 32 * i, x);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                const __m512i pair  = bytes(0x30);
                const __m512i up    = _mm512_srli_epi16(upper[j], 2 * i);
                const __m512i first = _mm512_and_si512(_mm512_slli_epi16(up, 4), pair);
                const __m512i third = _mm512_and_si512(up, pair);
                to.codes(4 * part + i, j, _mm512_or_si512(low_nibbles(x[j]), first));
                to.codes(4 * part + i + 2, j, _mm512_or_si512(high_nibbles(x[j]), third));
            }
        }
    }
    __m512i scales[4];
    rows.load16(at + offsetof(block_q6_K, scales), scales);
#pragma GCC unroll 16
    for (int b = 0; b < SLICE / 16; b++) {
        to.factors(b, _mm512_srai_epi32(_mm512_slli_epi32(scales[b / 4], 24 - 8 * (b % 4)), 24));
    }
    to.super_scales(rows.load_half(at + offsetof(block_q6_K, d)));
}

void unpack_iq4_xs(const Rows16 & rows, int64_t block, int, const HalfPanel & to) {
    const size_t at = block / N_BLOCKS * sizeof(block_iq4_xs);
    __m512i      head[4];  // d and scales_h, scales_l
    rows.load16(at, head);
    const __m512i high = _mm512_srli_epi32(head[0], 16);
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        __m512i x[4];
        rows.load16(at + offsetof(block_iq4_xs, qs) + 16 * b, x);
        store_nibbles(to, b, x, iq4_values);
        const __m512i low4 = _mm512_and_si512(_mm512_srli_epi32(head[1], 4 * b), _mm512_set1_epi32(15));
        const __m512i up2  = _mm512_and_si512(_mm512_srli_epi32(high, 2 * b), _mm512_set1_epi32(3));
        const __m512i s    = _mm512_or_si512(low4, _mm512_slli_epi32(up2, 4));
        to.factors(b, _mm512_sub_epi32(s, _mm512_set1_epi32(32)));
    }
    to.super_scales(lower_half(head[0]));
}

// Q4_K of 8 interleaved rows; scales and minima of block b of all rows in 12 bytes, packed as in Q4_K.
void unpack_q4_K_groups(const Groups2 & groups, int64_t block, int, const HalfPanel & to) {
    const size_t at = block / N_BLOCKS * sizeof(block_q4_Kx8);
    for (int i = 0; i < N_BLOCKS / 2; i++) {
        __m512i x[8];
        groups.load32(at + offsetof(block_q4_Kx8, qs) + 256 * i, x);
        store_two_blocks(to, i, x);
    }
    for (int part = 0; part < 2; part++) {  // four blocks each
        const __m512i       one = six_bit_numbers(groups.group[0] + at + offsetof(block_q4_Kx8, scales) + 48 * part);
        const __m512i       two = six_bit_numbers(groups.group[1] + at + offsetof(block_q4_Kx8, scales) + 48 * part);
        alignas(64) uint8_t s[4][16], m[4][16];
        _mm512_store_si512(s, _mm512_unpacklo_epi64(one, two));
        _mm512_store_si512(m, _mm512_unpackhi_epi64(one, two));
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
            to.factors(4 * part + b, _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *) s[b])));
        }
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; pair++) {
            const __m512i even = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *) m[2 * pair]));
            const __m512i odd  = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *) m[2 * pair + 1]));
            to.minima(2 * part + pair, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
    }
    to.super_scales(groups.load_half(at + offsetof(block_q4_Kx8, d)));
    to.minimum_scales(groups.load_half(at + offsetof(block_q4_Kx8, dmin)));
}

#endif

}  // namespace quant_gemm
