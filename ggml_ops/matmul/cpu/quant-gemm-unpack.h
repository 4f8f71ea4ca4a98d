#pragma once

// Unpacking, written once for panels (quant-gemm-unpack.cpp) and dot products (quant-gemm-dot.cpp). LANES rows are
// processed at once, one row per 32-bit lane: 16 bytes of each row are transposed into four vectors, and the type's bit
// fields are extracted in the lanes.
//
// An unpack function gives what it finds to a receiver (`to`), for each block b of 32 values in turn:
//   factors(b, x)        before the quants: integer factors (per block of 32, or of 16) in the form of total_times
//   codes(b, j, x)       for j = 0 .. 7 in order: quants 4j .. 4j + 3 of every row, or of RowsApart j / 4 * 16 .. + 15 of
//                        row j % 4. Q3_K: the first halves of all blocks (j = 0 .. 3), then the second ones
//   codes_times_4(b, ...)  instead, four times these quants
//   scales(b, x)         after the quants
// and, at any time, super_scales(x), minimum_scales(x), and minima(pair, x) of two neighbouring blocks.

#define GGML_COMMON_IMPL_CPP
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "repack.h"
#include "simd-mappings.h"

#include <algorithm>

namespace quant_gemm {

#if QUANT_GEMM_KERNELS

// The addresses of LANES rows; the last one is repeated past the end.
struct Rows {
    const char * row[LANES];

    Rows(const char * weights, size_t stride, int64_t first, int64_t n_rows) {
        for (int i = 0; i < LANES; i++) {
            row[i] = weights + std::min(first + i, n_rows - 1) * stride;
        }
    }

    // x[j]: bytes offset + 4j .. + 3 of every row
    inline void load16(size_t offset, Ints * x) const {
#if QUANT_GEMM_AVX512 || QUANT_GEMM_AVX2
        Ints rows[4];  // rows i, i + 4, ... in each
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
#if QUANT_GEMM_AVX512
            __m512i v = _mm512_castsi128_si512(load(i, offset));
            v         = _mm512_inserti32x4(v, load(i + 4, offset), 1);
            v         = _mm512_inserti32x4(v, load(i + 8, offset), 2);
            rows[i]   = _mm512_inserti32x4(v, load(i + 12, offset), 3);
#else
            rows[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load(i, offset)), load(i + 4, offset), 1);
#endif
        }
        transpose(rows);
        std::copy(rows, rows + 4, x);
#else
        const auto      load = [&](int i) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t *) row[i] + offset)); };
        const int64x2_t a    = vreinterpretq_s64_s32(vtrn1q_s32(load(0), load(1)));
        const int64x2_t b    = vreinterpretq_s64_s32(vtrn2q_s32(load(0), load(1)));
        const int64x2_t c    = vreinterpretq_s64_s32(vtrn1q_s32(load(2), load(3)));
        const int64x2_t d    = vreinterpretq_s64_s32(vtrn2q_s32(load(2), load(3)));
        x[0]                 = vreinterpretq_s32_s64(vtrn1q_s64(a, c));
        x[1]                 = vreinterpretq_s32_s64(vtrn1q_s64(b, d));
        x[2]                 = vreinterpretq_s32_s64(vtrn2q_s64(a, c));
        x[3]                 = vreinterpretq_s32_s64(vtrn2q_s64(b, d));
#endif
    }

    // x[j]: bytes offset + 4j .. + 3 of every row, of 32 bytes
    inline void load32(size_t offset, Ints * x) const {
        load16(offset, x);
        load16(offset + 16, x + 4);
    }

    // the same for quants, which may have another order
    inline void quants16(size_t offset, Ints * x) const { load16(offset, x); }

    inline void quants32(size_t offset, Ints * x) const { load32(offset, x); }

    // Bits 4j .. 4j + 3 of a word of each row: the bytes of `value` for values 4j .. 4j + 3 whose bits are set.
    inline Ints bytes_where_set(Ints words, int j, Ints value) const {
        return where_set(spread_byte(words, j / 2), ints(j % 2 == 0 ? 0x08040201 : (int) 0x80402010), value);
    }

    // the F16 numbers at an offset
    inline Floats load_half(size_t offset) const {
#if QUANT_GEMM_AVX2
        return _mm256_cvtph_ps(_mm_setr_epi16(half_at(0, offset), half_at(1, offset), half_at(2, offset),
                                              half_at(3, offset), half_at(4, offset), half_at(5, offset),
                                              half_at(6, offset), half_at(7, offset)));
#elif QUANT_GEMM_NEON
        uint64_t x = 0;  // in a general register, where shifts cost no vector instruction
        for (int i = LANES - 1; i >= 0; i--) {
            x = x << 16 | (uint16_t) half_at(i, offset);
        }
        return from_halves(&x);
#else
        alignas(32) short x[LANES];
        for (int i = 0; i < LANES; i++) {
            x[i] = half_at(i, offset);
        }
        return from_halves(x);
#endif
    }

    // half of the power of two for the exponents at an offset (MXFP4, whose values are doubled)
    inline Floats load_power(size_t offset) const {
        float x[LANES];
        for (int i = 0; i < LANES; i++) {
            x[i] = GGML_CPU_E8M0_TO_FP32_HALF(row[i][offset]);
        }
        return load_floats(x);
    }

    inline Ints load_word(size_t offset) const {
        alignas(64) uint32_t x[LANES];
        for (int i = 0; i < LANES; i++) {
            memcpy(&x[i], row[i] + offset, sizeof(x[i]));
        }
        return load_ints(x);
    }

  private:
