// Few columns: the rows of a matrix are multiplied one by one, or four at once, in their layout, so that they stream from
// memory.
//
// A row's quants are unpacked into registers once for all columns. A vector holds neighbouring values of one row, so
// its products are summed as exact integers. The lanes of 16 rows are then added so that each lane has the sum of a row,
// and the float operations are those of a tile.

#define GGML_COMMON_IMPL_CPP
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "quant-gemm-dot.h"
#include "quant-gemm-four-rows.h"
#include "quant-gemm-super-block.h"
#include "quant-gemm-unpack-k.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstring>

namespace quant_gemm {

#if QUANT_GEMM_AVX512

// ---- types of 256 values

// Adds the four lanes of each 128 bits, of four rows: a row in each lane.
static inline __m512i add_4_lanes(const __m512i (&row)[4]) {
    const auto pairs = [](__m512i x, __m512i y) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
    };
    const __m512i x = pairs(row[0], row[1]);
    const __m512i y = pairs(row[2], row[3]);
    return _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
}

// Adds the four quarters of four vectors: a vector in each quarter.
static inline __m512i add_quarters(const __m512i (&x)[4]) {
    const auto halves_of = [](__m512i x, __m512i y) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x44), _mm512_shuffle_i32x4(x, y, 0xee));
    };
    const __m512i first  = halves_of(x[0], x[1]);
    const __m512i second = halves_of(x[2], x[3]);
    return _mm512_add_epi32(_mm512_shuffle_i32x4(first, second, 0x88), _mm512_shuffle_i32x4(first, second, 0xdd));
}

// Super block i of 16 rows times the columns: integer sums, a row in each lane. sum_row gets a block and an array with a
// vector for each column, which it fills with sums to be added.
template <typename Block, int N_C, typename SumRow>
static inline void
sum_rows(const Rows & rows, int64_t i, const NextRows & next, const SumRow & sum_row, __m512i (&integers)[N_C]) {
    __m512i groups[N_C][DOT_ROWS / 4];
    for (int group = 0; group < DOT_ROWS / 4; group++) {
        __m512i four_rows[N_C][4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const Block * w = (const Block *) rows.row[4 * group + r] + i;
            next.prefetch(4 * group + r, i * sizeof(Block), sizeof(Block));
            __m512i sums[N_C];
            sum_row(*w, sums);
#pragma GCC unroll 4
            for (int c = 0; c < N_C; c++) {
                four_rows[c][r] = sums[c];
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            groups[c][group] = add_4_lanes(four_rows[c]);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        integers[c] = add_quarters(groups[c]);
    }
}

// Integer sums of a super block of Q6_K times a column, to be added.
static inline __m512i sum_q6_K(const SuperBlock & w, const __m512i (&factors)[4], const ActSuperBlock & a) {
    __m512i products = _mm512_mullo_epi32(_mm512_loadu_si512(a.starts), w.factors);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i z = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.codes[j], _mm512_loadu_si512(a.codes + 64 * j));
        products        = _mm512_dpwssd_epi32(products, z, factors[j]);  // 4 products fit in 16 bits: 4 * 63 * 127
    }
    return products;
}

// The factors of a super block of Q6_K, each in the lanes of its products.
static inline void factors_in_lanes(const SuperBlock & w, __m512i (&factors)[4]) {
    const __m512i lane  = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i which = _mm512_srli_epi32(lane, 2);  // 4 factors per 64 weights, each for 4 lanes
    const __m512i lower = _mm512_and_si512(w.factors, _mm512_set1_epi32(0xffff));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        factors[j] = _mm512_permutexvar_epi32(_mm512_add_epi32(which, _mm512_set1_epi32(4 * j)), lower);
    }
}

