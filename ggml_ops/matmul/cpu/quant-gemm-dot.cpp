// Few columns: the rows of a matrix are multiplied one by one in their layout, so that they stream from memory.
//
// A row's quants are unpacked into registers once for all columns. Products are summed as exact integers, by four;
// each sum is multiplied with the scale of its weights and added in float32, in the order of k.

#define GGML_COMMON_IMPL_CPP
#define GGML_COMMON_DECL_CPP
#include "quant-gemm-dot.h"
#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "quant-gemm-super-block.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstring>

namespace quant_gemm {

#if QUANT_GEMM_VNNI

template <int N_C> static inline void store_sums(const __m512 (&total)[N_C], float * sums) {
#pragma GCC                           unroll 4
    for (int c = 0; c < N_C; c++) {
        sums[c * PANEL_ROWS] = _mm512_reduce_add_ps(total[c]);
    }
}

// ---- types of 256 values

template <typename Block> static inline __m512i offset_sums(const ActSuperBlock & a) {
    if constexpr (BY_16<Block>) {
        return HAS_MINIMA<Block> ? _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *) a.sums_16))
                                 : _mm512_loadu_si512(a.starts);
    } else {
        return _mm512_zextsi256_si512(HAS_MINIMA<Block>
                                          ? _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *) a.sums))
                                          : _mm256_loadu_si256((const __m256i *) a.starts));
    }
}

// A row times N_C columns.
template <typename Block, int N_C>
static void dot_super_blocks(const char * row, int64_t k, const char * const * columns, float * sums) {
    constexpr int PER_VECTOR = BY_16<Block> ? 4 : 2;  // scales per 64 weights, each for some of 16 lanes
    const __m512i lane       = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i which      = _mm512_srli_epi32(lane, BY_16<Block> ? 2 : 3);
    const Block * w          = (const Block *) row;
    __m512        total[N_C] = {};
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
            const __m512          off = _mm512_cvtepi32_ps(offset_sums<Block>(a));
            __m512                sum = HAS_MINIMA<Block> ? _mm512_fnmadd_ps(off, s.offsets, _mm512_setzero_ps())
                                                          : _mm512_mul_ps(off, s.offsets);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const __m512i x = _mm512_loadu_si512(a.codes + 64 * j);
                const __m512i z = _mm512_dpbusd_epi32(_mm512_setzero_si512(), s.codes[j], x);
                sum             = _mm512_fmadd_ps(_mm512_cvtepi32_ps(z), scales[j], sum);
            }
            total[c] = _mm512_fmadd_ps(sum, _mm512_set1_ps(a.scale), total[c]);
        }
    }
    store_sums(total, sums);
}

// ---- types of 32 values with one scale

// Quants of two blocks in the order of k, as unsigned bytes.
static inline __m512i codes_of(const block_q8_0 * w) {
    const __m256i first  = _mm256_loadu_si256((const __m256i *) w[0].qs);
    const __m256i second = _mm256_loadu_si256((const __m256i *) w[1].qs);
    return _mm512_xor_si512(halves(first, second), bytes(0x80));
}

static inline __m512i codes_of(const block_q4_0 * w) {
    return nibbles_of(w[0].qs, w[1].qs);
}

static inline __m512i codes_of(const block_q5_0 * w) {
    uint32_t fifth[2];  // bit i belongs to value i
    memcpy(&fifth[0], w[0].qh, sizeof(fifth[0]));
    memcpy(&fifth[1], w[1].qh, sizeof(fifth[1]));
    const __m512i low = nibbles_of(w[0].qs, w[1].qs);
    return _mm512_mask_add_epi8(low, (uint64_t) fifth[1] << 32 | fifth[0], low, bytes(16));
}

static inline __m512i codes_of(const block_iq4_nl * w) {
    return iq4_values(nibbles_of(w[0].qs, w[1].qs));
}

static inline __m512i codes_of(const block_mxfp4 * w) {
    return mxfp4_values(nibbles_of(w[0].qs, w[1].qs));
}

// Scales of 8 blocks.
template <typename Block> static inline __m256 scales_of(const Block * w) {
    ggml_half d[N_BLOCKS];
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        d[b] = w[b].d;
    }
    return _mm256_cvtph_ps(_mm_setr_epi16(d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]));
}

static inline __m256 scales_of(const block_mxfp4 * w) {
    uint8_t e[N_BLOCKS];
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        e[b] = w[b].e;
    }
    const __m256i all = _mm256_setr_epi32(e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]);
    return _mm512_castps512_ps256(half_powers(_mm512_castsi256_si512(all)));
}

