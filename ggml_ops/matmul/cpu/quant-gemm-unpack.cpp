// Unpacking: stored weights of 32 rows and up to 256 values of K become a panel (quant-gemm-panel.h). One function per
// type and layout: types of 32 values and plain numbers here, those of 256 in quant-gemm-unpack-k.cpp; and the table.

#include "quant-gemm-unpack.h"

namespace quant_gemm {

#if QUANT_GEMM_VNNI

// ---- types of 32 values with one scale

static inline __m512i as_is(__m512i x) {
    return x;
}

static inline __m512i flip_bit_3(__m512i x) {  // two's complement nibbles to offset 8
    return _mm512_xor_si512(x, bytes(8));
}

// Nibbles; the scale is an F16 number, for MXFP4 an exponent.
template <typename Rows, typename Block, __m512i (*DECODE)(__m512i)>
static void unpack_nibbles(const Rows & rows, int64_t block, int n_blocks, const HalfPanel & to) {
    for (int b = 0; b < n_blocks; b++) {
        const size_t at = (block + b) * sizeof(Block);
        __m512i      x[4];
        rows.load16(at + offsetof(Block, qs), x);
        store_nibbles(to, b, x, DECODE);
        if constexpr (std::is_same_v<Block, block_mxfp4> || std::is_same_v<Block, block_mxfp4x8>) {
            to.scales(b, rows.load_power(at + offsetof(Block, e)));
        } else {
            to.scales(b, rows.load_half(at + offsetof(Block, d)));
        }
    }
}

static void unpack_q8_0(const Rows16 & rows, int64_t block, int n_blocks, const HalfPanel & to) {
    for (int b = 0; b < n_blocks; b++) {
        const size_t at = (block + b) * sizeof(block_q8_0);
        __m512i      x[8];
        rows.load32(at + offsetof(block_q8_0, qs), x);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            to.codes(b, j, _mm512_xor_si512(x[j], bytes(0x80)));
        }
        to.scales(b, rows.load_half(at + offsetof(block_q8_0, d)));
    }
}

static void unpack_q5_0(const Rows16 & rows, int64_t block, int n_blocks, const HalfPanel & to) {
    const __m512i spread = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    for (int b = 0; b < n_blocks; b++) {
        const size_t at = (block + b) * sizeof(block_q5_0);
        __m512i      x[4];
        rows.load16(at + offsetof(block_q5_0, qs), x);
        const __m512i fifth = rows.load_word(at + offsetof(block_q5_0, qh));  // bit i belongs to value i
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const __m512i   low  = j < 4 ? low_nibbles(x[j]) : high_nibbles(x[j - 4]);
            const __m512i   copy = _mm512_shuffle_epi8(fifth, _mm512_add_epi8(spread, bytes(j / 2)));
            const __m512i   bits = _mm512_set1_epi32(j % 2 == 0 ? 0x08040201 : (int) 0x80402010);
            const __mmask64 set  = _mm512_test_epi8_mask(copy, bits);
            to.codes(b, j, _mm512_mask_add_epi8(low, set, low, bytes(16)));
        }
        to.scales(b, rows.load_half(at + offsetof(block_q5_0, d)));
    }
}

// ---- plain numbers

static void unpack_bf16(const Rows16 & rows, int64_t block, int n_blocks, const HalfPanel & to) {
    for (int b = 0; b < n_blocks; b++) {
        for (int quarter = 0; quarter < 4; quarter++) {
            __m512i x[4];
            rows.load16(((block + b) * BLOCK + quarter * 8) * sizeof(ggml_bf16_t), x);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                _mm512_store_si512(to.panel.pairs[b][4 * quarter + j][to.first], x[j]);
            }
        }
    }
}

static void unpack_f16(const Rows16 & rows, int64_t block, int n_blocks, const HalfPanel & to) {
    alignas(64) static const uint16_t apart[32] = { 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31 };
    for (int k = 0; k < n_blocks * BLOCK; k += 8) {
        __m512i x[4];
        rows.load16((block * BLOCK + k) * sizeof(ggml_fp16_t), x);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            _mm512_store_si512(to.panel.halves[k / 2 + j][to.first / 16],
                               _mm512_permutexvar_epi16(_mm512_load_si512(apart), x[j]));
        }
    }
}

// ---- the table