template <int N_C>
static void dot_q6_K(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    const Rows     rows(weights.first, weights.stride, 0, weights.n);
    const NextRows next(weights, DOT_ROWS, k / SLICE * sizeof(block_q6_K));
    __m512         total[N_C] = {};
    for (int64_t i = 0; i < k / SLICE; i++) {
        const auto sum_row = [&](const block_q6_K & w, __m512i(&row)[N_C]) {
            const SuperBlock s = load(w);
            __m512i          factors[4];
            factors_in_lanes(s, factors);
#pragma GCC unroll 4
            for (int c = 0; c < N_C; c++) {
                row[c] = sum_q6_K(s, factors, ((const ActSuperBlock *) columns[c])[i]);
            }
        };
        __m512i integers[N_C];
        sum_rows<block_q6_K>(rows, i, next, sum_row, integers);
        const __m512 d = rows.load_half(i * sizeof(block_q6_K) + offsetof(block_q6_K, d));
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const __m512 scale = _mm512_set1_ps(((const ActSuperBlock *) columns[c])[i].scale);
            total[c]           = add_super_block(total[c], integers[c], d, scale);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        _mm512_storeu_ps(sums + c * PANEL_ROWS, total[c]);
    }
}

// ---- ... two blocks in a vector (Q4_K and Q5_K)

// Receives the scales of 16 rows and their minima, which are multiplied with sums of the activations: a row in each lane.
template <int N_C> struct ScalesOfRows {
    const ActSuperBlock * acts[N_C];
    __m512i               sums[N_C] = {};
    __m512                d;
    __m512                dmin;

    void factors(int, __m512i) const {}

    inline void minima(int pair, __m512i x) {
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            sums[c] = add_pairs(sums[c], x, broadcast_ints(acts[c]->sums + 2 * pair));
        }
    }

    inline void super_scales(__m512 x) { d = x; }

    inline void minimum_scales(__m512 x) { dmin = x; }
};

// The activations of the two blocks of vector j.
static inline __m512i acts_of_two_blocks(const ActSuperBlock & a, int j) {
    const auto load = [&](int b) { return _mm256_loadu_si256((const __m256i *) (a.codes + BLOCK * b)); };
    return halves(load(first_block(j)), load(first_block(j) + 2));
}

static inline __m512i sum_two_blocks(const TwoBlocks & w, const __m512i (&acts)[4]) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {  // 4 products fit in 16 bits: 4 * 31 * 127
        const __m512i z = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.codes[j], acts[j]);
        sum             = _mm512_dpwssd_epi32(sum, z, w.factors[j]);
    }
    return sum;
}

template <typename Block, int N_C>
static void dot_two_blocks(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    const Rows     rows(weights.first, weights.stride, 0, weights.n);
    const NextRows next(weights, DOT_ROWS, k / SLICE * sizeof(Block));
    __m512         total[N_C] = {};
    for (int64_t i = 0; i < k / SLICE; i++) {
        ScalesOfRows<N_C> parts;
        __m512i           acts[N_C][4];
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            parts.acts[c] = (const ActSuperBlock *) columns[c] + i;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                acts[c][j] = acts_of_two_blocks(*parts.acts[c], j);
            }
        }
        const auto sum_row = [&](const Block & w, __m512i(&row)[N_C]) {
            const TwoBlocks x = load_two_blocks(w);
#pragma GCC unroll 4
            for (int c = 0; c < N_C; c++) {
                row[c] = sum_two_blocks(x, acts[c]);
            }
        };
        __m512i integers[N_C];
        sum_rows<Block>(rows, i, next, sum_row, integers);
        give_scales_and_minima(rows, i * sizeof(Block), parts);
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const __m512 scale = _mm512_set1_ps(parts.acts[c]->scale);
            total[c]           = add_super_block(total[c], integers[c], parts.d, parts.sums[c], parts.dmin, scale);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        _mm512_storeu_ps(sums + c * PANEL_ROWS, total[c]);
    }
}

// ---- ... four rows at once (Q2_K and Q3_K)

