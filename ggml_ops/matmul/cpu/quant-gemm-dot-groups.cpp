// Few columns, weights of 8 interleaved rows: a group of rows is multiplied in its layout.
//
// 64 bytes of quants are 8 bytes of each of the 8 rows, so a vector holds two 32-bit lanes per row and is multiplied
// with 8 activation quants, repeated 8 times. The two lanes of a row are added before they become floats.

#define GGML_COMMON_IMPL_CPP
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "quant-gemm-codes.h"
#include "quant-gemm-dot.h"
#include "quant-gemm-unpack.h"
#include "repack.h"
#include "simd-mappings.h"

#include <cstring>

namespace quant_gemm {

#if QUANT_GEMM_AVX512

static constexpr __mmask16 FIRST_LANES = 0x5555;  // of every row

static inline __m512i load_codes(const void * p) {
    prefetch_behind(p, CACHE_LINE);
    return _mm512_loadu_si512(p);
}

// 8 activation quants, repeated for each row
static inline __m512i repeat_8(const int8_t * codes) {
    int64_t x;
    memcpy(&x, codes, sizeof(x));
    return _mm512_set1_epi64(x);
}

// 8 F16 numbers in the first lanes, 8 in the second.
static inline __m512 in_lanes(const ggml_half * first, const ggml_half * second) {
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) first));
    const __m256i y = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) second));
    return _mm512_cvtph_ps(_mm256_or_si256(x, _mm256_slli_epi32(y, 16)));
}

static inline __m512 both_lanes(const ggml_half * d) {
    return in_lanes(d, d);
}

// The scales of a block of two groups, ...
template <typename Block> static inline __m512 scales_of(const Block & first, const Block & second) {
    return in_lanes(first.d, second.d);
}

// ... or half of the powers of two that MXFP4 has instead.
static inline __m512 scales_of(const block_mxfp4x8 & first, const block_mxfp4x8 & second) {
    int64_t x, y;
    memcpy(&x, first.e, sizeof(x));
    memcpy(&y, second.e, sizeof(y));
    return half_powers(_mm512_or_si512(_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(x)),
                                       _mm512_slli_epi64(_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(y)), 32)));
}

static inline __m512i lanes_swapped(__m512i x) {
    return _mm512_shuffle_epi32(x, _MM_PERM_CDAB);
}

// Adds the two lanes of each row, for one group of rows, ...
static inline __m512i both_added(__m512i x) {
    return _mm512_add_epi32(x, lanes_swapped(x));
}

// ... or for two groups: the sums of the first are in the first lanes, those of the second in the second lanes.
static inline __m512i both_added(__m512i first, __m512i second) {
    const __m512i own   = _mm512_mask_mov_epi32(second, FIRST_LANES, first);
    const __m512i other = _mm512_mask_mov_epi32(first, FIRST_LANES, second);
    return _mm512_add_epi32(own, lanes_swapped(other));
}

template <int N_C> static inline void store_sums(const __m512 (&lanes)[N_C], float * sums) {
#pragma GCC                           unroll 4
    for (int c = 0; c < N_C; c++) {
        _mm256_storeu_ps(sums + c * PANEL_ROWS,
                         _mm512_castps512_ps256(_mm512_maskz_compress_ps(FIRST_LANES, lanes[c])));
    }
}

// Both nibbles of the bytes of a group's block, as unsigned quants.
static inline void split(const block_q4_0x8 &, __m512i x, __m512i & low, __m512i & high) {
    const __m512i y = _mm512_xor_si512(x, bytes(0x88));  // two's complement nibbles to offset 8
    low             = low_nibbles(y);
    high            = high_nibbles(y);
}

static inline void split(const block_iq4_nlx8 &, __m512i x, __m512i & low, __m512i & high) {
    low  = iq4_values(low_nibbles(x));
    high = iq4_values(high_nibbles(x));
}

static inline void split(const block_mxfp4x8 &, __m512i x, __m512i & low, __m512i & high) {
    low  = mxfp4_values(low_nibbles(x));
    high = mxfp4_values(high_nibbles(x));
}

// Blocks of 32 values with one scale per row: bytes hold values 0..15 in their low nibbles, 16..31 in their high ones.
// Two groups at once; the last one is repeated past the end.
template <typename Block, int N_C>
static void dot_nibble_groups(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    const Groups   groups(weights.first, weights.stride, 0, weights.n);
    const NextRows next(weights, 2, k / BLOCK * sizeof(Block), 8);
    __m512         sum[N_C] = {};
    for (int64_t i = 0; i < k / BLOCK; i++) {
        const Block * w[2];
        __m512i       codes[2][4];  // values 8j .. 8j + 7
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            w[g] = (const Block *) groups.group[g] + i;
            next.prefetch(g, i * sizeof(Block), sizeof(Block));
            split(*w[g], _mm512_loadu_si512(w[g]->qs), codes[g][0], codes[g][2]);
            split(*w[g], _mm512_loadu_si512(w[g]->qs + 64), codes[g][1], codes[g][3]);
        }
        const __m512 d = scales_of(*w[0], *w[1]);
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const ActBlocks & a     = ((const ActBlocks *) columns[c])[i / N_BLOCKS];
            const int         b     = i % N_BLOCKS;
            const __m512i     start = _mm512_maskz_set1_epi32(FIRST_LANES, a.starts[b]);
            __m512i           z[2]  = { start, start };
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const __m512i x = repeat_8(a.codes[b] + 8 * j);
                z[0]            = _mm512_dpbusd_epi32(z[0], codes[0][j], x);
                z[1]            = _mm512_dpbusd_epi32(z[1], codes[1][j], x);
            }
            sum[c] = add_block(sum[c], both_added(z[0], z[1]), d, _mm512_set1_ps(a.scales[b]));
        }
    }
    const __m512i in_order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        _mm512_storeu_ps(sums + c * PANEL_ROWS, _mm512_permutexvar_ps(in_order, sum[c]));
    }
}

