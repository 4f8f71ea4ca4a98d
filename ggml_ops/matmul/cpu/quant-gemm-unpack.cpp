// Unpacking: stored weights of 32 rows and up to 256 values of K become a panel (quant-gemm-panel.h). One function for each
// type and layout: here types of 32 values and plain numbers, in quant-gemm-unpack-k.cpp those of 256; and the table of all.

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

// Scales of a block: F16 numbers, for MXFP4 exponents.
template <typename Block, typename Addresses> static inline __m512 load_scales(const Addresses & addresses, size_t at) {
    if constexpr (std::is_same_v<Block, block_mxfp4> || std::is_same_v<Block, block_mxfp4x8>) {
        return addresses.load_power(at + offsetof(Block, e));
    } else {
        return addresses.load_half(at + offsetof(Block, d));
    }
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
            _mm512_store_ps(panel.scales[b] + 16 * half, load_scales<Block>(rows, b * sizeof(Block)));
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
            _mm512_store_ps(panel.scales[b] + 16 * half, load_scales<Block>(groups, at));
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

// ---- plain numbers

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

static void unpack_f16(
    const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int n_blocks, Panel & panel) {
    alignas(64) static const uint16_t apart[32] = { 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31 };
    for (int half = 0; half < 2; half++) {
        const Rows16 rows(weights + block * BLOCK * sizeof(ggml_fp16_t), stride, row + 16 * half, n_rows);
        for (int k = 0; k < n_blocks * BLOCK; k += 8) {
            __m512i x[4];
            rows.load16(k * sizeof(ggml_fp16_t), x);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                store(panel.halves[k / 2 + j][half], _mm512_permutexvar_epi16(_mm512_load_si512(apart), x[j]));
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
    { GGML_TYPE_MXFP4, QUANT_GEMM_ROWS, Scheme::q8_0, 12, unpack_nibble_rows<block_mxfp4, mxfp4_values>, 4 },
    { GGML_TYPE_MXFP4, QUANT_GEMM_8X8, Scheme::q8_0, 12, unpack_nibble_groups<block_mxfp4x8, mxfp4_values>, 13 },
    { GGML_TYPE_Q2_K, QUANT_GEMM_ROWS, Scheme::q8_K_256_mins, 0, unpack_q2_K, 4 },
    { GGML_TYPE_Q2_K, QUANT_GEMM_8X8, Scheme::q8_K_256_mins, 0, unpack_q2_K_groups, 5 },
    { GGML_TYPE_Q3_K, QUANT_GEMM_ROWS, Scheme::q8_K_256, 124, unpack_q3_K, 5 },
    { GGML_TYPE_Q4_K, QUANT_GEMM_ROWS, Scheme::q8_K_mins, 0, unpack_q4_K, 5 },
    { GGML_TYPE_Q4_K, QUANT_GEMM_8X8, Scheme::q8_K_mins, 0, unpack_q4_K_groups, 5 },
    { GGML_TYPE_Q5_K, QUANT_GEMM_ROWS, Scheme::q8_K_mins, 0, unpack_q5_K, 5 },
    { GGML_TYPE_Q6_K, QUANT_GEMM_ROWS, Scheme::q8_K_16, 32, unpack_q6_K, 17 },
    { GGML_TYPE_IQ4_XS, QUANT_GEMM_ROWS, Scheme::q8_K, 128, unpack_iq4_xs, 5 },
    { GGML_TYPE_F16, QUANT_GEMM_ROWS, Scheme::f16, 0, unpack_f16, 20 },
#if defined(__AVX512BF16__)
    { GGML_TYPE_BF16, QUANT_GEMM_ROWS, Scheme::bf16, 0, unpack_bf16, 33 },
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