#if QUANT_GEMM_AVX512 || QUANT_GEMM_AVX2
    inline __m128i load(int i, size_t offset) const { return _mm_loadu_si128((const __m128i *) (row[i] + offset)); }
#endif

    inline short half_at(int i, size_t offset) const {
        short x;
        memcpy(&x, row[i] + offset, sizeof(x));
        return x;
    }
};

#if QUANT_GEMM_NEON

// Rows whose quants are not transposed: each vector holds 16 neighbouring ones of one row.
struct RowsApart : Rows {
    using Rows::Rows;

    // x[j]: 16 bytes of row j
    inline void quants16(size_t offset, Ints * x) const {
#pragma GCC unroll 4
        for (int i = 0; i < LANES; i++) {
            x[i] = load_ints(row[i] + offset);
        }
    }

    inline void quants32(size_t offset, Ints * x) const {
        quants16(offset, x);
        quants16(offset + 16, x + LANES);
    }

    // The bytes of `value` for values j / 4 * 16 .. + 15 of row j % 4 whose bits in the row's word are set.
    inline Ints bytes_where_set(Ints words, int j, Ints value) const {
        constexpr uint8_t FIRST[16] = { 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1 };
        const Ints        copies    = look_up(words, add_8(table_of_16(FIRST), bytes(j % 4 * 4 + j / 4 * 2)));
        return where_set(copies, from_64(0x8040201008040201), value);
    }
};

#endif

#if QUANT_GEMM_AVX512

// The addresses of two groups of 8 interleaved rows. A group of n rows is n strides long.
struct Groups {
    const char * group[2];

    Groups(const char * weights, size_t stride, int64_t first, int64_t n_rows) {
        for (int i = 0; i < 2; i++) {
            group[i] = weights + std::min(first + 8 * i, n_rows - 8) * stride;
        }
    }

    // x[j]: bytes 4j .. 4j + 3 of every row, of 16 bytes, interleaved by 8
    inline void quants16(size_t offset, Ints * x) const {
        load8(offset, x);
        load8(offset + 64, x + 2);
    }

    inline void quants32(size_t offset, Ints * x) const {
        quants16(offset, x);
        quants16(offset + 128, x + 4);
    }

    // 8 F16 numbers of each group
    inline Floats load_half(size_t offset) const { return _mm512_cvtph_ps(load_16_bytes(offset)); }

    // 2 bytes per row, in the lower halves of the lanes
    inline Ints load_pair(size_t offset) const { return _mm512_cvtepu16_epi32(load_16_bytes(offset)); }

    // 8 exponents of each group
    inline Floats load_power(size_t offset) const {
        float x[LANES];
        for (int i = 0; i < LANES; i++) {
            x[i] = GGML_CPU_E8M0_TO_FP32_HALF(group[i / 8][offset + i % 8]);
        }
        return load_floats(x);
    }

