// Few columns: the rows of a matrix are multiplied one after another as they lie, so that they stream from memory.
//
// A row's codes are unpacked into registers once for all its columns. Products are added up as exact integers, by four;
// each such sum is scaled by its weights' scale and added in float32, in the order of k.

#define GGML_COMMON_IMPL_CPP
#define GGML_COMMON_DECL_CPP
#include "quant-gemm-dot.h"
#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "quant-gemm-dot-scaled.h"
#include "simd-mappings.h"

#include <cstring>
#include <type_traits>

namespace quant_gemm {

#if QUANT_GEMM_VNNI

// ---- types of 256 values

// 256 weights: their codes in the order of k as unsigned bytes, and one scale for each 16 or 32 of them. Offsets are
// what a sum of activation codes (see offset_sums) is multiplied with: the scales again, or minima.
struct SuperBlock {
    __m512i codes[4];
    __m512  scales;
    __m512  offsets;
};

template <typename Block> static constexpr int  WEIGHTS_PER_SCALE             = 32;
template <> constexpr int                       WEIGHTS_PER_SCALE<block_q6_K> = 16;
template <typename Block> static constexpr bool HAS_MINIMA                    = false;
template <> constexpr bool                      HAS_MINIMA<block_q4_K>        = true;
template <> constexpr bool                      HAS_MINIMA<block_q5_K>        = true;

// Each half of 128 values: 64 bytes of lower nibbles (low halves: values 0..63, high ones: 64..127), and 32 bytes of
// upper pairs of bits, pair q for values 32q .. 32q + 31.
static inline SuperBlock load(const block_q6_K & w) {
    const __m512i six      = bytes(0x3f);
    const __m512i to_left  = halves(_mm256_set1_epi16(4), _mm256_set1_epi16(2));
    const __m512i to_right = halves(_mm256_setzero_si256(), _mm256_set1_epi16(2));
    const int     choose   = 0xca;  // bits 0..3 from the nibble, others from the pair
    SuperBlock    s;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m512i low     = _mm512_loadu_si512(w.ql + 64 * half);
        const __m512i high    = _mm512_srli_epi16(low, 4);
        const __m512i upper   = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) (w.qh + 32 * half)));
        const __m512i first   = _mm512_sllv_epi16(upper, to_left);
        const __m512i second  = _mm512_srlv_epi16(upper, to_right);
        s.codes[2 * half]     = _mm512_and_si512(_mm512_ternarylogic_epi32(bytes(0x0f), low, first, choose), six);
        s.codes[2 * half + 1] = _mm512_and_si512(_mm512_ternarylogic_epi32(bytes(0x0f), high, second, choose), six);
    }
    const __m512i scales = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) w.scales));
    s.scales             = _mm512_mul_ps(_mm512_cvtepi32_ps(scales), _mm512_set1_ps(_cvtsh_ss(w.d)));
    s.offsets            = s.scales;
    return s;
}

// Q4_K and Q5_K: nibbles (32 bytes hold two blocks of 32), and 8 scales and 8 minima of six bits in 12 bytes: the first
// four of each in the low six bits of words 0 and 1; of the others, the low four bits in word 2 and two more above the
// former.
template <typename Block> static inline SuperBlock load_with_minima(const Block & w) {
    SuperBlock s;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m512i x       = _mm512_loadu_si512(w.qs + 64 * half);
        const __m512i low     = low_nibbles(x);
        const __m512i high    = high_nibbles(x);
        s.codes[2 * half]     = _mm512_shuffle_i64x2(low, high, 0x44);
        s.codes[2 * half + 1] = _mm512_shuffle_i64x2(low, high, 0xee);
    }
    uint32_t word[3];
    memcpy(word, w.scales, sizeof(word));
    const uint64_t six    = 0x3f3f3f3f;
    const uint64_t four   = 0x0f0f0f0f;
    const uint64_t two    = 0x30303030;
    const uint64_t scales = (word[0] & six) | ((word[2] & four) | (word[0] >> 2 & two)) << 32;
    const uint64_t minima = (word[1] & six) | ((word[2] >> 4 & four) | (word[1] >> 2 & two)) << 32;
    const __m512i  both   = _mm512_cvtepu8_epi32(_mm_set_epi64x((int64_t) minima, (int64_t) scales));
    uint16_t       d[2];  // of the scales, of the minima
    memcpy(d, &w, sizeof(d));
    const __m512 factors = _mm512_insertf32x8(_mm512_set1_ps(_cvtsh_ss(d[0])), _mm256_set1_ps(-_cvtsh_ss(d[1])), 1);
    const __m512 scaled  = _mm512_mul_ps(_mm512_cvtepi32_ps(both), factors);
    s.scales             = scaled;
    s.offsets            = _mm512_zextps256_ps512(_mm512_extractf32x8_ps(scaled, 1));
    return s;
}

