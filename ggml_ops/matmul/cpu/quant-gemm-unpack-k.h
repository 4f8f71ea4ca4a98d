#pragma once

// Unpacking of types of 256 values (the others are in quant-gemm-unpack.h).

#include "quant-gemm-unpack.h"

namespace quant_gemm {

#if QUANT_GEMM_KERNELS

// Whether Q2_K and Q3_K are unpacked to quants times factors, which are bytes.
constexpr bool QUANTS_TIMES_FACTORS = LANES == 16;

constexpr uint8_t NONE = 0x80;  // in an index of look_up: 0

// Bytes of every lane as 16-bit numbers: byte i twice, ...
inline Ints spread_number(Ints x, int i) {
    constexpr uint8_t TWICE[16] = { 0, NONE, 0, NONE, 4, NONE, 4, NONE, 8, NONE, 8, NONE, 12, NONE, 12, NONE };
    return look_up(x, add_8(table_of_16(TWICE), bytes(i)));
}

// ... and bytes 2i and 2i + 1.
inline Ints two_numbers(Ints x, int i) {
    constexpr uint8_t BOTH[16] = { 0, NONE, 1, NONE, 4, NONE, 5, NONE, 8, NONE, 9, NONE, 12, NONE, 13, NONE };
    return look_up(x, add_8(table_of_16(BOTH), bytes(2 * i)));
}

// Byte i of every lane, a signed one, in both of its 16-bit numbers.
inline Ints signed_number(Ints x, int i) {
    return right_signed_16(spread_byte(x, i), 8);
}

// Byte i of every lane as a factor of total_times, ...
inline Ints factor_of(Ints x, int i) {
    return SUMS_OF_16_BITS ? spread_number(x, i) : right_32(x, 8 * i) & ints(0xff);
}

// ... and a signed one.
inline Ints signed_factor_of(Ints x, int i) {
    return SUMS_OF_16_BITS ? signed_number(x, i) : right_signed_32(left_32(x, 24 - 8 * i), 24);
}

// Factors of 16 weights times the offset of the quants, 1 << BITS, as minima, if integer sums do not start with it.
template <int BITS, typename To> inline void give_offsets(To & to, int b, Ints first, Ints second) {
    if constexpr (!has_starts(Scheme::q8_K_16)) {
        to.minima(b, left_16(join_halves(first, second), BITS));
    }
}

// Factors of 16 weights, which are signed bytes, and their offsets. scales: those of two blocks in each vector.
template <int BITS, typename To> inline void give_signed_factors(To & to, const Ints (&scales)[4]) {
#pragma GCC                                  unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        const Ints first  = signed_factor_of(scales[b / 2], 2 * (b % 2));
        const Ints second = signed_factor_of(scales[b / 2], 2 * (b % 2) + 1);
        to.factors(2 * b, first);
        to.factors(2 * b + 1, second);
        give_offsets<BITS>(to, b, first, second);
    }
}

// Q2_K. Each half of 128 values: 32 bytes, pair of bits q for values 32q .. 32q + 31; before both, 16 bytes with scales
// in their low nibbles and minima in their high ones.

#if QUANT_GEMM_AVX512

// Block b of Q2_K, two bits per value: quants times their 4-bit scales are at most 45 and are given as one byte.
// x: 32 bytes of each row, whose pairs of bits b % 4 are the block; scales: bytes i and i + 1 are those of the block.
template <typename To> inline void give_q2_K(To & to, int b, const Ints (&x)[8], Ints scales, int i) {
    const Ints first  = spread_number(scales, i);
    const Ints second = spread_number(scales, i + 1);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        const Ints codes = right_16(x[j], 2 * (b % 4)) & bytes(3);
        to.codes(b, j, _mm512_mullo_epi16(codes, j < 4 ? first : second));
    }
}

// Q2_K of 8 interleaved rows; for each block of 32, two bytes of scales and minima of every row.
struct Q2_KGroups {
    static constexpr Scheme SCHEME = Scheme::q8_K_256_mins;
    static constexpr int    OFFSET = 0;
    static constexpr Codes  CODES  = Codes::bytes;

    template <typename To> static inline void unpack(const Groups & groups, int64_t block, int, To & to) {
        const size_t at = block / N_BLOCKS * sizeof(block_q2_Kx8);
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {
            Ints x[8];
            groups.quants32(at + offsetof(block_q2_Kx8, qs) + 256 * part, x);
#pragma GCC unroll 4
            for (int b = 4 * part; b < 4 * part + 4; b++) {
                const Ints scales = groups.load_pair(at + offsetof(block_q2_Kx8, scales) + 16 * b);
                give_q2_K(to, b, x, low_nibbles(scales), 0);
                to.minima(b, two_numbers(high_nibbles(scales), 0));
            }
        }
        to.super_scales(groups.load_half(at + offsetof(block_q2_Kx8, d)));
        to.minimum_scales(groups.load_half(at + offsetof(block_q2_Kx8, dmin)));
    }
};

