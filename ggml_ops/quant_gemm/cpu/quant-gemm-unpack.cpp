// Unpacking: stored weights of 32 rows and up to 256 values of K become a panel (quant-gemm-panel.h).
//
// Each function serves one type in one layout. All work on 16 rows at once, one row in each 32-bit lane: a 16-byte
// piece of 16 rows is transposed into four vectors, and the type's bit fields are taken apart in the lanes.

#define GGML_COMMON_IMPL_CPP
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "repack.h"

#include <algorithm>

namespace quant_gemm {

#if QUANT_GEMM_VNNI

// ---- 16 rows in 16 lanes

static inline void store(void * to, __m512i x) {
    _mm512_store_si512(to, x);
}

// The addresses of 16 rows, the last one repeated beyond the end.
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

    // the F16 numbers at an offset
    inline __m512 load_half(size_t offset) const {
        alignas(32) uint16_t x[16];
        for (int i = 0; i < 16; i++) {
            memcpy(&x[i], row[i] + offset, sizeof(x[i]));
        }
        return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *) x));
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

// The addresses of two groups of 8 interleaved rows. A group of n rows takes n strides.
struct Groups2 {
    const char * group[2];

    Groups2(const char * weights, size_t stride, int64_t first, int64_t n_rows) {
        for (int i = 0; i < 2; i++) {
            group[i] = weights + std::min(first + 8 * i, n_rows - 8) * stride;
        }
    }

    // x[0], x[1]: the first and the second four of the 8 bytes that lie side by side for each row
    inline void load8(size_t offset, __m512i * x) const {
        const __m512i a    = _mm512_loadu_si512(group[0] + offset);
        const __m512i b    = _mm512_loadu_si512(group[1] + offset);
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd  = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        x[0]               = _mm512_permutex2var_epi32(a, even, b);
        x[1]               = _mm512_permutex2var_epi32(a, odd, b);
    }

    // 8 F16 numbers of each group
    inline __m512 load_half(size_t offset) const {
        const __m128i a = _mm_loadu_si128((const __m128i *) (group[0] + offset));
        const __m128i b = _mm_loadu_si128((const __m128i *) (group[1] + offset));
        return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1));
    }
};

// ---- types of 32 values with one scale

// Nibbles of a block: bytes 0..15 hold values 0..15 in their low halves and 16..31 in their high ones.
template <typename Decode>
static inline void store_nibbles(Panel & panel, int b, int half, const __m512i (&x)[4], Decode decode) {
#pragma GCC        unroll 4
    for (int j = 0; j < 4; j++) {
        store(panel.codes[b][j][16 * half], decode(low_nibbles(x[j])));
        store(panel.codes[b][j + 4][16 * half], decode(high_nibbles(x[j])));
    }
}

static inline __m512i as_is(__m512i x) {
    return x;
}

static inline __m512i flip_bit_3(__m512i x) {  // two's complement nibbles to offset 8
    return _mm512_xor_si512(x, bytes(8));
}

template <typename Block, __m512i (*DECODE)(__m512i)>
static void unpack_nibble_rows(
    const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int n_blocks, Panel & panel) {
    for (int half = 0; half < 2; half++) {
        const Rows16 rows(weights + block * sizeof(Block), stride, row + 16 * half, n_rows);
        for (int b = 0; b < n_blocks; b++) {
            __m512i x[4];
            rows.load16(b * sizeof(Block) + offsetof(Block, qs), x);
            store_nibbles(panel, b, half, x, DECODE);
            _mm512_store_ps(panel.scales[b] + 16 * half, rows.load_half(b * sizeof(Block) + offsetof(Block, d)));
        }
    }
}