template <typename Rows, UnpackHalf<Rows> * UNPACK>
static void
unpack(const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int n_blocks, Panel & panel) {
    for (int first = 0; first < PANEL_ROWS; first += 16) {
        UNPACK(Rows(weights, stride, row + first, n_rows), block, n_blocks, { panel, first });
    }
}

template <UnpackHalf<Rows16> * UNPACK> static constexpr Unpack  ROWS   = unpack<Rows16, UNPACK>;
template <UnpackHalf<Groups2> * UNPACK> static constexpr Unpack GROUPS = unpack<Groups2, UNPACK>;

template <typename Block, __m512i (*DECODE)(__m512i)>
static constexpr Unpack NIBBLE_ROWS = ROWS<unpack_nibbles<Rows16, Block, DECODE>>;

template <typename Block, __m512i (*DECODE)(__m512i)>
static constexpr Unpack NIBBLE_GROUPS = GROUPS<unpack_nibbles<Groups2, Block, DECODE>>;

static const Format formats[] = {
    { GGML_TYPE_Q4_0, QUANT_GEMM_ROWS, Scheme::q8_0, 8, NIBBLE_ROWS<block_q4_0, as_is>, 4 },
    { GGML_TYPE_Q4_0, QUANT_GEMM_8X8, Scheme::q8_0, 8, NIBBLE_GROUPS<block_q4_0x8, flip_bit_3>, 13 },
    { GGML_TYPE_Q5_0, QUANT_GEMM_ROWS, Scheme::q8_0, 16, ROWS<unpack_q5_0>, 4 },
    { GGML_TYPE_Q8_0, QUANT_GEMM_ROWS, Scheme::q8_0, 128, ROWS<unpack_q8_0>, 9 },
    { GGML_TYPE_IQ4_NL, QUANT_GEMM_ROWS, Scheme::q8_0, 128, NIBBLE_ROWS<block_iq4_nl, iq4_values>, 4 },
    { GGML_TYPE_IQ4_NL, QUANT_GEMM_8X8, Scheme::q8_0, 128, NIBBLE_GROUPS<block_iq4_nlx8, iq4_values>, 13 },
    { GGML_TYPE_MXFP4, QUANT_GEMM_ROWS, Scheme::q8_0, 12, NIBBLE_ROWS<block_mxfp4, mxfp4_values>, 4 },
    { GGML_TYPE_MXFP4, QUANT_GEMM_8X8, Scheme::q8_0, 12, NIBBLE_GROUPS<block_mxfp4x8, mxfp4_values>, 13 },
    { GGML_TYPE_Q2_K, QUANT_GEMM_ROWS, Scheme::q8_K_256_mins, 0, ROWS<unpack_q2_K>, 4 },
    { GGML_TYPE_Q2_K, QUANT_GEMM_8X8, Scheme::q8_K_256_mins, 0, GROUPS<unpack_q2_K_groups>, 5 },
    { GGML_TYPE_Q3_K, QUANT_GEMM_ROWS, Scheme::q8_K_256, 124, ROWS<unpack_q3_K>, 5 },
    { GGML_TYPE_Q4_K, QUANT_GEMM_ROWS, Scheme::q8_K_mins, 0, ROWS<unpack_q4_K>, 5 },
    { GGML_TYPE_Q4_K, QUANT_GEMM_8X8, Scheme::q8_K_mins, 0, GROUPS<unpack_q4_K_groups>, 9 },
    { GGML_TYPE_Q5_K, QUANT_GEMM_ROWS, Scheme::q8_K_mins, 0, ROWS<unpack_q5_K>, 5 },
    { GGML_TYPE_Q6_K, QUANT_GEMM_ROWS, Scheme::q8_K_16, 32, ROWS<unpack_q6_K>, 17 },
    { GGML_TYPE_IQ4_XS, QUANT_GEMM_ROWS, Scheme::q8_K, 128, ROWS<unpack_iq4_xs>, 5 },
    { GGML_TYPE_F16, QUANT_GEMM_ROWS, Scheme::f16, 0, ROWS<unpack_f16>, 20 },
#if defined(__AVX512BF16__)
    { GGML_TYPE_BF16, QUANT_GEMM_ROWS, Scheme::bf16, 0, ROWS<unpack_bf16>, 33 },
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