#else

// Every second block is given times four, so that there is one shift for two blocks.
template <typename To> inline void give_q2_K(To & to, int b, const Ints (&x)[8], Ints scales, int i) {
    to.factors(2 * b, factor_of(scales, i));
    to.factors(2 * b + 1, factor_of(scales, i + 1));
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        const Ints two_pairs = b % 4 < 2 ? x[j] : right_16(x[j], 4);
        if (b % 2 == 0) {
            to.codes(b, j, two_pairs & bytes(3));
        } else {
            to.codes_times_4(b, j, two_pairs & bytes(12));
        }
    }
}

#endif

// The minima of Q2_K, and the scales of super blocks. scales: 16 bytes of scales and minima of each row.
template <typename R, typename To>
inline void give_minima_and_scales_q2_K(const R & rows, size_t at, const Ints (&scales)[4], To & to) {
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        to.minima(b, two_numbers(high_nibbles(scales[b / 2]), b % 2));
    }
    const Ints d = rows.load_word(at + offsetof(block_q2_K, GGML_COMMON_AGGR_U));
    to.super_scales(lower_half(d));
    to.minimum_scales(upper_half(d));
}

struct Q2_K {
    static constexpr Scheme SCHEME = QUANTS_TIMES_FACTORS ? Scheme::q8_K_256_mins : Scheme::q8_K_16_mins;
    static constexpr int    OFFSET = 0;
    static constexpr Codes  CODES  = QUANTS_TIMES_FACTORS ? Codes::bytes : Codes::below_8;

    template <typename R, typename To> static inline void unpack(const R & rows, int64_t block, int, To & to) {
        const size_t at = block / N_BLOCKS * sizeof(block_q2_K);
        Ints         scales[4];
        rows.load16(at + offsetof(block_q2_K, scales), scales);
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {
            Ints x[8];
            rows.quants32(at + offsetof(block_q2_K, qs) + 32 * part, x);
#pragma GCC unroll 4
            for (int b = 4 * part; b < 4 * part + 4; b++) {
                give_q2_K(to, b, x, low_nibbles(scales[b / 2]), 2 * (b % 2));
            }
        }
        give_minima_and_scales_q2_K(rows, at, scales, to);
    }
};

// Scales of Q3_K: 16 numbers of six bits, offset 32, in 12 bytes:
//   bytes 0 .. 3:  the lower four bits of numbers 0 .. 3 (low nibbles) and 8 .. 11 (high nibbles)
//   bytes 4 .. 7:  the lower four bits of numbers 4 .. 7 (low nibbles) and 12 .. 15 (high nibbles)
//   bytes 8 .. 11: the upper two bits; bits 2i and 2i + 1 of byte 8 + j are those of number 4i + j
inline void load_scales_q3_K(const Rows & rows, size_t at, Ints (&scales)[4]) {
    Ints x[4];
    rows.load16(at + offsetof(block_q3_K, scales) - 4, x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Ints low = i < 2 ? low_nibbles(x[1 + i]) : high_nibbles(x[i - 1]);
        const Ints up  = right_16(x[3], 2 * i) & bytes(3);
        scales[i]      = sub_8(low | left_16(up, 4), bytes(32));
    }
}

#if QUANT_GEMM_AVX512

// Half `half` of block b of Q3_K: values times scales, -4 .. 3 times -32 .. 31, plus an offset of 124: 0 .. 252. Two
// neighbours are multiplied as one number of 16 bits. With both offsets added, neither byte carries. values: plus 4.
template <typename To>
inline void give_q3_K(To & to, int b, int half, const Ints (&values)[4], const Ints (&scales)[4]) {
    const Ints scale = signed_number(scales[b / 2], 2 * (b % 2) + half);
    const Ints rest  = _mm512_sub_epi16(_mm512_set1_epi16(0x7c7c), _mm512_mullo_epi16(bytes(4), scale));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        to.codes(b, 4 * half + j, _mm512_add_epi16(_mm512_mullo_epi16(values[j], scale), rest));
    }
}

#else

template <typename To> inline void give_q3_K(To & to, int b, int half, const Ints (&values)[4], const Ints (&)[4]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        to.codes(b, 4 * half + j, values[j]);
    }
}

#endif

