// Few columns: the rows of a matrix are multiplied one by one in their layout, so that they stream from memory.
//
// A row's quants are unpacked into registers once for all columns. A vector holds neighbouring values of one row, so
// its products are summed as exact integers. The integer sums of 16 rows are then transposed, and the float operations
// are those of a tile, with a row in each lane.

#define GGML_COMMON_IMPL_CPP
#define GGML_COMMON_DECL_CPP
#include "quant-gemm-dot.h"
#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "quant-gemm-super-block.h"
#include "quant-gemm-unpack.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstring>

namespace quant_gemm {

#if QUANT_GEMM_VNNI

static constexpr int DOT_ROWS   = 16;
static constexpr int MAX_SLICES = 16;  // integer sums of so many slices of K are kept, so that they stay in L1

// ---- types of 256 values

template <typename Block> static inline __m512i offset_sums(const ActSuperBlock & a) {
    if constexpr (BY_16<Block>) {
        return SUBTRACTS<Block> ? _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *) a.sums_16))
                                : _mm512_loadu_si512(a.starts);
    } else {
        return _mm512_zextsi256_si512(SUBTRACTS<Block>
                                          ? _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *) a.sums))
                                          : _mm256_loadu_si256((const __m256i *) a.starts));
    }
}

static inline __m128i add_quarters(__m512i x) {
    const __m256i y = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}

// Integer sums of a super block times a column: of products in four lanes, or, if the type has minima, of products and
// of minima, each in two lanes, alternating.
template <typename Block>
static inline __m128i sum_super_block(const SuperBlock & w, const __m512i (&factors)[4], const ActSuperBlock & a) {
    const __m512i offsets  = _mm512_mullo_epi32(offset_sums<Block>(a), w.offsets);
    __m512i       products = _mm512_setzero_si512();
    if constexpr (!HAS_MINIMA<Block>) {
        products = SUBTRACTS<Block> ? _mm512_sub_epi32(products, offsets) : offsets;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i z = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.codes[j], _mm512_loadu_si512(a.codes + 64 * j));
        products        = _mm512_add_epi32(products, _mm512_mullo_epi32(z, factors[j]));
    }
    if constexpr (HAS_MINIMA<Block>) {
        products = _mm512_add_epi32(_mm512_unpacklo_epi32(products, offsets), _mm512_unpackhi_epi32(products, offsets));
    }
    return add_quarters(products);
}

// The scale of a super block of 16 rows, and that of the minima.
template <typename Block> static inline void scales_of(const Rows16 & rows, size_t at, __m512 & d, __m512 & dmin) {
    if constexpr (HAS_MINIMA<Block>) {
        const __m512i both = rows.load_word(at + offsetof(Block, GGML_COMMON_AGGR_U));
        d                  = lower_half(both);
        dmin               = upper_half(both);
    } else {
        d = rows.load_half(at + offsetof(Block, d));
    }
}