template <typename Block, __m512i (*DECODE)(__m512i)>
static void unpack_nibble_groups(
    const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int n_blocks, Panel & panel) {
    for (int half = 0; half < 2; half++) {
        const Groups2 groups(weights, stride, row + 16 * half, n_rows);
        for (int b = 0; b < n_blocks; b++) {
            const size_t at = (block + b) * sizeof(Block);
            __m512i      x[4];
            groups.load8(at + offsetof(Block, qs), x);
            groups.load8(at + offsetof(Block, qs) + 64, x + 2);
            store_nibbles(panel, b, half, x, DECODE);
            _mm512_store_ps(panel.scales[b] + 16 * half, groups.load_half(at + offsetof(Block, d)));
        }
    }
}

static void unpack_q8_0(
    const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int n_blocks, Panel & panel) {
    for (int half = 0; half < 2; half++) {
        const Rows16 rows(weights + block * sizeof(block_q8_0), stride, row + 16 * half, n_rows);
        for (int b = 0; b < n_blocks; b++) {
            const size_t at = b * sizeof(block_q8_0);
            __m512i      x[8];
            rows.load16(at + offsetof(block_q8_0, qs), x);
            rows.load16(at + offsetof(block_q8_0, qs) + 16, x + 4);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                store(panel.codes[b][j][16 * half], _mm512_xor_si512(x[j], bytes(0x80)));
            }
            _mm512_store_ps(panel.scales[b] + 16 * half, rows.load_half(at + offsetof(block_q8_0, d)));
        }
    }
}

static void unpack_q5_0(
    const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int n_blocks, Panel & panel) {
    const __m512i spread = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    for (int half = 0; half < 2; half++) {
        const Rows16 rows(weights + block * sizeof(block_q5_0), stride, row + 16 * half, n_rows);
        for (int b = 0; b < n_blocks; b++) {
            const size_t at = b * sizeof(block_q5_0);
            __m512i      x[4];
            rows.load16(at + offsetof(block_q5_0, qs), x);
            const __m512i fifth = rows.load_word(at + offsetof(block_q5_0, qh));  // bit i belongs to value i
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                const __m512i   low  = j < 4 ? low_nibbles(x[j]) : high_nibbles(x[j - 4]);
                const __m512i   copy = _mm512_shuffle_epi8(fifth, _mm512_add_epi8(spread, bytes(j / 2)));
                const __m512i   bits = _mm512_set1_epi32(j % 2 == 0 ? 0x08040201 : (int) 0x80402010);
                const __mmask64 set  = _mm512_test_epi8_mask(copy, bits);
                store(panel.codes[b][j][16 * half], _mm512_mask_add_epi8(low, set, low, bytes(16)));
            }
            _mm512_store_ps(panel.scales[b] + 16 * half, rows.load_half(at + offsetof(block_q5_0, d)));
        }
    }
}

// ---- types of 256 values

static inline __m512 lower_half(__m512i x) {  // the F16 number in the lower half of each lane
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
}

static inline __m512 upper_half(__m512i x) {
    return lower_half(_mm512_srli_epi32(x, 16));
}

// Scales and minima of Q4_K and Q5_K: d, dmin and 12 bytes of 6-bit numbers stand in front.
static inline void unpack_scales_and_minima(const Rows16 & rows, size_t at, int half, Panel & panel) {
    __m512i x[4];
    rows.load16(at, x);
    const __m512i lower6 = bytes(0x3f);
    const __m512i upper2 = bytes(0x30);
    const __m512i m_low  = _mm512_and_si512(x[2], lower6);
    const __m512i s_low  = _mm512_and_si512(x[1], lower6);
    const __m512i s_high = _mm512_or_si512(low_nibbles(x[3]), _mm512_and_si512(_mm512_srli_epi16(x[1], 2), upper2));
    const __m512i m_high = _mm512_or_si512(high_nibbles(x[3]), _mm512_and_si512(_mm512_srli_epi16(x[2], 2), upper2));
    const __m512  d      = lower_half(x[0]);
    const __m512i byte   = _mm512_set1_epi32(0xff);
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        const __m512i s = _mm512_and_si512(_mm512_srli_epi32(b < 4 ? s_low : s_high, 8 * (b % 4)), byte);
        _mm512_store_ps(panel.scales[b] + 16 * half, _mm512_mul_ps(d, _mm512_cvtepi32_ps(s)));
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < N_BLOCKS / 2; pair++) {
        const __m512i m   = _mm512_srli_epi32(pair < 2 ? m_low : m_high, 16 * (pair % 2));
        const __m512i one = _mm512_and_si512(m, byte);
        const __m512i two = _mm512_slli_epi32(_mm512_and_si512(m, _mm512_set1_epi32(0xff00)), 8);
        store(panel.minima[pair][16 * half], _mm512_or_si512(one, two));
    }
    _mm512_store_ps(panel.minimum_scales + 16 * half, upper_half(x[0]));
}

