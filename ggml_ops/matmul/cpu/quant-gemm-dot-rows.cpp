// Few columns: the rows of a matrix are multiplied one by one in their layout, so that they stream from memory.
//
// A row's quants are unpacked into registers once for all columns. A vector holds neighbouring values of one row, so
// its products are summed as exact integers. The integer sums of 16 rows are then transposed, and the float operations
// are those of a tile, with a row in each lane.

#define GGML_COMMON_IMPL_CPP
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "quant-gemm-dot.h"
#include "quant-gemm-super-block.h"
#include "quant-gemm-unpack.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstring>

namespace quant_gemm {

#if QUANT_GEMM_AVX512

// ---- types of 256 values

// Sums of 16 quants of the activations, for Q6_K times minus the offset of its quants.
template <typename Block> static inline __m512i offset_sums(const ActSuperBlock & a) {
    return SUBTRACTS<Block> ? _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *) a.sums_16))
                            : _mm512_loadu_si512(a.starts);
}

static inline __m128i add_quarters(__m512i x) {
    const __m256i y = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}

// Integer sums of a super block times a column, of products in four lanes.
template <typename Block>
static inline __m128i sum_super_block(const SuperBlock & w, const __m512i (&factors)[4], const ActSuperBlock & a) {
    const __m512i offsets  = _mm512_mullo_epi32(offset_sums<Block>(a), w.offsets);
    __m512i       products = SUBTRACTS<Block> ? _mm512_sub_epi32(_mm512_setzero_si512(), offsets) : offsets;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i z = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.codes[j], _mm512_loadu_si512(a.codes + 64 * j));
        products        = _mm512_dpwssd_epi32(products, z, factors[j]);  // 4 products fit in 16 bits: 4 * 63 * 127
    }
    return add_quarters(products);
}

template <typename Block, int N_C>
static void dot_super_blocks(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    const __m512i       lane  = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i       which = _mm512_srli_epi32(lane, 2);  // 4 factors per 64 weights, each for 4 lanes
    alignas(64) int32_t integers[N_C][DOT_ROWS][4];
    const Rows          rows(weights.first, weights.stride, 0, weights.n);
    const ptrdiff_t     ahead      = weights.next - weights.first;
    __m512              total[N_C] = {};
    for (int64_t i = 0; i < k / SLICE; i++) {
        for (int r = 0; r < DOT_ROWS; r++) {
            const Block * w = (const Block *) rows.row[r] + i;
            prefetch<2>((const char *) w + ahead, sizeof(Block));
            const SuperBlock s     = load(*w);
            const __m512i    lower = _mm512_and_si512(s.factors, _mm512_set1_epi32(0xffff));
            __m512i          factors[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                factors[j] = _mm512_permutexvar_epi32(_mm512_add_epi32(which, _mm512_set1_epi32(4 * j)), lower);
            }
#pragma GCC unroll 4
            for (int c = 0; c < N_C; c++) {
                const ActSuperBlock & a = ((const ActSuperBlock *) columns[c])[i];
                _mm_store_si128((__m128i *) integers[c][r], sum_super_block<Block>(s, factors, a));
            }
        }
        const __m512 d = rows.load_half(i * sizeof(Block) + offsetof(Block, d));
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            __m512i x[4];
            Rows((const char *) integers[c], sizeof(integers[c][0]), 0, DOT_ROWS).load16(0, x);
            const __m512i products = _mm512_add_epi32(_mm512_add_epi32(x[0], x[2]), _mm512_add_epi32(x[1], x[3]));
            const __m512  scale    = _mm512_set1_ps(((const ActSuperBlock *) columns[c])[i].scale);
            total[c]               = add_super_block(total[c], products, d, scale);
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
struct RowCodes {
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

// A row of a slice. columns: codes of activations in the order of RowCodes.
template <typename Block, int N_C>
static inline void sum_blocks(const Block * w, const RowCodes (&columns)[N_C], int r, Slice<N_C> & slice) {
    RowCodes codes;
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
    Rows((const char *) slice.scales, sizeof(slice.scales[0]), 0, DOT_ROWS).load16(0, scales);
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
        Rows((const char *) slice.sums[c], sizeof(slice.sums[c][0]), 0, DOT_ROWS).load32(0, z);
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
    const Rows      rows(weights.first, weights.stride, 0, weights.n);
    const ptrdiff_t ahead      = weights.next - weights.first;
    const int64_t   n_blocks   = k / BLOCK;
    __m512          total[N_C] = {};
    for (int64_t first = 0; first < n_blocks; first += N_BLOCKS) {
        const int     n = (int) std::min<int64_t>(N_BLOCKS, n_blocks - first);
        const int64_t i = first / N_BLOCKS;
        RowCodes      acts[N_C];
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

// ---- selection

template <typename Block, int N_C> static constexpr DotColumns row_dot() {
    if constexpr (IS_ONE_OF<Block, block_q3_K, block_q6_K>) {
        return dot_super_blocks<Block, N_C>;
    } else {
        return dot_blocks<Block, N_C>;
    }
}

template <typename Block>
static constexpr Dot ROWS = { DOT_ROWS,
                              { row_dot<Block, 1>(), row_dot<Block, 2>(), row_dot<Block, 3>(), row_dot<Block, 4>() } };

static const TypedDot DOTS[] = {
    { GGML_TYPE_Q4_0, ROWS<block_q4_0> },   { GGML_TYPE_Q5_0, ROWS<block_q5_0> },
    { GGML_TYPE_Q8_0, ROWS<block_q8_0> },   { GGML_TYPE_IQ4_NL, ROWS<block_iq4_nl> },
    { GGML_TYPE_MXFP4, ROWS<block_mxfp4> }, { GGML_TYPE_Q3_K, ROWS<block_q3_K> },
    { GGML_TYPE_Q6_K, ROWS<block_q6_K> },
};

const Dot * find_dot_of_rows(ggml_type type) {
    return find_dot(DOTS, type);
}

#endif

}  // namespace quant_gemm
