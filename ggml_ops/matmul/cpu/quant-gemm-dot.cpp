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
        if constexpr (IS_ONE_OF<Block, block_iq4_xs>) {
            products = _mm512_add_epi32(products, _mm512_mullo_epi32(z, factors[j]));
        } else {  // four products fit in 16 bits: at most 4 * 63 * 127
            products = _mm512_dpwssd_epi32(products, z, factors[j]);
        }
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
static void dot_super_blocks(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    constexpr int       PER_VECTOR = BY_16<Block> ? 4 : 2;  // factors per 64 weights, each for some of 16 lanes
    const __m512i       lane       = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i       which      = _mm512_srli_epi32(lane, BY_16<Block> ? 2 : 3);
    alignas(64) int32_t integers[N_C][DOT_ROWS][4];
    const Rows16        rows(weights.first, weights.stride, 0, weights.n);
    const ptrdiff_t     ahead      = weights.next - weights.first;
    __m512              total[N_C] = {};
    for (int64_t i = 0; i < k / SLICE; i++) {
        for (int r = 0; r < DOT_ROWS; r++) {
            const Block * w = (const Block *) rows.row[r] + i;
            prefetch<2>((const char *) w + ahead, sizeof(Block));
            const SuperBlock s = load(*w);
            const __m512i    lower =
                IS_ONE_OF<Block, block_iq4_xs> ? s.factors : _mm512_and_si512(s.factors, _mm512_set1_epi32(0xffff));
            __m512i factors[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const __m512i of = _mm512_add_epi32(which, _mm512_set1_epi32(PER_VECTOR * j));
                factors[j]       = _mm512_permutexvar_epi32(of, lower);
            }
#pragma GCC unroll 4
            for (int c = 0; c < N_C; c++) {
                const ActSuperBlock & a = ((const ActSuperBlock *) columns[c])[i];
                _mm_store_si128((__m128i *) integers[c][r], sum_super_block<Block>(s, factors, a));
            }
        }
        __m512 d, dmin;
        scales_of<Block>(rows, i * sizeof(Block), d, dmin);
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            __m512i x[4];
            Rows16((const char *) integers[c], sizeof(integers[c][0]), 0, DOT_ROWS).load16(0, x);
            const __m512i even  = _mm512_add_epi32(x[0], x[2]);
            const __m512i odd   = _mm512_add_epi32(x[1], x[3]);
            const __m512  scale = _mm512_set1_ps(((const ActSuperBlock *) columns[c])[i].scale);
            if constexpr (HAS_MINIMA<Block>) {
                total[c] = add_super_block(total[c], even, d, odd, dmin, scale);
            } else {
                total[c] = add_super_block(total[c], _mm512_add_epi32(even, odd), d, scale);
            }
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        _mm512_storeu_ps(sums + c * PANEL_ROWS, total[c]);
    }
}

// ---- types of 32 values with one scale

// Quants of 8 blocks as unsigned bytes: values 0..15 and 16..31 of blocks 0..3, then of blocks 4..7. The products of a
// block are in four lanes.
struct Codes {
    __m512i half[2][2];
};

// 16 bytes of each of four blocks.
template <typename Block> static inline __m512i load_4(const Block * w, size_t offset) {
    const auto load = [&](int i) { return _mm_loadu_si128((const __m128i *) ((const char *) (w + i) + offset)); };
    __m512i    x    = _mm512_castsi128_si512(load(0));
    x               = _mm512_inserti32x4(x, load(1), 1);
    x               = _mm512_inserti32x4(x, load(2), 2);
    return _mm512_inserti32x4(x, load(3), 3);
}

static inline void load(const block_q8_0 * w, __m512i (&half)[2]) {
    half[0] = _mm512_xor_si512(load_4(w, offsetof(block_q8_0, qs)), bytes(0x80));
    half[1] = _mm512_xor_si512(load_4(w, offsetof(block_q8_0, qs) + 16), bytes(0x80));
}

template <typename Block> static inline void load(const Block * w, __m512i (&half)[2]) {
    const __m512i x = load_4(w, offsetof(Block, qs));
    half[0]         = low_nibbles(x);
    half[1]         = high_nibbles(x);
    if constexpr (IS_ONE_OF<Block, block_q5_0>) {
        uint64_t fifth[2] = {};  // bit i of qh belongs to value i
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
            uint16_t bits[2];
            memcpy(bits, w[b].qh, sizeof(bits));
            fifth[0] |= (uint64_t) bits[0] << 16 * b;
            fifth[1] |= (uint64_t) bits[1] << 16 * b;
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            half[h] = _mm512_mask_add_epi8(half[h], fifth[h], half[h], bytes(16));
        }
    } else if constexpr (IS_ONE_OF<Block, block_iq4_nl>) {
        half[0] = iq4_values(half[0]);
        half[1] = iq4_values(half[1]);
    } else if constexpr (IS_ONE_OF<Block, block_mxfp4>) {
        half[0] = mxfp4_values(half[0]);
        half[1] = mxfp4_values(half[1]);
    }
}

// The scale of a block as it is stored.
template <typename Block> static inline uint16_t scale_bits(const Block & w) {
    if constexpr (IS_ONE_OF<Block, block_mxfp4>) {
        return w.e;
    } else {
        return w.d;
    }
}

// Scales of 16 blocks from the lower half of each lane.
template <typename Block> static inline __m512 scales_from(__m512i x) {
    if constexpr (IS_ONE_OF<Block, block_mxfp4>) {
        return half_powers(_mm512_and_si512(x, _mm512_set1_epi32(0xff)));
    } else {
        return lower_half(x);
    }
}