static void
unpack_q4_K(const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int, Panel & panel) {
    const size_t at = block / N_BLOCKS * sizeof(block_q4_K);
    for (int half = 0; half < 2; half++) {
        const Rows16 rows(weights, stride, row + 16 * half, n_rows);
        unpack_scales_and_minima(rows, at, half, panel);
        for (int i = 0; i < N_BLOCKS / 2; i++) {
            __m512i x[8];
            rows.load16(at + offsetof(block_q4_K, qs) + 32 * i, x);
            rows.load16(at + offsetof(block_q4_K, qs) + 32 * i + 16, x + 4);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                store(panel.codes[2 * i][j][16 * half], low_nibbles(x[j]));
                store(panel.codes[2 * i + 1][j][16 * half], high_nibbles(x[j]));
            }
        }
    }
}

static void
unpack_q5_K(const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int, Panel & panel) {
    const size_t at = block / N_BLOCKS * sizeof(block_q5_K);
    for (int half = 0; half < 2; half++) {
        const Rows16 rows(weights, stride, row + 16 * half, n_rows);
        unpack_scales_and_minima(rows, at, half, panel);
        __m512i fifth[8];
        rows.load16(at + offsetof(block_q5_K, qh), fifth);
        rows.load16(at + offsetof(block_q5_K, qh) + 16, fifth + 4);
        for (int i = 0; i < N_BLOCKS / 2; i++) {
            __m512i x[8];
            rows.load16(at + offsetof(block_q5_K, qs) + 32 * i, x);
            rows.load16(at + offsetof(block_q5_K, qs) + 32 * i + 16, x + 4);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                const __m512i   low  = low_nibbles(x[j]);
                const __m512i   high = high_nibbles(x[j]);
                const __mmask64 even = _mm512_test_epi8_mask(fifth[j], bytes(1 << (2 * i)));
                const __mmask64 odd  = _mm512_test_epi8_mask(fifth[j], bytes(2 << (2 * i)));
                store(panel.codes[2 * i][j][16 * half], _mm512_mask_add_epi8(low, even, low, bytes(16)));
                store(panel.codes[2 * i + 1][j][16 * half], _mm512_mask_add_epi8(high, odd, high, bytes(16)));
            }
        }
    }
}