// Sums of super block i of 16 rows times the columns, a row in each lane: `products` of quants and factors, and of minima
// and activations. four: the first four rows; those of the next super block afterwards. The next four rows are always
// loaded while four are multiplied, so that shuffles and multiplications run at the same time. Returns scales_of_four of
// all rows.
template <typename Block, int N_C>
static inline __m512i sum_by_fours(const Rows &                    rows,
                                   int64_t                         i,
                                   int64_t                         next_i,
                                   const NextRows &                ahead,
                                   const FourActs<Block> * const * acts,
                                   FourRows<Block> &               four,
                                   __m512i (&products)[N_C],
                                   __m512i (&minima)[N_C]) {
    __m512i groups[N_C][DOT_ROWS / 4];
    __m512i groups_of_minima[N_C][DOT_ROWS / 4];
    __m512i scales;
#pragma GCC unroll 4
    for (int group = 0; group < DOT_ROWS / 4; group++) {
        const bool           last     = group == DOT_ROWS / 4 - 1;
        const char * const * row      = rows.row + 4 * group;
        const char * const * next_row = last ? rows.row : row + 4;
        FourRows<Block>      next;
        __m512i              z[N_C][4];
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) {
                z[c][q] = acts[c]->start(q);
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            next.load(j, ((const Block *) next_row[j])[last ? next_i : i]);
            ahead.prefetch(4 * group + j, i * sizeof(Block), sizeof(Block));
            __m512i codes[4];
            four.codes(j, codes);
#pragma GCC unroll 4
            for (int c = 0; c < N_C; c++) {
#pragma GCC unroll 4
                for (int q = 0; q < 4; q++) {
                    z[c][q] = _mm512_dpbusd_epi32(z[c][q], codes[q], acts[c]->codes[q][j]);
                }
            }
        }
        next.transpose();
        const __m512i four_scales = scales_of_four<Block>(row, i * sizeof(Block));
        scales              = group == 0 ? four_scales : _mm512_mask_mov_epi32(scales, 0xf << 4 * group, four_scales);
        const FourFactors f = four.factors(row, i * sizeof(Block));
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            groups[c][group] = _mm512_madd_epi16(two_sums<Block>(z[c], 0), f.products[0]);
            groups[c][group] = _mm512_dpwssd_epi32(groups[c][group], two_sums<Block>(z[c], 1), f.products[1]);
            if constexpr (HAS_MINIMA<Block>) {
                groups_of_minima[c][group] = _mm512_madd_epi16(acts[c]->sums[0], f.minima[0]);
                groups_of_minima[c][group] =
                    _mm512_dpwssd_epi32(groups_of_minima[c][group], acts[c]->sums[1], f.minima[1]);
            }
        }
        four = next;
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        products[c] = add_quarters(groups[c]);
        if constexpr (HAS_MINIMA<Block>) {
            minima[c] = add_quarters(groups_of_minima[c]);
        }
    }
    return scales;
}

template <typename Block> static void expand(const ActSuperBlock & from, void * to) {
    ((FourActs<Block> *) to)->load(from);
}

template <typename Block, int N_C>
static void dot_four_rows(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    const Rows      rows(weights.first, weights.stride, 0, weights.n);
    const int64_t   n = k / SLICE;
    const NextRows  next(weights, DOT_ROWS, n * sizeof(Block));
    __m512          total[N_C] = {};
    FourRows<Block> four;
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        four.load(r, *(const Block *) rows.row[r]);
    }
    four.transpose();
    for (int64_t i = 0; i < n; i++) {
        const FourActs<Block> * acts[N_C];
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            acts[c] = (const FourActs<Block> *) columns[c] + i;
        }
        __m512i       products[N_C];
        __m512i       minima[N_C];
        const __m512i scales = sum_by_fours(rows, i, std::min(i + 1, n - 1), next, acts, four, products, minima);
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const __m512 scale = _mm512_set1_ps(acts[c]->scale);
            if constexpr (HAS_MINIMA<Block>) {
                total[c] =
                    add_super_block(total[c], products[c], lower_half(scales), minima[c], upper_half(scales), scale);
            } else {
                total[c] = add_super_block(total[c], products[c], upper_half(scales), scale);
            }
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        _mm512_storeu_ps(sums + c * PANEL_ROWS, total[c]);
    }
}

// ---- types of 32 values with one scale

// Quants of four blocks as unsigned bytes: values 0..15, then values 16..31 of each. The products of a block are in four
// lanes.
struct FourBlocks {
    __m512i half[2];
};