// Two bits of a value are stored as in Q2_K, the third in bit b of 32 bytes, b the block. Of four blocks, the third bits
// of the first and the third block, and of the second and the fourth one, are looked up at once: a nibble for each.
struct Q3_K {
    static constexpr Scheme SCHEME = QUANTS_TIMES_FACTORS ? Scheme::q8_K_256 : Scheme::q8_K_16;
    static constexpr int    OFFSET = QUANTS_TIMES_FACTORS ? 124 : 4;
    static constexpr Codes  CODES  = QUANTS_TIMES_FACTORS ? Codes::bytes : Codes::below_8;

    // For each nibble, bits 0 and 2 (1 and 3) as bits 2 and 6.
    static constexpr uint8_t BITS_0_2[16] = { 0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68 };
    static constexpr uint8_t BITS_1_3[16] = { 0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68 };

    template <typename R, typename To> static inline void unpack(const R & rows, int64_t block, int, To & to) {
        const size_t at = block / N_BLOCKS * sizeof(block_q3_K);
        Ints         scales[4];
        load_scales_q3_K(rows, at, scales);
        if constexpr (!QUANTS_TIMES_FACTORS) {
            give_signed_factors<2>(to, scales);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            Ints third[4];
            rows.quants16(at + offsetof(block_q3_K, hmask) + 16 * half, third);
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
                Ints two[4], nibbles[2][4];
                rows.quants16(at + offsetof(block_q3_K, qs) + 32 * part + 16 * half, two);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const Ints bits = part == 0 ? low_nibbles(third[j]) : high_nibbles(third[j]);
                    nibbles[0][j]   = (two[j] & bytes(0x33)) | look_up(table_of_16(BITS_0_2), bits);
                    nibbles[1][j]   = (right_16(two[j], 2) & bytes(0x33)) | look_up(table_of_16(BITS_1_3), bits);
                }
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    Ints values[4];
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        values[j] = i < 2 ? low_nibbles(nibbles[i][j]) : high_nibbles(nibbles[i - 2][j]);
                    }
                    give_q3_K(to, 4 * part + i, half, values, scales);
                }
            }
        }
        to.super_scales(rows.load_half(at + offsetof(block_q3_K, d)));
    }
};

// Scales and minima of Q4_K and Q5_K, from d, dmin and 12 bytes of 6-bit numbers at the start of the block.
template <typename To> inline void give_scales_and_minima(const Rows & rows, size_t at, To & to) {
    Ints x[4];
    rows.load16(at, x);
    const Ints lower6 = bytes(0x3f);
    const Ints upper2 = bytes(0x30);
    const Ints m_low  = x[2] & lower6;
    const Ints s_low  = x[1] & lower6;
    const Ints s_high = low_nibbles(x[3]) | (right_16(x[1], 2) & upper2);
    const Ints m_high = high_nibbles(x[3]) | (right_16(x[2], 2) & upper2);
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        to.factors(b, factor_of(b < 4 ? s_low : s_high, b % 4));
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < N_BLOCKS / 2; pair++) {
        to.minima(pair, two_numbers(pair < 2 ? m_low : m_high, pair % 2));
    }
    to.super_scales(lower_half(x[0]));
    to.minimum_scales(upper_half(x[0]));
}

// Blocks 2i and 2i + 1 of Q4_K: one in the low nibbles, one in the high ones.
template <typename To> inline void give_two_blocks(To & to, int i, const Ints (&x)[8]) {
#pragma GCC                        unroll 8
    for (int j = 0; j < 8; j++) {
        to.codes(2 * i, j, low_nibbles(x[j]));
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        to.codes(2 * i + 1, j, high_nibbles(x[j]));
    }
}

struct Q4_K {
    static constexpr Scheme SCHEME = Scheme::q8_K_mins;
    static constexpr int    OFFSET = 0;
    static constexpr Codes  CODES  = Codes::below_16;

    template <typename R, typename To> static inline void unpack(const R & rows, int64_t block, int, To & to) {
        const size_t at = block / N_BLOCKS * sizeof(block_q4_K);
        give_scales_and_minima(rows, at, to);
        for (int i = 0; i < N_BLOCKS / 2; i++) {
            Ints x[8];
            rows.quants32(at + offsetof(block_q4_K, qs) + 32 * i, x);
            give_two_blocks(to, i, x);
        }
    }
};

struct Q5_K {
    static constexpr Scheme SCHEME = Scheme::q8_K_mins;
    static constexpr int    OFFSET = 0;
    static constexpr Codes  CODES  = Codes::below_32;