static inline SuperBlock load(const block_q4_K & w) {
    return load_with_minima(w);
}

static inline SuperBlock load(const block_q5_K & w) {
    SuperBlock    s     = load_with_minima(w);
    const __m512i fifth = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) w.qh));  // bit b: block b
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i   bits = halves(_mm256_set1_epi8((char) (1 << 2 * j)), _mm256_set1_epi8((char) (2 << 2 * j)));
        const __mmask64 set  = _mm512_test_epi8_mask(fifth, bits);
        s.codes[j]           = _mm512_mask_add_epi8(s.codes[j], set, s.codes[j], bytes(16));
    }
    return s;
}

// 16 bytes hold a block: values 0..15 in the low nibbles, 16..31 in the high ones.
static inline SuperBlock load(const block_iq4_xs & w) {
    SuperBlock    s;
    const __m512i first  = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m512i x       = _mm512_loadu_si512(w.qs + 64 * half);
        const __m512i low     = iq4_values(low_nibbles(x));
        const __m512i high    = iq4_values(high_nibbles(x));
        s.codes[2 * half]     = _mm512_permutex2var_epi64(low, first, high);
        s.codes[2 * half + 1] = _mm512_permutex2var_epi64(low, second, high);
    }
    int32_t low4;
    memcpy(&low4, w.scales_l, sizeof(low4));
    const __m256i by_4 = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i by_2 = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    const __m256i low  = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(low4), by_4), _mm256_set1_epi32(15));
    const __m256i up   = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(w.scales_h), by_2), _mm256_set1_epi32(3));
    const __m256i six  = _mm256_or_si256(low, _mm256_slli_epi32(up, 4));
    const __m256  scales = _mm256_cvtepi32_ps(_mm256_sub_epi32(six, _mm256_set1_epi32(32)));
    s.scales             = _mm512_zextps256_ps512(_mm256_mul_ps(scales, _mm256_set1_ps(_cvtsh_ss(w.d))));
    s.offsets            = s.scales;
    return s;
}

// Sums of activation codes that the offsets belong to, 0 beyond.
template <typename Block> static inline __m512i offset_sums(const ActSuperBlock & a) {
    if (HAS_MINIMA<Block>) {
        return _mm512_zextsi256_si512(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *) a.sums)));
    }
    return WEIGHTS_PER_SCALE<Block> == 16 ? _mm512_loadu_si512(a.starts)
                                          : _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *) a.starts));
}

// A row times N_C columns.
template <typename Block, int N_C>
static void dot_super_blocks(const char * row, int64_t k, const char * const * columns, float * sums) {
    constexpr int PER_VECTOR = 64 / WEIGHTS_PER_SCALE<Block>;  // scales of 64 weights, each for some of 16 lanes
    const __m512i lane       = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i which      = _mm512_srli_epi32(lane, PER_VECTOR == 4 ? 2 : 3);
    const Block * w          = (const Block *) row;
    __m512        total[N_C];
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        total[c] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < k / SLICE; i++) {
        prefetch_behind(w + i, sizeof(Block));
        const SuperBlock s = load(w[i]);
        __m512           scales[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            scales[j] = _mm512_permutexvar_ps(_mm512_add_epi32(which, _mm512_set1_epi32(PER_VECTOR * j)), s.scales);
        }
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const ActSuperBlock & a   = ((const ActSuperBlock *) columns[c])[i];
            __m512                sum = _mm512_mul_ps(_mm512_cvtepi32_ps(offset_sums<Block>(a)), s.offsets);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const __m512i x = _mm512_loadu_si512(a.codes + 64 * j);
                const __m512i z = _mm512_dpbusd_epi32(_mm512_setzero_si512(), s.codes[j], x);
                sum             = _mm512_fmadd_ps(_mm512_cvtepi32_ps(z), scales[j], sum);
            }
            total[c] = _mm512_fmadd_ps(sum, _mm512_set1_ps(a.scale), total[c]);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        sums[c * PANEL_ROWS] = _mm512_reduce_add_ps(total[c]);
    }
}