// 16 bytes of each of four blocks.
template <typename Block> static inline __m512i load_4(const Block * w, size_t offset) {
    const auto load = [&](int i) { return _mm_loadu_si128((const __m128i *) ((const char *) (w + i) + offset)); };
    __m512i    x    = _mm512_castsi128_si512(load(0));
    x               = _mm512_inserti32x4(x, load(1), 1);
    x               = _mm512_inserti32x4(x, load(2), 2);
    return _mm512_inserti32x4(x, load(3), 3);
}

static inline FourBlocks load(const block_q8_0 * w) {
    return { { _mm512_xor_si512(load_4(w, offsetof(block_q8_0, qs)), bytes(0x80)),
               _mm512_xor_si512(load_4(w, offsetof(block_q8_0, qs) + 16), bytes(0x80)) } };
}

template <typename Block> static inline FourBlocks load(const Block * w) {
    const __m512i x       = load_4(w, offsetof(Block, qs));
    __m512i       half[2] = { low_nibbles(x), high_nibbles(x) };
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
    return { { half[0], half[1] } };
}

// Up to 8 blocks of 16 rows: integer sums of each block times N_C columns, without the offset of the quants, and scales. A
// vector of sums has four blocks, each of four rows.
template <int N_C> struct Slice {
    alignas(64) __m512i sums[N_C][2][DOT_ROWS / 4];
    alignas(64) __m128i scales[DOT_ROWS];
};

static inline __m512i sum_four_blocks(const FourBlocks & w, const FourBlocks & column) {
    const __m512i z = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.half[0], column.half[0]);
    return _mm512_dpbusd_epi32(z, w.half[1], column.half[1]);
}

// The quants of the activations of a slice.
static inline void load_acts(const ActBlocks & from, FourBlocks (&acts)[2]) {
    for (int j = 0; j < 4; j++) {
        acts[j / 2].half[j % 2] = load_4(from.codes + j / 2 * 4, j % 2 * 16);
    }
}

// Four rows of a slice of 4 * VECTORS blocks. columns: quants of activations.
template <int VECTORS, typename Block, int N_C>
static inline void
sum_four_rows(const Block * const (&row)[4], const FourBlocks (&columns)[N_C][2], int group, Slice<N_C> & slice) {
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) {
        FourBlocks codes[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            codes[r] = load(row[r] + 4 * j);
        }
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            __m512i z[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                z[r] = sum_four_blocks(codes[r], columns[c][j]);
            }
            slice.sums[c][j][group] = add_4_lanes(z);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        slice.scales[4 * group + r] = scale_bits<4 * VECTORS>(row[r]);
    }
}

// n blocks of 16 rows, beginning with block `first`. Blocks missing from 4 * VECTORS are zeros on both sides.
template <int VECTORS, typename Block, int N_C>
static inline void sum_slice(const Rows &     rows,
                             int64_t          first,
                             int              n,
                             const NextRows & next,
                             const FourBlocks (&columns)[N_C][2],
                             Slice<N_C> & slice) {
    Block last[4][4 * VECTORS];
    if (n < 4 * VECTORS) {
        memset(last, 0, sizeof(last));
    }
    for (int r = 0; r < DOT_ROWS; r += 4) {
        const Block * w[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            w[j] = (const Block *) rows.row[r + j] + first;
            next.prefetch(r + j, first * sizeof(Block), n * sizeof(Block));
        }
        if (n < 4 * VECTORS) {
            for (int j = 0; j < 4; j++) {
                memcpy(last[j], w[j], n * sizeof(Block));
                w[j] = last[j];
            }
        }
        sum_four_rows<VECTORS>(w, columns, r / 4, slice);
    }
}