template <typename Block, int N_C>
static void dot_super_blocks(
    const char * weights, size_t stride, int n_rows, int64_t k, const char * const * columns, float * sums) {
    constexpr int       PER_VECTOR = BY_16<Block> ? 4 : 2;  // factors per 64 weights, each for some of 16 lanes
    const __m512i       lane       = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i       which      = _mm512_srli_epi32(lane, BY_16<Block> ? 2 : 3);
    alignas(64) int32_t integers[MAX_SLICES][N_C][DOT_ROWS][4];
    const Rows16        rows(weights, stride, 0, n_rows);
    __m512              total[N_C] = {};
    for (int64_t first = 0; first < k / SLICE; first += MAX_SLICES) {
        const int n = (int) std::min<int64_t>(MAX_SLICES, k / SLICE - first);
        for (int r = 0; r < DOT_ROWS; r++) {
            const Block * w = (const Block *) rows.row[r] + first;
            for (int i = 0; i < n; i++) {
                prefetch_behind(w + i, sizeof(Block));
                const SuperBlock s = load(w[i]);
                __m512i          factors[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const __m512i of = _mm512_add_epi32(which, _mm512_set1_epi32(PER_VECTOR * j));
                    factors[j]       = _mm512_permutexvar_epi32(of, s.factors);
                }
#pragma GCC unroll 4
                for (int c = 0; c < N_C; c++) {
                    const ActSuperBlock & a = ((const ActSuperBlock *) columns[c])[first + i];
                    _mm_store_si128((__m128i *) integers[i][c][r], sum_super_block<Block>(s, factors, a));
                }
            }
        }
        for (int i = 0; i < n; i++) {
            __m512 d, dmin;
            scales_of<Block>(rows, (first + i) * sizeof(Block), d, dmin);
#pragma GCC unroll 4
            for (int c = 0; c < N_C; c++) {
                __m512i x[4];
                Rows16((const char *) integers[i][c], sizeof(integers[i][c][0]), 0, DOT_ROWS).load16(0, x);
                const __m512i even  = _mm512_add_epi32(x[0], x[2]);
                const __m512i odd   = _mm512_add_epi32(x[1], x[3]);
                const __m512  scale = _mm512_set1_ps(((const ActSuperBlock *) columns[c])[first + i].scale);
                if constexpr (HAS_MINIMA<Block>) {
                    total[c] = add_super_block(total[c], even, d, odd, dmin, scale);
                } else {
                    total[c] = add_super_block(total[c], _mm512_add_epi32(even, odd), d, scale);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        _mm512_storeu_ps(sums + c * PANEL_ROWS, total[c]);
    }
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

// The scale of a block of 16 rows.
template <typename Block> static inline __m512 scale_of(const Rows16 & rows, size_t at) {
    if constexpr (IS_ONE_OF<Block, block_mxfp4>) {
        return rows.load_power(at + offsetof(Block, e));
    } else {
        return rows.load_half(at + offsetof(Block, d));
    }
}

// Integer sums of 8 blocks of a row times N_C columns, without the offset of the quants.
template <typename Block, int N_C>
static inline void sum_blocks(
    const Block * w, int64_t slice, const char * const * columns, int r, int32_t (&integers)[N_C][DOT_ROWS][N_BLOCKS]) {
    __m512i codes[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        codes[j] = codes_of(w + 2 * j);
    }
    const __m512i in_order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 8, 1, 9, 2, 10, 3, 11);
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        const ActBlocks & a = ((const ActBlocks *) columns[c])[slice];
        __m512i           z[4];  // two blocks in 8 lanes each
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            z[j] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes[j], _mm512_loadu_si512(a.codes[2 * j]));
        }
        const __m512i x   = _mm512_add_epi32(_mm512_unpacklo_epi32(z[0], z[1]), _mm512_unpackhi_epi32(z[0], z[1]));
        const __m512i y   = _mm512_add_epi32(_mm512_unpacklo_epi32(z[2], z[3]), _mm512_unpackhi_epi32(z[2], z[3]));
        const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
        const __m512i sum = _mm512_add_epi32(all, _mm512_shuffle_i32x4(all, all, 0xb1));  // even blocks, odd blocks
        _mm256_store_si256((__m256i *) integers[c][r], _mm512_castsi512_si256(_mm512_permutexvar_epi32(in_order, sum)));
    }
}

// Blocks missing from the last 8 are zeros on both sides.
template <typename Block, int N_C>
static void
dot_blocks(const char * weights, size_t stride, int n_rows, int64_t k, const char * const * columns, float * sums) {
    alignas(64) int32_t integers[MAX_SLICES][N_C][DOT_ROWS][N_BLOCKS];
    const Rows16        rows(weights, stride, 0, n_rows);
    const int64_t       n_blocks   = k / BLOCK;
    __m512              total[N_C] = {};
    for (int64_t first = 0; first < n_blocks; first += MAX_SLICES * N_BLOCKS) {
        const int     n     = (int) std::min<int64_t>(MAX_SLICES * N_BLOCKS, n_blocks - first);
        const int64_t slice = first / N_BLOCKS;
        for (int r = 0; r < DOT_ROWS; r++) {
            const Block * w = (const Block *) rows.row[r] + first;
            int           i = 0;
            for (; i < n / N_BLOCKS; i++, w += N_BLOCKS) {
                prefetch_behind(w, N_BLOCKS * sizeof(Block));
                sum_blocks<Block, N_C>(w, slice + i, columns, r, integers[i]);
            }
            if (n % N_BLOCKS != 0) {
                prefetch_behind(w, n % N_BLOCKS * sizeof(Block));
                Block last[N_BLOCKS] = {};
                memcpy(last, w, n % N_BLOCKS * sizeof(Block));
                sum_blocks<Block, N_C>(last, slice + i, columns, r, integers[i]);
            }
        }
        for (int i = 0; i * N_BLOCKS < n; i++) {
            const int here = std::min(N_BLOCKS, n - i * N_BLOCKS);
            __m512    d[N_BLOCKS];
            for (int b = 0; b < here; b++) {
                d[b] = scale_of<Block>(rows, (first + i * N_BLOCKS + b) * sizeof(Block));
            }
            for (int c = 0; c < N_C; c++) {
                const ActBlocks & a = ((const ActBlocks *) columns[c])[slice + i];
                __m512i           z[N_BLOCKS];
                Rows16((const char *) integers[i][c], sizeof(integers[i][c][0]), 0, DOT_ROWS).load32(0, z);
                for (int b = 0; b < here; b++) {
                    const __m512i products = _mm512_add_epi32(z[b], _mm512_set1_epi32(a.starts[b]));
                    total[c]               = add_block(total[c], products, d[b], _mm512_set1_ps(a.scales[b]));
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        _mm512_storeu_ps(sums + c * PANEL_ROWS, total[c]);
    }
}

// ---- plain numbers: a row at a time. A lane sums every 16th number, or pair of numbers, of K, in two sums; tiles have
// another order.

template <int N_C> static inline void store_row(__m512 (&even)[N_C], const __m512 (&odd)[N_C], float * sums) {
#pragma GCC                           unroll 4
    for (int c = 0; c < N_C; c++) {
        sums[c * PANEL_ROWS] = _mm512_reduce_add_ps(_mm512_add_ps(even[c], odd[c]));
    }
}

#if defined(__AVX512BF16__)

static inline __m512bh pairs_of(const void * p) {
    return (__m512bh) _mm512_loadu_si512(p);
}

// Two vectors of 32 values at once; the instruction sums pairs. K is a multiple of 32.
template <int N_C> static void dot_row_bf16(const char * row, int64_t k, const char * const * columns, float * sums) {
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
    store_row(even, odd, sums);
}

#endif

// Activations are float32. K is a multiple of 32.
template <int N_C> static void dot_row_f16(const char * row, int64_t k, const char * const * columns, float * sums) {
    __m512 even[N_C] = {};
    __m512 odd[N_C]  = {};
    for (int64_t i = 0; i < k; i += 32) {
        const char * const from = row + i * sizeof(ggml_fp16_t);
        prefetch_behind(from, CACHE_LINE);
        const __m512 first  = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) from));
        const __m512 second = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) from + 1));
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const float * x = (const float *) columns[c] + i;
            even[c]         = _mm512_fmadd_ps(first, _mm512_loadu_ps(x), even[c]);
            odd[c]          = _mm512_fmadd_ps(second, _mm512_loadu_ps(x + 16), odd[c]);
        }
    }
    store_row(even, odd, sums);
}