// ---- types of 32 values with one scale: their codes in the order of k as unsigned bytes

static inline __m256i codes_of(const block_q8_0 & w) {
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) w.qs), _mm256_set1_epi8((char) 0x80));
}

static inline __m256i nibbles(const uint8_t * p) {
    const __m128i x = _mm_loadu_si128((const __m128i *) p);
    return _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_srli_epi16(x, 4), 1),
                            _mm256_set1_epi8(0x0f));
}

static inline __m256i codes_of(const block_q4_0 & w) {
    return nibbles(w.qs);
}

static inline __m256i codes_of(const block_q5_0 & w) {
    uint32_t fifth;  // bit i belongs to value i
    memcpy(&fifth, w.qh, sizeof(fifth));
    const __m256i low = nibbles(w.qs);
    return _mm256_mask_add_epi8(low, (__mmask32) fifth, low, _mm256_set1_epi8(16));
}

static inline __m256i codes_of(const block_iq4_nl & w) {
    return _mm512_castsi512_si256(iq4_values(_mm512_castsi256_si512(nibbles(w.qs))));
}

static inline __m256i codes_of(const block_mxfp4 & w) {
    return _mm512_castsi512_si256(mxfp4_values(_mm512_castsi256_si512(nibbles(w.qs))));
}

template <typename Block> static inline __m256 scale_of(const Block & w) {
    return _mm256_cvtph_ps(_mm_set1_epi16((short) w.d));
}

static inline __m256 scale_of(const block_mxfp4 & w) {
    return _mm256_set1_ps(GGML_CPU_E8M0_TO_FP32_HALF(w.e));
}

// Adds block i of the row times N_C columns.
template <typename Block, int N_C>
static inline void add_block(const Block * w, int64_t i, const char * const * columns, __m256 (&sums)[N_C]) {
    prefetch_behind(w + i, sizeof(Block));
    const __m256i codes = codes_of(w[i]);
    const __m256  d     = scale_of(w[i]);
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        const ActBlock & a     = ((const ActBlock *) columns[c])[i];
        const __m256i    start = _mm256_zextsi128_si256(_mm_cvtsi32_si128(a.start));
        const __m256i    x     = _mm256_loadu_si256((const __m256i *) a.codes);
        const __m256     z     = _mm256_cvtepi32_ps(_mm256_dpbusd_epi32(start, codes, x));
        sums[c]                = _mm256_fmadd_ps(z, _mm256_mul_ps(d, _mm256_set1_ps(a.scale)), sums[c]);
    }
}

template <typename Block, int N_C>
static void dot_blocks(const char * row, int64_t k, const char * const * columns, float * sums) {
    const Block * w = (const Block *) row;
    __m256        even[N_C], odd[N_C];
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        even[c] = _mm256_setzero_ps();
        odd[c]  = _mm256_setzero_ps();
    }
    int64_t i = 0;
    for (; i + 1 < k / BLOCK; i += 2) {
        add_block<Block, N_C>(w, i, columns, even);
        add_block<Block, N_C>(w, i + 1, columns, odd);
    }
    if (i < k / BLOCK) {
        add_block<Block, N_C>(w, i, columns, even);
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        const __m256 sum     = _mm256_add_ps(even[c], odd[c]);
        sums[c * PANEL_ROWS] = _mm512_reduce_add_ps(_mm512_zextps256_ps512(sum));
    }
}

// ---- BF16

#if defined(__AVX512BF16__)

static inline __m512bh pairs_of(const void * p) {
    return (__m512bh) _mm512_loadu_si512(p);
}