// Adds 8 blocks of a row times N_C columns. A vector holds two blocks, 8 lanes each.
template <typename Block, int N_C>
static inline void add_blocks(const Block * w, int64_t i, const char * const * columns, __m512 (&total)[N_C]) {
    const __m512i which = _mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 3);
    const __mmask16 first_lanes = 0x0101;
    const __m256    d           = scales_of(w);
    __m512i         codes[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        codes[j] = codes_of(w + 2 * j);
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        const ActBlocks & a      = ((const ActBlocks *) columns[c])[i];
        const __m512      scales = _mm512_castps256_ps512(_mm256_mul_ps(d, _mm256_loadu_ps(a.scales)));
        const __m512i     starts = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) a.starts));
        __m512            sum    = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m512i blocks = _mm512_add_epi32(which, _mm512_set1_epi32(2 * j));
            const __m512i start  = _mm512_maskz_permutexvar_epi32(first_lanes, blocks, starts);
            const __m512i z      = _mm512_dpbusd_epi32(start, codes[j], _mm512_loadu_si512(a.codes[2 * j]));
            sum                  = _mm512_fmadd_ps(_mm512_cvtepi32_ps(z), _mm512_permutexvar_ps(blocks, scales), sum);
        }
        total[c] = _mm512_add_ps(total[c], sum);
    }
}

// A row times N_C columns. Blocks missing from the last 8 are zeros on both sides.
template <typename Block, int N_C>
static void dot_blocks(const char * row, int64_t k, const char * const * columns, float * sums) {
    const Block * w          = (const Block *) row;
    const int     rest       = k / BLOCK % N_BLOCKS;
    __m512        total[N_C] = {};
    for (int64_t i = 0; i < k / SLICE; i++, w += N_BLOCKS) {
        prefetch_behind(w, N_BLOCKS * sizeof(Block));
        add_blocks<Block, N_C>(w, i, columns, total);
    }
    if (rest != 0) {
        prefetch_behind(w, rest * sizeof(Block));
        Block last[N_BLOCKS] = {};
        memcpy(last, w, rest * sizeof(Block));
        add_blocks<Block, N_C>(last, k / SLICE, columns, total);
    }
    store_sums(total, sums);
}

// ---- BF16

#if defined(__AVX512BF16__)

static inline __m512bh pairs_of(const void * p) {
    return (__m512bh) _mm512_loadu_si512(p);
}

// Two vectors of 32 values at once; the instruction sums pairs. K is a multiple of 32.
template <int N_C> static void dot_bf16(const char * row, int64_t k, const char * const * columns, float * sums) {
    __m512        even[N_C] = {};
    __m512        odd[N_C]  = {};
    const int64_t size      = k * (int64_t) sizeof(ggml_bf16_t);
    int64_t       at        = 0;
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
        even[c] = _mm512_add_ps(even[c], odd[c]);
    }
    store_sums(even, sums);
}

#endif

// ---- selection

template <typename Block, int N_C> static constexpr DotColumns row_dot() {
    if constexpr (IS_ONE_OF<Block, block_q2_K, block_q3_K, block_q4_K, block_q5_K, block_q6_K, block_iq4_xs>) {
        return dot_super_blocks<Block, N_C>;
    } else {
        return dot_blocks<Block, N_C>;
    }
}

template <typename Block>
static constexpr Dot ROW = { 1,
                             { row_dot<Block, 1>(), row_dot<Block, 2>(), row_dot<Block, 3>(), row_dot<Block, 4>() } };

static const TypedDot DOTS[] = {
    { GGML_TYPE_Q4_0, ROW<block_q4_0> },
    { GGML_TYPE_Q5_0, ROW<block_q5_0> },
    { GGML_TYPE_Q8_0, ROW<block_q8_0> },
    { GGML_TYPE_IQ4_NL, ROW<block_iq4_nl> },
    { GGML_TYPE_MXFP4, ROW<block_mxfp4> },
    { GGML_TYPE_Q2_K, ROW<block_q2_K> },
    { GGML_TYPE_Q3_K, ROW<block_q3_K> },
    { GGML_TYPE_Q4_K, ROW<block_q4_K> },
    { GGML_TYPE_Q5_K, ROW<block_q5_K> },
    { GGML_TYPE_Q6_K, ROW<block_q6_K> },
    { GGML_TYPE_IQ4_XS, ROW<block_iq4_xs> },
#if defined(__AVX512BF16__)
    { GGML_TYPE_BF16, { 1, { dot_bf16<1>, dot_bf16<2>, dot_bf16<3>, dot_bf16<4> } } },
#endif
};

const Dot * find_dot(const Format & format) {
    return format.layout == QUANT_GEMM_8X8 ? find_dot_of_groups(format.type) : find_dot(DOTS, format.type);
}

#else

const Dot * find_dot(const Format &) {
    return nullptr;
}

#endif

void dot_rows(
    const Dot & dot, const char * weights, size_t stride, int64_t n_rows, int64_t k, Columns columns, float * sums) {
    // weights are read from memory once; columns that do not all fit in L1 are processed in groups, with rows from L2
    const int turn = columns.n > 2 * DOT_COLUMNS ? DOT_COLUMNS : columns.n;
    for (int first = 0; first < columns.n; first += turn) {
        const int end = std::min(first + turn, columns.n);
        for (int64_t r = 0; r < n_rows; r += dot.rows) {
            for (int c = first; c < end; c += DOT_COLUMNS) {
                const int together = std::min(end - c, DOT_COLUMNS);
                dot.multiply[together - 1](weights + r * stride, k, columns.at + c, sums + c * PANEL_ROWS + r);
            }
        }
    }
}

}  // namespace quant_gemm
