// The tiles for i8mm: an instruction multiplies two columns by two rows, eight values of each.
//
// Its four sums are those of the first column with both rows, then those of the second column. Whatever is multiplied with
// sums has the same order: panels hold scales and factors of two rows twice, and columns are paired once for all rows of a
// panel. Weights are signed here, so no sum starts at an offset.

#include "quant-gemm-panel.h"

#include <algorithm>

namespace quant_gemm {

#if QUANT_GEMM_I8MM

static constexpr int TILE_ROWS    = 8;
static constexpr int ROW_PAIRS    = TILE_ROWS / 2;
static constexpr int COLUMN_PAIRS = 2;

// Two columns of a slice of K; in each vector, eight numbers of the first one, then eight of the second one.
struct ColumnPair {
    Ints   quants[SLICE / 8];
    Ints   low_sums[2];       // K types: the lower bytes of sums of quants, unsigned
    Ints   high_sums[2];      // ... and the upper ones
    Floats scales[N_BLOCKS];  // K types: one
};

template <int P> using SumGrid   = Ints[P][ROW_PAIRS];
template <int P> using FloatGrid = Floats[P][ROW_PAIRS];

static inline Floats scales_of(float first, float second) {
    return vcombine_f32(vdup_n_f32(first), vdup_n_f32(second));
}

static void
pair_columns(const Format & format, int n_blocks, const char * first, const char * second, ColumnPair & to) {
    for (int k = 0; k < n_blocks * BLOCK; k += 16) {
        const Ints a         = load_ints(first + k);
        const Ints b         = load_ints(second + k);
        to.quants[k / 8]     = lower_halves(a, b);
        to.quants[k / 8 + 1] = upper_halves(a, b);
    }
    if (format.scheme == Scheme::q8_0) {
        const float (&scales)[N_BLOCKS] = ((const ActBlocks *) first)->scales;
        const float (&others)[N_BLOCKS] = ((const ActBlocks *) second)->scales;
        for (int b = 0; b < n_blocks; b++) {
            to.scales[b] = scales_of(scales[b], others[b]);
        }
        return;
    }
    const int    n_minima = weights_per_minimum(format.scheme) == 0 ? 0 : SLICE / weights_per_minimum(format.scheme);
    const size_t sums     = n_minima == N_BLOCKS ? offsetof(ActSuperBlock, sums) : offsetof(ActSuperBlock, sums_16);
    for (int i = 0; i < n_minima / 8; i++) {
        const Ints a    = load_ints(first + sums + 16 * i);
        const Ints b    = load_ints(second + sums + 16 * i);
        to.low_sums[i]  = lower_bytes(a, b);
        to.high_sums[i] = upper_bytes(a, b);
    }
    to.scales[0] = scales_of(((const ActSuperBlock *) first)->scale, ((const ActSuperBlock *) second)->scale);
}

// The float sums of a tile, PANEL_ROWS apart: of each column and four rows, and in the order of integer sums.
template <int P> static inline void load_sums(float * const (&at)[2 * P], FloatGrid<P> & f) {
#pragma GCC                         unroll 2
    for (int p = 0; p < P; p++) {
#pragma GCC unroll 2
        for (int r = 0; r < ROW_PAIRS; r += 2) {
            const Ints a = load_ints(at[2 * p] + 2 * r);
            const Ints b = load_ints(at[2 * p + 1] + 2 * r);
            f[p][r]      = vreinterpretq_f32_s32(lower_halves(a, b));
            f[p][r + 1]  = vreinterpretq_f32_s32(upper_halves(a, b));
        }
    }
}

template <int P> static inline void store_sums(const FloatGrid<P> & f, float * const (&at)[2 * P]) {
#pragma GCC                         unroll 2
    for (int p = 0; p < P; p++) {
#pragma GCC unroll 2
        for (int r = 0; r < ROW_PAIRS; r += 2) {
            const Ints a = vreinterpretq_s32_f32(f[p][r]);
            const Ints b = vreinterpretq_s32_f32(f[p][r + 1]);
            store_ints(at[2 * p] + 2 * r, lower_halves(a, b));
            store_ints(at[2 * p + 1] + 2 * r, upper_halves(a, b));
        }
    }
}

// Eight values of the rows and columns of a tile.
template <int P> struct Eight {
    Ints rows[ROW_PAIRS];
    Ints columns[P];

    inline Eight(const uint8_t * weights, const ColumnPair (&pairs)[COLUMN_PAIRS], int i) {
#pragma GCC unroll 4
        for (int r = 0; r < ROW_PAIRS; r++) {
            rows[r] = in_order(load_ints(weights + r * sizeof(Ints)));
        }
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
            columns[p] = in_order(pairs[p].quants[i]);
        }
    }
};

// Adds the products of values 8 * first .. 8 * (first + N) - 1, whose weights begin at `weights`.
template <int P, int N>
static inline void
add_eights(SumGrid<P> & z, const uint8_t * weights, const ColumnPair (&pairs)[COLUMN_PAIRS], int first) {
    Eight<P> now(weights, pairs, first);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
        const Eight<P> here = now;
        if (i + 1 < N) {
            now = Eight<P>(weights + (i + 1) * 8 * PANEL_ROWS, pairs, first + i + 1);
        }
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
#pragma GCC unroll 4
            for (int r = 0; r < ROW_PAIRS; r++) {
                z[p][r] = add_products_of_two(z[p][r], here.columns[p], here.rows[r]);
            }
        }
    }
}