// Two vectors of 32 values at once; their sums, in pairs, are the instruction's own. K is a multiple of 32.
template <int N_C> static void dot_bf16(const char * row, int64_t k, const char * const * columns, float * sums) {
    __m512 even[N_C], odd[N_C];
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        even[c] = _mm512_setzero_ps();
        odd[c]  = _mm512_setzero_ps();
    }
    const int64_t size = k * (int64_t) sizeof(ggml_bf16_t);
    int64_t       at   = 0;
    for (; at + 128 <= size; at += 128) {
        prefetch_behind(row + at, 128);
        const __m512bh first  = pairs_of(row + at);
        const __m512bh second = pairs_of(row + at + 64);
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            even[c] = _mm512_dpbf16_ps(even[c], first, pairs_of(columns[c] + at));
            odd[c]  = _mm512_dpbf16_ps(odd[c], second, pairs_of(columns[c] + at + 64));
        }
    }
    if (at < size) {
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            even[c] = _mm512_dpbf16_ps(even[c], pairs_of(row + at), pairs_of(columns[c] + at));
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        sums[c * PANEL_ROWS] = _mm512_reduce_add_ps(_mm512_add_ps(even[c], odd[c]));
    }
}

static constexpr Dot BF16 = { 1, { dot_bf16<1>, dot_bf16<2>, dot_bf16<3>, dot_bf16<4> } };

#endif

// ---- the choice

template <typename Block, int N_C> static constexpr DotColumns row_dot() {
    if constexpr (std::is_same_v<Block, block_q2_K> || std::is_same_v<Block, block_q3_K>) {
        return dot_scaled_blocks<Block, N_C>;
    } else if constexpr (sizeof(Block) > sizeof(block_q8_0)) {
        return dot_super_blocks<Block, N_C>;
    } else {
        return dot_blocks<Block, N_C>;
    }
}

template <typename Block>
static constexpr Dot ROW = { 1,
                             { row_dot<Block, 1>(), row_dot<Block, 2>(), row_dot<Block, 3>(), row_dot<Block, 4>() } };

static const Dot * find_dot_of_rows(ggml_type type) {
    switch (type) {
    case GGML_TYPE_Q4_0:
        return &ROW<block_q4_0>;
    case GGML_TYPE_Q5_0:
        return &ROW<block_q5_0>;
    case GGML_TYPE_Q8_0:
        return &ROW<block_q8_0>;
    case GGML_TYPE_IQ4_NL:
        return &ROW<block_iq4_nl>;
    case GGML_TYPE_MXFP4:
        return &ROW<block_mxfp4>;
    case GGML_TYPE_Q2_K:
        return &ROW<block_q2_K>;
    case GGML_TYPE_Q3_K:
        return &ROW<block_q3_K>;
    case GGML_TYPE_Q4_K:
        return &ROW<block_q4_K>;
    case GGML_TYPE_Q5_K:
        return &ROW<block_q5_K>;
    case GGML_TYPE_Q6_K:
        return &ROW<block_q6_K>;
    case GGML_TYPE_IQ4_XS:
        return &ROW<block_iq4_xs>;
#if defined(__AVX512BF16__)
    case GGML_TYPE_BF16:
        return &BF16;
#endif
    default:
        return nullptr;
    }
}

const Dot * find_dot(const Format & format) {
    return format.layout == QUANT_GEMM_8X8 ? find_dot_of_groups(format.type) : find_dot_of_rows(format.type);
}

#else

const Dot * find_dot(const Format &) {
    return nullptr;
}

#endif

void dot_rows(const Dot &          dot,
              const char *         weights,
              size_t               stride,
              int64_t              n_rows,
              int64_t              k,
              const char * const * columns,
              int                  n,
              float *              sums) {
    // weights come from memory once; more columns than stay in L1 beside them take turns over rows that are in L2 by then
    const int turn = n > 2 * DOT_COLUMNS ? DOT_COLUMNS : n;
    for (int first = 0; first < n; first += turn) {
        const int end = first + turn < n ? first + turn : n;
        for (int64_t r = 0; r < n_rows; r += dot.rows) {
            for (int c = first; c < end; c += DOT_COLUMNS) {
                const int together = end - c < DOT_COLUMNS ? end - c : DOT_COLUMNS;
                dot.multiply[together - 1](weights + r * stride, k, columns + c, sums + c * PANEL_ROWS + r);
            }
        }
    }
}

}  // namespace quant_gemm