// Each half of 128 values: 64 bytes of lower nibbles (low halves: values 0..63, high ones: 64..127), and 32 bytes of
// upper pairs of bits, pair q for values 32q .. 32q + 31.
static void
unpack_q6_K(const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int, Panel & panel) {
    const size_t at = block / N_BLOCKS * sizeof(block_q6_K);
    for (int half = 0; half < 2; half++) {
        const Rows16 rows(weights, stride, row + 16 * half, n_rows);
        for (int part = 0; part < 2; part++) {
            __m512i upper[8];
            rows.load16(at + offsetof(block_q6_K, qh) + 32 * part, upper);
            rows.load16(at + offsetof(block_q6_K, qh) + 32 * part + 16, upper + 4);
            for (int i = 0; i < 2; i++) {
                __m512i x[8];
                rows.load16(at + offsetof(block_q6_K, ql) + 64 * part + 32 * i, x);
                rows.load16(at + offsetof(block_q6_K, ql) + 64 * part + 32 * i + 16, x + 4);
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) {
                    const __m512i pair  = bytes(0x30);
                    const __m512i up    = _mm512_srli_epi16(upper[j], 2 * i);
                    const __m512i first = _mm512_and_si512(_mm512_slli_epi16(up, 4), pair);
                    const __m512i third = _mm512_and_si512(up, pair);
                    store(panel.codes[4 * part + i][j][16 * half], _mm512_or_si512(low_nibbles(x[j]), first));
                    store(panel.codes[4 * part + i + 2][j][16 * half], _mm512_or_si512(high_nibbles(x[j]), third));
                }
            }
        }
        __m512i scales[4];
        rows.load16(at + offsetof(block_q6_K, scales), scales);
        const __m512 d = rows.load_half(at + offsetof(block_q6_K, d));
#pragma GCC unroll 16
        for (int b = 0; b < SLICE / 16; b++) {
            const __m512i s = _mm512_srai_epi32(_mm512_slli_epi32(scales[b / 4], 24 - 8 * (b % 4)), 24);
            _mm512_store_ps(panel.scales[b] + 16 * half, _mm512_mul_ps(d, _mm512_cvtepi32_ps(s)));
        }
    }
}

static void
unpack_iq4_xs(const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int, Panel & panel) {
    const size_t at = block / N_BLOCKS * sizeof(block_iq4_xs);
    for (int half = 0; half < 2; half++) {
        const Rows16 rows(weights, stride, row + 16 * half, n_rows);
        __m512i      head[4];  // d and scales_h, scales_l
        rows.load16(at, head);
        const __m512  d    = lower_half(head[0]);
        const __m512i high = _mm512_srli_epi32(head[0], 16);
#pragma GCC unroll 8
        for (int b = 0; b < N_BLOCKS; b++) {
            __m512i x[4];
            rows.load16(at + offsetof(block_iq4_xs, qs) + 16 * b, x);
            store_nibbles(panel, b, half, x, iq4_values);
            const __m512i low4 = _mm512_and_si512(_mm512_srli_epi32(head[1], 4 * b), _mm512_set1_epi32(15));
            const __m512i up2  = _mm512_and_si512(_mm512_srli_epi32(high, 2 * b), _mm512_set1_epi32(3));
            const __m512i s    = _mm512_or_si512(low4, _mm512_slli_epi32(up2, 4));
            const __m512  sf   = _mm512_cvtepi32_ps(_mm512_sub_epi32(s, _mm512_set1_epi32(32)));
            _mm512_store_ps(panel.scales[b] + 16 * half, _mm512_mul_ps(d, sf));
        }
    }
}

// Q4_K of 8 rows side by side; scales and minima of block b in 12 bytes, in Q4_K's own packing but for rows, not blocks.
static void unpack_q4_K_groups(
    const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int, Panel & panel) {
    const size_t at = block / N_BLOCKS * sizeof(block_q4_Kx8);
    for (int half = 0; half < 2; half++) {
        const Groups2 groups(weights, stride, row + 16 * half, n_rows);
        for (int i = 0; i < N_BLOCKS / 2; i++) {
            __m512i x[8];
            for (int j = 0; j < 4; j++) {
                groups.load8(at + offsetof(block_q4_Kx8, qs) + 256 * i + 64 * j, x + 2 * j);
            }
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                store(panel.codes[2 * i][j][16 * half], low_nibbles(x[j]));
                store(panel.codes[2 * i + 1][j][16 * half], high_nibbles(x[j]));
            }
        }
        const __m512 d = groups.load_half(at + offsetof(block_q4_Kx8, d));
        for (int part = 0; part < 2; part++) {  // four blocks each
            const __m512i one = six_bit_numbers(groups.group[0] + at + offsetof(block_q4_Kx8, scales) + 48 * part);
            const __m512i two = six_bit_numbers(groups.group[1] + at + offsetof(block_q4_Kx8, scales) + 48 * part);
            alignas(64) uint8_t s[4][16], m[4][16];
            store(s, _mm512_unpacklo_epi64(one, two));
            store(m, _mm512_unpackhi_epi64(one, two));
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) {
                const __m512i sv = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *) s[b]));
                _mm512_store_ps(panel.scales[4 * part + b] + 16 * half, _mm512_mul_ps(d, _mm512_cvtepi32_ps(sv)));
            }