  private:
    // x[0], x[1]: the first and the second four of the 8 bytes that are contiguous for each row
    inline void load8(size_t offset, Ints * x) const {
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

#endif

// ---- types of 32 values with one scale

// Blocks with an exponent instead of an F16 scale.
template <typename Block> constexpr bool HAS_EXPONENT = IS_ONE_OF<Block, block_mxfp4, block_mxfp4x8>;

#if QUANT_GEMM_AVX512

// The scales of N neighbouring blocks, 4 or 8, as they are stored, in 16 bits each.
template <int N = N_BLOCKS, typename Block> inline __m128i scale_bits(const Block * w) {
    if constexpr (HAS_EXPONENT<Block>) {  // byte 17 * b: if b is odd, the upper byte of its 16-bit word
        static_assert(sizeof(Block) == 17 && offsetof(Block, e) == 0);
        const char *  p     = (const char *) w;
        const __m512i nth   = _mm512_castsi128_si512(_mm_setr_epi16(0, 8, 17, 25, 34, 42, 51, 59));
        const __m512i first = _mm512_loadu_si512(p);
        const __m512i last  = N == 4 ? first : _mm512_loadu_si512(p + 64);
        const __m128i both  = _mm512_castsi512_si128(_mm512_permutex2var_epi16(first, nth, last));
        return _mm_and_si128(_mm_blend_epi16(both, _mm_srli_epi16(both, 8), 0xaa), _mm_set1_epi16(0xff));
    } else if constexpr (N == 4) {  // two loads of 32 numbers of 16 bits; they read nothing after the blocks
        constexpr int  WORDS  = sizeof(Block) / 2;
        constexpr int  SECOND = std::min(4 * WORDS - 32, 32);
        constexpr auto at     = [](int b) { return b * WORDS < 32 ? b * WORDS : b * WORDS - SECOND + 32; };
        const __m512i  nth    = _mm512_castsi128_si512(_mm_setr_epi16(at(0), at(1), at(2), at(3), 0, 0, 0, 0));
        const char *   p      = (const char *) w;
        return _mm512_castsi512_si128(
            _mm512_permutex2var_epi16(_mm512_loadu_si512(p), nth, _mm512_loadu_si512(p + 2 * SECOND)));
    } else {  // the first one of WORDS numbers of 16 bits
        constexpr int WORDS  = sizeof(Block) / 2;
        constexpr int SECOND = std::min(4 * WORDS, 8 * WORDS - 64);  // reads nothing behind the blocks
        const char *  p      = (const char *) w;
        const __m512i nth    = _mm512_castsi128_si512(
            _mm_setr_epi16(0, WORDS, 2 * WORDS, 3 * WORDS, 4 * WORDS, 5 * WORDS, 6 * WORDS, 7 * WORDS));
        const __m128i first =
            _mm512_castsi512_si128(_mm512_permutex2var_epi16(_mm512_loadu_si512(p), nth, _mm512_loadu_si512(p + 64)));
        if constexpr (7 * WORDS < 64) {
            return first;
        }
        p += 2 * SECOND;
        const __m128i second = _mm512_castsi512_si128(_mm512_permutex2var_epi16(
            _mm512_loadu_si512(p), _mm512_sub_epi16(nth, _mm512_set1_epi16(SECOND)), _mm512_loadu_si512(p + 64)));
        return _mm_blend_epi16(first, second, 0xf0);
    }
}

// Scales from the lower half of each lane.
template <typename Block> inline __m512 scales_from(__m512i x) {
    if constexpr (HAS_EXPONENT<Block>) {
        return half_powers(_mm512_and_si512(x, _mm512_set1_epi32(0xff)));
    } else {
        return lower_half(x);
    }
}

// d[b]: the scales of block b, from the scale_bits of each row.
template <typename Block> inline void scales_of_slice(const __m128i (&bits)[LANES], __m512 (&d)[N_BLOCKS]) {
    __m512i pairs[N_BLOCKS / 2];
    Rows((const char *) bits, sizeof(bits[0]), 0, LANES).load16(0, pairs);
#pragma GCC unroll 4
    for (int i = 0; i < N_BLOCKS / 2; i++) {
        d[2 * i]     = scales_from<Block>(pairs[i]);
        d[2 * i + 1] = scales_from<Block>(_mm512_srli_epi32(pairs[i], 16));
    }
}

#endif

// The scales of up to 8 blocks.
template <typename Block, typename R> struct BlockScales {
    const R & rows;
    size_t    at;

    BlockScales(const R & rows, int64_t block, int /* n_blocks */) : rows(rows), at(block * sizeof(Block)) {}

    inline Floats of(int b) const {
        if constexpr (HAS_EXPONENT<Block>) {
            return rows.load_power(at + b * sizeof(Block) + offsetof(Block, e));
        } else {
            return rows.load_half(at + b * sizeof(Block) + offsetof(Block, d));
        }
    }
};

#if QUANT_GEMM_AVX512

// Row by row: collecting the scales of one block from 16 rows takes longer than its quants.
template <typename Block> struct BlockScales<Block, Rows> {
    __m512 d[N_BLOCKS];

    BlockScales(const Rows & rows, int64_t block, int n_blocks) {
        alignas(64) __m128i bits[LANES];
        Block               last[N_BLOCKS] = {};
        for (int r = 0; r < LANES; r++) {
            const Block * w = (const Block *) rows.row[r] + block;
            if (n_blocks < N_BLOCKS) {
                memcpy(last, w, n_blocks * sizeof(Block));
                w = last;
            }
            bits[r] = scale_bits(w);
        }
        scales_of_slice<Block>(bits, d);
    }

    inline Floats of(int b) const { return d[b]; }
};

#endif

inline Ints as_is(Ints x) {
    return x;
}

inline Ints flip_bit_3(Ints x) {  // two's complement nibbles to offset 8
    return x ^ bytes(8);
}

// Nibbles of a block: bytes 0..15 hold values 0..15 in their low nibbles and 16..31 in their high ones.
template <Ints (*DECODE)(Ints), typename To> inline void give_nibbles(To & to, int b, const Ints (&x)[4]) {
#pragma GCC                                              unroll 4
    for (int j = 0; j < 4; j++) {
        to.codes(b, j, DECODE(low_nibbles(x[j])));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        to.codes(b, j + 4, DECODE(high_nibbles(x[j])));
    }
}

// With AVX-512, reads a slice of rows with its scales, 8 blocks of an F16 number and N words, 16 rows at once, and calls
// word(b, j, x) and to.scales. Otherwise, and for other blocks, layouts and rests of rows, it does nothing and returns false.
// Reading scales apart takes longer: 64 bytes are loaded for them two or four times per row, and most of these loads cross a
// cache line. Two blocks are 2 N + 1 words: the first scale with half a word, N - 1 words shifted by half of one, half a word
// with the second scale, N words. Not in the order that receivers may expect: quants 0, 4, 1, 5, ... (Q8_0: in order), and the
// scales of every second block before its quants. So only panels, which store what they are given, may receive this.
template <typename Block, typename R, typename To, typename F>
inline bool read_with_scales([[maybe_unused]] const R & rows,
                             [[maybe_unused]] int64_t   block,
                             [[maybe_unused]] int       n_blocks,
                             [[maybe_unused]] To &      to,
                             [[maybe_unused]] const F & word) {
#if QUANT_GEMM_AVX512
    if constexpr (std::is_same_v<R, Rows> && !HAS_EXPONENT<Block>) {
        if (n_blocks < N_BLOCKS) {
            return false;
        }
        constexpr int N     = (sizeof(Block) - sizeof(ggml_half)) / 4;
        constexpr int TWO   = 2 * N + 1;
        Ints          first = ints(0), last = first;
#pragma GCC unroll 17
        for (int i = 0; i < TWO; i++) {
            Ints x[4];
            rows.load16(block * sizeof(Block) + 16 * i, x);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const int b    = (4 * i + j) / TWO * 2;
                const int part = (4 * i + j) % TWO;
                if (part == 0) {
                    first = x[j];
                } else if (part <= N) {
                    word(b, part - 1, _mm512_rol_epi32(join_halves(x[j], last), 16));
                } else {
                    word(b + 1, part - N - 1, x[j]);
                }
                if (part == N) {
                    const Ints scales = halves_apart(join_halves(first, x[j]));
                    to.scales(b, _mm512_cvtph_ps(_mm512_castsi512_si256(scales)));
                    to.scales(b + 1, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(scales, 1)));
                }
                last = x[j];
            }
        }
        return true;
    }
#endif
    return false;
}