// The sums of a slice of up to 8 blocks, as floats.
template <typename Block, int N_C>
static inline void
add_slice(const Slice<N_C> & slice, int n_blocks, int64_t i, const char * const * columns, __m512 (&total)[N_C]) {
    __m512 d[N_BLOCKS];
    scales_of_slice<Block>(slice.scales, d);
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        const ActBlocks & a = ((const ActBlocks *) columns[c])[i];
#pragma GCC unroll 8
        for (int b = 0; b < N_BLOCKS; b++) {
            if (b < n_blocks) {
                const __m128i * sums = (const __m128i *) slice.sums[c][b / 4] + b % 4;
                __m512i         z    = _mm512_castsi128_si512(sums[0]);
                z                    = _mm512_inserti32x4(z, sums[4], 1);
                z                    = _mm512_inserti32x4(z, sums[8], 2);
                z                    = _mm512_inserti32x4(z, sums[12], 3);
                z                    = _mm512_add_epi32(z, _mm512_set1_epi32(a.starts[b]));
                total[c]             = add_block(total[c], z, d[b], _mm512_set1_ps(a.scales[b]));
            }
        }
    }
}

// The sums of a slice are added before the next one is read: a longer pause would leave memory idle.
template <typename Block, int N_C>
static void dot_blocks(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    const int64_t  n_blocks = k / BLOCK;
    const Rows     rows(weights.first, weights.stride, 0, weights.n);
    const NextRows next(weights, DOT_ROWS, n_blocks * sizeof(Block));
    __m512         total[N_C] = {};
    for (int64_t first = 0; first < n_blocks; first += N_BLOCKS) {
        const int     n = (int) std::min<int64_t>(N_BLOCKS, n_blocks - first);
        const int64_t i = first / N_BLOCKS;
        FourBlocks    acts[N_C][2];
        Slice<N_C>    slice;
        for (int c = 0; c < N_C; c++) {
            load_acts(((const ActBlocks *) columns[c])[i], acts[c]);
        }
        if (n <= N_BLOCKS / 2) {  // for instance all of a row of k_b or of KDA's low-rank gates
            sum_slice<1, Block>(rows, first, n, next, acts, slice);
        } else {
            sum_slice<2, Block>(rows, first, n, next, acts, slice);
        }
        add_slice<Block>(slice, n, i, columns, total);
    }
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        _mm512_storeu_ps(sums + c * PANEL_ROWS, total[c]);
    }
}

// ---- selection

template <typename Block, int N_C> static constexpr DotColumns row_dot() {
    if constexpr (IS_ONE_OF<Block, block_q6_K>) {
        return dot_q6_K<N_C>;
    } else if constexpr (IS_ONE_OF<Block, block_q2_K, block_q3_K>) {
        return dot_four_rows<Block, N_C>;
    } else if constexpr (IS_ONE_OF<Block, block_q4_K, block_q5_K>) {
        return dot_two_blocks<Block, N_C>;
    } else {
        return dot_blocks<Block, N_C>;
    }
}

template <typename Block> static constexpr Expansion expansion() {
    if constexpr (IS_ONE_OF<Block, block_q2_K, block_q3_K>) {
        return { sizeof(FourActs<Block>), expand<Block> };
    } else {
        return {};
    }
}

template <typename Block>
static constexpr Dot ROWS = { DOT_ROWS,
                              { row_dot<Block, 1>(), row_dot<Block, 2>(), row_dot<Block, 3>(), row_dot<Block, 4>() },
                              expansion<Block>() };

static const TypedDot DOTS[] = {
    { GGML_TYPE_Q4_0, ROWS<block_q4_0> },   { GGML_TYPE_Q5_0, ROWS<block_q5_0> },
    { GGML_TYPE_Q8_0, ROWS<block_q8_0> },   { GGML_TYPE_IQ4_NL, ROWS<block_iq4_nl> },
    { GGML_TYPE_MXFP4, ROWS<block_mxfp4> }, { GGML_TYPE_Q3_K, ROWS<block_q3_K> },
    { GGML_TYPE_Q6_K, ROWS<block_q6_K> },   { GGML_TYPE_Q2_K, ROWS<block_q2_K> },
    { GGML_TYPE_Q4_K, ROWS<block_q4_K> },   { GGML_TYPE_Q5_K, ROWS<block_q5_K> },
};

const Dot * find_dot_of_rows(ggml_type type) {
    return find_dot(DOTS, type);
}

#endif

}  // namespace quant_gemm