// Integer sums of products of minima with sums of quants.
template <int N, int P>
static inline void sum_minima(const Panel & panel, int row, const ColumnPair (&pairs)[COLUMN_PAIRS], SumGrid<P> & z) {
#pragma GCC        unroll 4
    for (int r = 0; r < ROW_PAIRS; r++) {
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
            Ints sum = zero();
#pragma GCC unroll 2
            for (int i = 0; i < N / 8; i++) {
                sum = add_products_of_two(sum, pairs[p].high_sums[i], load_ints(panel.minima_in_bytes[i][row + 2 * r]));
            }
            sum = vshlq_n_s32(sum, 8);
#pragma GCC unroll 2
            for (int i = 0; i < N / 8; i++) {
                sum = add_products_of_unsigned(sum, pairs[p].low_sums[i],
                                               load_ints(panel.minima_in_bytes[i][row + 2 * r]));
            }
            z[p][r] = sum;
        }
    }
}

// a scale per 32 weights and per 32 activations
template <int P>
static void tile_of_blocks(
    const Panel & panel, int row, int n_blocks, const ColumnPair (&pairs)[COLUMN_PAIRS], float * const (&sums)[2 * P]) {
    FloatGrid<P> f;
    load_sums<P>(sums, f);
    const uint8_t * weights = panel.codes[0][0][0] + 8 * row;
    for (int b = 0; b < n_blocks; b++) {
        SumGrid<P> z;
        clear(z);
        add_eights<P, BLOCK / 8>(z, weights, pairs, b * BLOCK / 8);
#pragma GCC unroll 4
        for (int r = 0; r < ROW_PAIRS; r++) {
            const Floats d = load_floats(panel.scales[b] + 2 * row + LANES * r);
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) {
                f[p][r] = add_block(f[p][r], z[p][r], d, pairs[p].scales[b]);
            }
        }
        weights += BLOCK * PANEL_ROWS;
    }
    store_sums<P>(f, sums);
}

// 256 values: a factor for some weights; minima, or none. Sums are not reset after a factor (FACTOR_DIFFERENCES).
template <Scheme SCHEME, int P>
static void tile_of_super_block(
    const Panel & panel, int row, int, const ColumnPair (&pairs)[COLUMN_PAIRS], float * const (&sums)[2 * P]) {
    constexpr int SUB = weights_per_factor(SCHEME);
    SumGrid<P>    products, z;
    clear(products);
    clear(z);
    const uint8_t * weights = panel.codes[0][0][0] + 8 * row;
    for (int b = 0; b < SLICE / SUB; b++) {
        add_eights<P, SUB / 8>(z, weights, pairs, b * SUB / 8);
#pragma GCC unroll 4
        for (int r = 0; r < ROW_PAIRS; r++) {
            const Ints factors = load_ints(panel.factors[b] + 2 * row + LANES * r);
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) {
                products[p][r] = vmlaq_s32(products[p][r], z[p][r], factors);
            }
        }
        weights += SUB * PANEL_ROWS;
    }
    SumGrid<P> minima;
    if constexpr (has_minima(SCHEME)) {
        sum_minima<SLICE / weights_per_minimum(SCHEME), P>(panel, row, pairs, minima);
    }
    FloatGrid<P> f;
    load_sums<P>(sums, f);
#pragma GCC unroll 4
    for (int r = 0; r < ROW_PAIRS; r++) {
        const Floats d    = load_floats(panel.super_scales + 2 * row + LANES * r);
        const Floats dmin = load_floats(panel.minimum_scales + 2 * row + LANES * r);
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
            const Floats scale = pairs[p].scales[0];
            if constexpr (has_minima(SCHEME)) {
                f[p][r] = add_super_block(f[p][r], products[p][r], d, minima[p][r], dmin, scale);
            } else {
                f[p][r] = add_super_block(f[p][r], products[p][r], d, scale);
            }
        }
    }
    store_sums<P>(f, sums);
}

template <int P>
using Tile = void (*)(
    const Panel & panel, int row, int n_blocks, const ColumnPair (&pairs)[COLUMN_PAIRS], float * const (&sums)[2 * P]);

template <int P> static Tile<P> tile_of(Scheme scheme) {
    switch (scheme) {
    case Scheme::q8_0:
        return tile_of_blocks<P>;
    case Scheme::q8_K:
        return tile_of_super_block<Scheme::q8_K, P>;
    case Scheme::q8_K_16:
        return tile_of_super_block<Scheme::q8_K_16, P>;
    case Scheme::q8_K_mins:
        return tile_of_super_block<Scheme::q8_K_mins, P>;
    case Scheme::q8_K_16_mins:
        return tile_of_super_block<Scheme::q8_K_16_mins, P>;
    default:
        GGML_ABORT("no tile");
    }
}

// Two or four columns; the last one is its own partner if their number is odd.
template <int P>
static void multiply_pairs(const Format & format, const Panel & panel, int n_blocks, Columns columns, float * sums) {
    const Tile<P> tile = tile_of<P>(format.scheme);
    ColumnPair    pairs[COLUMN_PAIRS];
    float *       at[2 * P];
    for (int c = 0; c < 2 * P; c++) {
        at[c] = sums + std::min(c, columns.n - 1) * PANEL_ROWS;
    }
    for (int p = 0; p < P; p++) {
        pair_columns(format, n_blocks, columns.at[2 * p], columns.at[std::min(2 * p + 1, columns.n - 1)], pairs[p]);
    }
    for (int row = 0; row < PANEL_ROWS; row += TILE_ROWS) {
        tile(panel, row, n_blocks, pairs, at);
        for (float *& each : at) {
            each += TILE_ROWS;
        }
    }
}

void multiply_i8mm(const Format & format, const Panel & panel, int n_blocks, Columns columns, float * sums) {
    (columns.n > 2 ? multiply_pairs<2> : multiply_pairs<1>) (format, panel, n_blocks, columns, sums);
}

#endif

}  // namespace quant_gemm