// A type of weights in a layout: how its activations are quantized, what is added to its quants, what these can be, and
// `unpack`, which unpacks blocks `block` to `block + n_blocks - 1`.

// Nibbles with a scale, which is an F16 number, for MXFP4 an exponent.
template <typename Block, Ints (*DECODE)(Ints), int OFFSET_, Codes CODES_> struct Nibbles {
    static constexpr Scheme SCHEME = Scheme::q8_0;
    static constexpr int    OFFSET = OFFSET_;
    static constexpr Codes  CODES  = CODES_;

    template <typename R, typename To> static inline void unpack(const R & rows, int64_t block, int n_blocks, To & to) {
        const auto word = [&](int b, int j, Ints x) {
            to.codes(b, j, DECODE(low_nibbles(x)));
            to.codes(b, j + 4, DECODE(high_nibbles(x)));
        };
        if (read_with_scales<Block>(rows, block, n_blocks, to, word)) {
            return;
        }
        const BlockScales<Block, R> scales(rows, block, n_blocks);
        for (int b = 0; b < n_blocks; b++) {
            Ints x[4];
            rows.quants16((block + b) * sizeof(Block) + offsetof(Block, qs), x);
            give_nibbles<DECODE>(to, b, x);
            to.scales(b, scales.of(b));
        }
    }
};