#pragma GCC unroll 2
            for (int pair = 0; pair < 2; pair++) {
                const __m512i even = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *) m[2 * pair]));
                const __m512i odd  = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *) m[2 * pair + 1]));
                store(panel.minima[2 * part + pair][16 * half], _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
        }
        _mm512_store_ps(panel.minimum_scales + 16 * half, groups.load_half(at + offsetof(block_q4_Kx8, dmin)));
    }
}

static void unpack_bf16(
    const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int n_blocks, Panel & panel) {
    for (int half = 0; half < 2; half++) {
        const Rows16 rows(weights + block * BLOCK * sizeof(ggml_bf16_t), stride, row + 16 * half, n_rows);
        for (int b = 0; b < n_blocks; b++) {
            for (int quarter = 0; quarter < 4; quarter++) {
                __m512i x[4];
                rows.load16((b * BLOCK + quarter * 8) * sizeof(ggml_bf16_t), x);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    store(panel.pairs[b][4 * quarter + j][16 * half], x[j]);
                }
            }
        }
    }
}

static const Format formats[] = {
    { GGML_TYPE_Q4_0, QUANT_GEMM_ROWS, Scheme::q8_0, 8, unpack_nibble_rows<block_q4_0, as_is>, 4 },
    { GGML_TYPE_Q4_0, QUANT_GEMM_8X8, Scheme::q8_0, 8, unpack_nibble_groups<block_q4_0x8, flip_bit_3>, 13 },
    { GGML_TYPE_Q5_0, QUANT_GEMM_ROWS, Scheme::q8_0, 16, unpack_q5_0, 4 },
    { GGML_TYPE_Q8_0, QUANT_GEMM_ROWS, Scheme::q8_0, 128, unpack_q8_0, 5 },
    { GGML_TYPE_IQ4_NL, QUANT_GEMM_ROWS, Scheme::q8_0, 128, unpack_nibble_rows<block_iq4_nl, iq4_values>, 4 },
    { GGML_TYPE_IQ4_NL, QUANT_GEMM_8X8, Scheme::q8_0, 128, unpack_nibble_groups<block_iq4_nlx8, iq4_values>, 13 },
    { GGML_TYPE_Q4_K, QUANT_GEMM_ROWS, Scheme::q8_K_mins, 0, unpack_q4_K, 5 },
    { GGML_TYPE_Q4_K, QUANT_GEMM_8X8, Scheme::q8_K_mins, 0, unpack_q4_K_groups, 5 },
    { GGML_TYPE_Q5_K, QUANT_GEMM_ROWS, Scheme::q8_K_mins, 0, unpack_q5_K, 5 },
    { GGML_TYPE_Q6_K, QUANT_GEMM_ROWS, Scheme::q8_K_16, 32, unpack_q6_K, 9 },
    { GGML_TYPE_IQ4_XS, QUANT_GEMM_ROWS, Scheme::q8_K, 128, unpack_iq4_xs, 5 },
#if defined(__AVX512BF16__)
    { GGML_TYPE_BF16, QUANT_GEMM_ROWS, Scheme::bf16, 0, unpack_bf16, 16 },
#endif
};

const Format * find_format(ggml_type type, quant_gemm_layout layout) {
    for (const Format & format : formats) {
        if (format.type == type && format.layout == layout) {
            return &format;
        }
    }
    return nullptr;
}

#else

const Format * find_format(ggml_type, quant_gemm_layout) {
    return nullptr;
}

#endif

}  // namespace quant_gemm