using DotRow = void(const char * row, int64_t k, const char * const * columns, float * sums);

template <DotRow * ROW>
static void
dot_plain_rows(const char * weights, size_t stride, int n_rows, int64_t k, const char * const * columns, float * sums) {
    for (int r = 0; r < std::min(DOT_ROWS, n_rows); r++) {
        ROW(weights + r * stride, k, columns, sums + r);
    }
}

// ---- selection

template <typename Block, int N_C> static constexpr DotColumns row_dot() {
    if constexpr (IS_ONE_OF<Block, block_q2_K, block_q3_K, block_q4_K, block_q5_K, block_q6_K, block_iq4_xs>) {
        return dot_super_blocks<Block, N_C>;
    } else {
        return dot_blocks<Block, N_C>;
    }
}

template <typename Block>
static constexpr Dot ROWS = { DOT_ROWS,
                              { row_dot<Block, 1>(), row_dot<Block, 2>(), row_dot<Block, 3>(), row_dot<Block, 4>() } };

static const TypedDot DOTS[] = {
    { GGML_TYPE_Q4_0, ROWS<block_q4_0> },
    { GGML_TYPE_Q5_0, ROWS<block_q5_0> },
    { GGML_TYPE_Q8_0, ROWS<block_q8_0> },
    { GGML_TYPE_IQ4_NL, ROWS<block_iq4_nl> },
    { GGML_TYPE_MXFP4, ROWS<block_mxfp4> },
    { GGML_TYPE_Q2_K, ROWS<block_q2_K> },
    { GGML_TYPE_Q3_K, ROWS<block_q3_K> },
    { GGML_TYPE_Q4_K, ROWS<block_q4_K> },
    { GGML_TYPE_Q5_K, ROWS<block_q5_K> },
    { GGML_TYPE_Q6_K, ROWS<block_q6_K> },
    { GGML_TYPE_IQ4_XS, ROWS<block_iq4_xs> },
    { GGML_TYPE_F16,
      { DOT_ROWS,
        { dot_plain_rows<dot_row_f16<1>>, dot_plain_rows<dot_row_f16<2>>, dot_plain_rows<dot_row_f16<3>>,
          dot_plain_rows<dot_row_f16<4>> } } },
#if defined(__AVX512BF16__)
    { GGML_TYPE_BF16,
      { DOT_ROWS,
        { dot_plain_rows<dot_row_bf16<1>>, dot_plain_rows<dot_row_bf16<2>>, dot_plain_rows<dot_row_bf16<3>>,
          dot_plain_rows<dot_row_bf16<4>> } } },
#endif
};

const Dot & dot_of(const Format & format) {
    return format.layout == QUANT_GEMM_8X8 ? dot_of_groups(format.type) : dot_of(DOTS, format.type);
}

#else

const Dot & dot_of(const Format &) {
    GGML_ABORT("never called: there is no format");
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
                dot.multiply[together - 1](weights + r * stride, stride, (int) (n_rows - r), k, columns.at + c,
                                           sums + c * PANEL_ROWS + r);
            }
        }
    }
}

}  // namespace quant_gemm