// 8 blocks of 16 rows: integer sums of each block times N_C columns, without the offset of the quants, and scales.
template <int N_C> struct Slice {
    alignas(64) int32_t sums[N_C][DOT_ROWS][N_BLOCKS];
    alignas(64) uint16_t scales[DOT_ROWS][N_BLOCKS];
};

// A row of a slice. columns: codes of activations in the order of Codes.
template <typename Block, int N_C>
static inline void sum_blocks(const Block * w, const Codes (&columns)[N_C], int r, Slice<N_C> & slice) {
    Codes codes;
    load(w, codes.half[0]);
    load(w + 4, codes.half[1]);
#pragma GCC unroll 8
    for (int b = 0; b < N_BLOCKS; b++) {
        slice.scales[r][b] = scale_bits(w[b]);
    }
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        __m512i z[2] = {};
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            z[j] = _mm512_dpbusd_epi32(z[j], codes.half[j][0], columns[c].half[j][0]);
            z[j] = _mm512_dpbusd_epi32(z[j], codes.half[j][1], columns[c].half[j][1]);
        }
        const __m512i pairs = _mm512_add_epi32(_mm512_unpacklo_epi32(z[0], z[1]), _mm512_unpackhi_epi32(z[0], z[1]));
        const __m512i sums  = _mm512_add_epi32(pairs, _mm512_shuffle_epi32(pairs, _MM_PERM_BADC));
        _mm256_store_si256((__m256i *) slice.sums[c][r],
                           _mm512_castsi512_si256(_mm512_permutexvar_epi32(in_order, sums)));
    }
}

// The sums of a slice of up to 8 blocks, as floats.
template <typename Block, int N_C>
static inline void
add_slice(const Slice<N_C> & slice, int n_blocks, int64_t i, const char * const * columns, __m512 (&total)[N_C]) {
    __m512i scales[N_BLOCKS / 2];
    Rows16((const char *) slice.scales, sizeof(slice.scales[0]), 0, DOT_ROWS).load16(0, scales);
    __m512 d[N_BLOCKS];
#pragma GCC unroll 4
    for (int pair = 0; pair < N_BLOCKS / 2; pair++) {
        d[2 * pair]     = scales_from<Block>(scales[pair]);
        d[2 * pair + 1] = scales_from<Block>(_mm512_srli_epi32(scales[pair], 16));
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        const ActBlocks & a = ((const ActBlocks *) columns[c])[i];
        __m512i           z[N_BLOCKS];
        Rows16((const char *) slice.sums[c], sizeof(slice.sums[c][0]), 0, DOT_ROWS).load32(0, z);
        for (int b = 0; b < n_blocks; b++) {
            const __m512i products = _mm512_add_epi32(z[b], _mm512_set1_epi32(a.starts[b]));
            total[c]               = add_block(total[c], products, d[b], _mm512_set1_ps(a.scales[b]));
        }
    }
}

// Blocks missing from the last 8 are zeros on both sides. The sums of a slice are added before the next one is read: a
// longer pause would leave memory idle.
template <typename Block, int N_C>
static void dot_blocks(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    const Rows16    rows(weights.first, weights.stride, 0, weights.n);
    const ptrdiff_t ahead      = weights.next - weights.first;
    const int64_t   n_blocks   = k / BLOCK;
    __m512          total[N_C] = {};
    for (int64_t first = 0; first < n_blocks; first += N_BLOCKS) {
        const int     n = (int) std::min<int64_t>(N_BLOCKS, n_blocks - first);
        const int64_t i = first / N_BLOCKS;
        Codes         acts[N_C];
        Slice<N_C>    slice;
        for (int c = 0; c < N_C; c++) {
            const auto & codes = ((const ActBlocks *) columns[c])[i].codes;
            for (int j = 0; j < 4; j++) {
                acts[c].half[j / 2][j % 2] = load_4(codes + j / 2 * 4, j % 2 * 16);
            }
        }
        for (int r = 0; r < DOT_ROWS; r++) {
            const Block * w = (const Block *) rows.row[r] + first;
            prefetch<2>((const char *) w + ahead, n * sizeof(Block));
            Block last[N_BLOCKS] = {};
            if (n < N_BLOCKS) {
                memcpy(last, w, n * sizeof(Block));
                w = last;
            }
            sum_blocks(w, acts, r, slice);
        }
        add_slice<Block>(slice, n, i, columns, total);
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
static void dot_plain_rows(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    for (int r = 0; r < std::min<int64_t>(DOT_ROWS, weights.n); r++) {
        ROW(weights.first + r * weights.stride, k, columns, sums + r);
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

void dot_rows(const Dot & dot, const WeightRows & weights, int64_t k, Columns columns, float * sums) {
    // weights are read from memory once; columns that do not all fit in L1 are processed in groups, with rows from L2
    const int turn = columns.n > 2 * DOT_COLUMNS ? DOT_COLUMNS : columns.n;
    for (int first = 0; first < columns.n; first += turn) {
        const int end = std::min(first + turn, columns.n);
        for (int64_t r = 0; r < weights.n; r += dot.rows) {
            WeightRows some = { weights.first + r * weights.stride, weights.stride, weights.n - r, weights.next };
            if (some.n > dot.rows) {
                some.next = some.first + dot.rows * weights.stride;
            }
            for (int c = first; c < end; c += DOT_COLUMNS) {
                const int together = std::min(end - c, DOT_COLUMNS);
                dot.multiply[together - 1](some, k, columns.at + c, sums + c * PANEL_ROWS + r);
            }
        }
    }
}

}  // namespace quant_gemm