    template <typename R, typename To> static inline void unpack(const R & rows, int64_t block, int, To & to) {
        const size_t at = block / N_BLOCKS * sizeof(block_q5_K);
        give_scales_and_minima(rows, at, to);
        Ints fifth[8];
        rows.quants32(at + offsetof(block_q5_K, qh), fifth);
        for (int i = 0; i < N_BLOCKS / 2; i++) {
            Ints x[8];
            rows.quants32(at + offsetof(block_q5_K, qs) + 32 * i, x);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                to.codes(2 * i, j, low_nibbles(x[j]) | where_set(fifth[j], bytes(1 << (2 * i)), bytes(16)));
            }
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                to.codes(2 * i + 1, j, high_nibbles(x[j]) | where_set(fifth[j], bytes(2 << (2 * i)), bytes(16)));
            }
        }
    }
};

// Each half of 128 values: 64 bytes of lower nibbles (low halves: values 0..63, high ones: 64..127), and 32 bytes of
// upper pairs of bits, pair q for values 32q .. 32q + 31.
struct Q6_K {
    static constexpr Scheme SCHEME = Scheme::q8_K_16;
    static constexpr int    OFFSET = 32;
    static constexpr Codes  CODES  = Codes::below_64;

    template <typename R, typename To> static inline void unpack(const R & rows, int64_t block, int, To & to) {
        const size_t at = block / N_BLOCKS * sizeof(block_q6_K);
        Ints         scales[4];
        rows.load16(at + offsetof(block_q6_K, scales), scales);
        give_signed_factors<5>(to, scales);
        for (int part = 0; part < 2; part++) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                Ints upper[4];
                rows.quants16(at + offsetof(block_q6_K, qh) + 32 * part + 16 * half, upper);
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    Ints x[4];
                    rows.quants16(at + offsetof(block_q6_K, ql) + 64 * part + 32 * i + 16 * half, x);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        const Ints up = left_16(upper[j], 4 - 2 * i);
                        to.codes(4 * part + i, 4 * half + j, low_nibbles(x[j]) | (up & bytes(0x30)));
                    }
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        const Ints up = i == 0 ? upper[j] : right_16(upper[j], 2);
                        to.codes(4 * part + i + 2, 4 * half + j, high_nibbles(x[j]) | (up & bytes(0x30)));
                    }
                }
            }
        }
        to.super_scales(rows.load_half(at + offsetof(block_q6_K, d)));
    }
};

// Factors of IQ4_XS: numbers of six bits, offset 32. low: their lower four bits; high: their upper two, in the upper half of
// each lane.
#if QUANT_GEMM_NEON

// The numbers are joined in bytes, below two bits of others, which left shifts remove. Flipped upper bits become signs.
template <typename To> inline void give_factors_iq4_xs(To & to, Ints low, Ints high) {
    constexpr uint8_t TWICE[16] = { 2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15 };
    const Ints        upper     = look_up(high, table_of_16(TWICE)) ^ bytes(0xaa);
    const Ints        even      = join_low_nibbles(low, shifted_bytes(upper, 0, -4));
    const Ints        odd       = join_high_nibbles(low, shifted_bytes(upper, 2, -2));
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        to.factors(b, right_signed_32(left_32(b % 2 == 0 ? even : odd, 26 - b / 2 * 8), 26));
    }
}

#else

template <typename To> inline void give_factors_iq4_xs(To & to, Ints low, Ints high) {
    high = right_32(high, 16);
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        const Ints low4   = right_32(low, 4 * b) & ints(15);
        const Ints up2    = right_32(high, 2 * b) & ints(3);
        const Ints factor = sub_32(low4 | left_32(up2, 4), ints(32));
        to.factors(b, SUMS_OF_16_BITS ? signed_number(factor, 0) : factor);
    }
}

#endif

struct IQ4_XS {
    static constexpr Scheme SCHEME = Scheme::q8_K;
    static constexpr int    OFFSET = OFFSET_OF_BYTES;
    static constexpr Codes  CODES  = Codes::bytes;

    template <typename R, typename To> static inline void unpack(const R & rows, int64_t block, int, To & to) {
        const size_t at = block / N_BLOCKS * sizeof(block_iq4_xs);
        // d and scales_h, scales_l
#if QUANT_GEMM_NEON
        const Ints head[2] = { rows.load_word(at), rows.load_word(at + 4) };
#else
        Ints head[4];
        rows.load16(at, head);
#endif
        give_factors_iq4_xs(to, head[1], head[0]);
#pragma GCC unroll 8
        for (int b = 0; b < N_BLOCKS; b++) {
            Ints x[4];
            rows.quants16(at + offsetof(block_iq4_xs, qs) + 16 * b, x);
            give_nibbles<iq4_values>(to, b, x);
        }
        to.super_scales(lower_half(head[0]));
    }
};

#endif

}  // namespace quant_gemm