// Adds super block i: integer sums of quants times scales and of minima, times their float factors.
template <int N_C>
static inline void add_scaled(const block_q2_Kx8 & w,
                              int64_t              i,
                              const char * const * columns,
                              const __m512i (&products)[N_C],
                              const __m512i (&minima)[N_C],
                              __m512 (&sum)[N_C]) {
    const __m512 d    = both_lanes(w.d);
    const __m512 dmin = both_lanes(w.dmin);
#pragma GCC unroll 4
    for (int c = 0; c < N_C; c++) {
        const __m512 scale = _mm512_set1_ps(((const ActSuperBlock *) columns[c])[i].scale);
        sum[c]             = add_super_block(sum[c], both_added(products[c]), d, both_added(minima[c]), dmin, scale);
    }
}

// Q2_K: a scale and a minimum of four bits for each 16 values. Quants times scales fit in bytes (45 at most), and 256
// of their products are one integer sum.
template <int N_C>
static void dot_q2_K_groups(const WeightRows & group, int64_t k, const char * const * columns, float * sums) {
    const block_q2_Kx8 * w = (const block_q2_Kx8 *) group.first;
    // of every row's 8 bytes: the first or second one as four numbers; bytes 0, 1, 4 and 5 as four numbers
    const __m512i first    = _mm512_set4_epi32((int) 0x80088008, (int) 0x80088008, (int) 0x80008000, (int) 0x80008000);
    const __m512i second   = _mm512_set4_epi32((int) 0x80098009, (int) 0x80098009, (int) 0x80018001, (int) 0x80018001);
    const __m512i four     = _mm512_set4_epi32((int) 0x800d800c, (int) 0x80098008, (int) 0x80058004, (int) 0x80018000);
    __m512        sum[N_C] = {};
    for (int64_t i = 0; i < k / SLICE; i++) {
        __m512i products[N_C] = {};
        __m512i minima[N_C]   = {};
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {  // 128 values
            prefetch_behind(w[i].scales + 64 * part, CACHE_LINE);
            __m512i x[4], both[4];  // bytes 8j .. 8j + 7 of each row; scale and minimum of two neighbouring blocks
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const __m128i * scales = (const __m128i *) (w[i].scales + 64 * part + 16 * j);
                x[j]                   = load_codes(w[i].qs + 256 * part + 64 * j);
                both[j]                = _mm512_cvtepu16_epi64(_mm_loadu_si128(scales));
            }
#pragma GCC unroll 4
            for (int pair = 0; pair < 4; pair++) {
                const __m512i low = low_nibbles(both[pair]);
                const __m512i s0  = _mm512_shuffle_epi8(low, first);
                const __m512i s1  = _mm512_shuffle_epi8(low, second);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const __m512i two_bits = _mm512_and_si512(_mm512_srli_epi16(x[j], 2 * pair), bytes(3));
                    const __m512i codes    = _mm512_mullo_epi16(two_bits, j < 2 ? s0 : s1);
#pragma GCC unroll 4
                    for (int c = 0; c < N_C; c++) {
                        const int8_t * a = ((const ActSuperBlock *) columns[c])[i].codes;
                        products[c] =
                            _mm512_dpbusd_epi32(products[c], codes, repeat_8(a + 128 * part + 32 * pair + 8 * j));
                    }
                }
            }
#pragma GCC unroll 2
            for (int j = 0; j < 4; j += 2) {
                const __m512i high = high_nibbles(_mm512_or_si512(both[j], _mm512_slli_epi64(both[j + 1], 32)));
                const __m512i m    = _mm512_shuffle_epi8(high, four);
#pragma GCC unroll 4
                for (int c = 0; c < N_C; c++) {
                    int64_t a;  // sums of the activations of these blocks
                    memcpy(&a, ((const ActSuperBlock *) columns[c])[i].sums_16 + 8 * part + 2 * j, sizeof(a));
                    minima[c] = _mm512_add_epi32(minima[c], _mm512_madd_epi16(m, _mm512_set1_epi64(a)));
                }
            }
        }
        add_scaled(w[i], i, columns, products, minima, sum);
    }
    store_sums(sum, sums);
}

template <typename Block>
static constexpr Dot NIBBLES = { 16,
                                 { dot_nibble_groups<Block, 1>, dot_nibble_groups<Block, 2>,
                                   dot_nibble_groups<Block, 3>, dot_nibble_groups<Block, 4> } };

static const TypedDot DOTS[] = {
    { GGML_TYPE_Q4_0, NIBBLES<block_q4_0x8> },
    { GGML_TYPE_IQ4_NL, NIBBLES<block_iq4_nlx8> },
    { GGML_TYPE_MXFP4, NIBBLES<block_mxfp4x8> },
    { GGML_TYPE_Q2_K, { 8, { dot_q2_K_groups<1>, dot_q2_K_groups<2>, dot_q2_K_groups<3>, dot_q2_K_groups<4> } } },
};

const Dot * find_dot_of_groups(ggml_type type) {
    return find_dot(DOTS, type);
}

#endif

}  // namespace quant_gemm