constexpr int OFFSET_OF_BYTES = SIGNED_BYTES ? 0 : 128;

using Q4_0   = Nibbles<block_q4_0, as_is, 8, Codes::below_16>;
using IQ4_NL = Nibbles<block_iq4_nl, iq4_values, OFFSET_OF_BYTES, Codes::bytes>;
using MXFP4  = Nibbles<block_mxfp4, mxfp4_values, 12, Codes::below_32>;

#if QUANT_GEMM_AVX512
using Q4_0Groups   = Nibbles<block_q4_0x8, flip_bit_3, 8, Codes::below_16>;
using IQ4_NLGroups = Nibbles<block_iq4_nlx8, iq4_values, OFFSET_OF_BYTES, Codes::bytes>;
using MXFP4Groups  = Nibbles<block_mxfp4x8, mxfp4_values, 12, Codes::below_32>;
#endif

struct Q8_0 {
    static constexpr Scheme SCHEME = Scheme::q8_0;
    static constexpr int    OFFSET = OFFSET_OF_BYTES;
    static constexpr Codes  CODES  = Codes::bytes;

    template <typename R, typename To> static inline void unpack(const R & rows, int64_t block, int n_blocks, To & to) {
        const auto word = [&](int b, int j, Ints x) { to.codes(b, j, x ^ bytes(0x80)); };
        if (read_with_scales<block_q8_0>(rows, block, n_blocks, to, word)) {
            return;
        }
        const BlockScales<block_q8_0, R> scales(rows, block, n_blocks);
        for (int b = 0; b < n_blocks; b++) {
            Ints x[8];
            rows.quants32((block + b) * sizeof(block_q8_0) + offsetof(block_q8_0, qs), x);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                to.codes(b, j, SIGNED_BYTES ? x[j] : x[j] ^ bytes(0x80));
            }
            to.scales(b, scales.of(b));
        }
    }
};

// With NEON, quants are signed: minus 16 where the fifth bit is not set. Joining takes one instruction then.
struct Q5_0 {
    static constexpr Scheme SCHEME = Scheme::q8_0;
    static constexpr int    OFFSET = QUANT_GEMM_NEON ? 0 : 16;
    static constexpr Codes  CODES  = Codes::below_32;

    template <typename R, typename To> static inline void unpack(const R & rows, int64_t block, int n_blocks, To & to) {
        Ints       first_word = ints(0);  // of a block: the fifth bits
        const auto word       = [&](int b, int i, Ints x) {
            if (i == 0) {
                first_word = x;
                return;
            }
            to.codes(b, i - 1, low_nibbles(x) | rows.bytes_where_set(first_word, i - 1, bytes(16)));
            to.codes(b, i + 3, high_nibbles(x) | rows.bytes_where_set(first_word, i + 3, bytes(16)));
        };
        if (read_with_scales<block_q5_0>(rows, block, n_blocks, to, word)) {
            return;
        }
        const BlockScales<block_q5_0, R> scales(rows, block, n_blocks);
        for (int b = 0; b < n_blocks; b++) {
            const size_t at = (block + b) * sizeof(block_q5_0);
            Ints         x[4];
            rows.quants16(at + offsetof(block_q5_0, qs), x);
            const Ints fifth = rows.load_word(at + offsetof(block_q5_0, qh));  // bit i belongs to value i
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
#if QUANT_GEMM_NEON
                const Ints upper = rows.bytes_where_set(~fifth, j, bytes(-1));
                to.codes(b, j, j < 4 ? join_low_nibbles(x[j % 4], upper) : join_high_nibbles(x[j % 4], upper));
#else
                const Ints low = j < 4 ? low_nibbles(x[j % 4]) : high_nibbles(x[j % 4]);
                to.codes(b, j, low | rows.bytes_where_set(fifth, j, bytes(16)));
#endif
            }
            to.scales(b, scales.of(b));
        }
    }
};

#endif

}  // namespace quant_gemm
