// The tiles: a panel of weight rows, two vectors, times a few activation rows, with the sums in registers.
//
// For each four values of K there are two loads of weights; each activation row takes one broadcast, and one or two
// instructions per vector. A block of 32 values is summed as integers, then scaled and added as floats. Quantized weights
// have other tiles with i8mm (quant-gemm-tile-i8mm.cpp).

#include "quant-gemm-panel.h"

#include <algorithm>
#include <utility>

namespace quant_gemm {

#if QUANT_GEMM_KERNELS

// Columns of a tile, so that its sums are in registers. AVX-512 has 32 of them: 12 integer and 12 float sums. NEON has 32
// too, but 4 columns of activations take four, and scales need some. Of the 16 of AVX2, integer sums take 6 or 8; float
// sums and products of 16 bits share the others.
static constexpr int TILE_COLUMNS       = QUANT_GEMM_AVX512 ? 6 : SUMS_OF_16_BITS ? 3 : 4;
static constexpr int TILE_COLUMNS_PLAIN = !QUANT_GEMM_AVX2 ? 8 : 6;  // bf16 and f16: 16 or 12 float sums

// Values of each vector of rows for each column.
template <int N_C> using IntGrid   = Ints[N_C][TILE_VECTORS];
template <int N_C> using FloatGrid = Floats[N_C][TILE_VECTORS];

template <int N_C> static inline void load_columns(const char * const * columns, const char * (&act)[N_C]) {
#pragma GCC                           unroll 8
    for (int c = 0; c < N_C; c++) {
        act[c] = columns[c];
    }
}

// Moves on to the next panel and its activations; false if there is none.
template <Scheme SCHEME, int N_C>
static inline bool next_panel(const Panel *& panels, int & n_blocks, const char * (&act)[N_C]) {
    if (MAX_PANELS == 1) {
        return false;
    }
    panels++;
    n_blocks -= panel_blocks(SCHEME);
#pragma GCC unroll 8
    for (int c = 0; c < N_C; c++) {
        act[c] += act_row_size(SCHEME, panel_blocks(SCHEME) * BLOCK);
    }
    return n_blocks > 0;
}

// Whether the tiles of the first panels set the sums. Otherwise the sums are set to zero before; NEON has few registers.
static constexpr bool SETS_SUMS = !QUANT_GEMM_NEON;

// first: the sums are not in memory yet, and zero
template <int N_C> static inline void load_sums(const float * sums, bool first, FloatGrid<N_C> & f) {
#pragma GCC                           unroll 8
    for (int c = 0; c < N_C; c++) {
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) {
            f[c][v] = SETS_SUMS && first ? floats(0.0f) : load_floats(sums + c * PANEL_ROWS + v * LANES);
        }
    }
}

template <int N_C> static inline void store_sums(const FloatGrid<N_C> & f, float * sums) {
#pragma GCC                           unroll 8
    for (int c = 0; c < N_C; c++) {
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) {
            store_floats(sums + c * PANEL_ROWS + v * LANES, f[c][v]);
        }
    }
}

// Whether the 32-bit sums of products start at a number in the activations; not where the quants in panels are signed.
static constexpr bool sums_start(Scheme scheme) {
    return has_starts(scheme) && !SIGNED_PANELS;
}

// All sums of a column start at the number in its activations.
template <int N_C> static inline void start_sums(IntGrid<N_C> & z, const char * const (&act)[N_C], int offset) {
#pragma GCC                           unroll 8
    for (int c = 0; c < N_C; c++) {
        z[c][0] = broadcast_ints(act[c] + offset);
        z[c][1] = z[c][0];
    }
}

// Adds groups I of four values of K to the sums; acts: four groups of each column.
template <Codes CODES, int N_C, int... I>
static inline void add_some_groups(IntGrid<N_C> &  z,
                                   const uint8_t * weights,
                                   const FourGroups (&acts)[N_C],
                                   std::integer_sequence<int, I...>) {
    const auto load = [&](int i, int v) {
        return in_order(load_ints(weights + i * PANEL_ROWS * 4 + v * sizeof(Ints)));
    };
    Ints       next[TILE_VECTORS] = { load(0, 0), load(0, 1) };
    const auto add_group          = [&](auto i) {
        const Ints w0 = next[0];
        const Ints w1 = next[1];
        if constexpr (i + 1 < sizeof...(I)) {
            next[0] = load(i + 1, 0);
            next[1] = load(i + 1, 1);
        }
#pragma GCC unroll 8
        for (int c = 0; c < N_C; c++) {
            const auto a = group_of<i>(acts[c]);
            z[c][0]      = in_order(add_products<CODES>(z[c][0], w0, a));
            z[c][1]      = in_order(add_products<CODES>(z[c][1], w1, a));
        }
    };
    (add_group(std::integral_constant<int, I>()), ...);
}

// Adds N_G groups of four values of K to the sums.
template <Codes CODES, int N_C, int N_G>
static inline void add_groups(IntGrid<N_C> & z, const uint8_t * weights, const char * const (&act)[N_C], int offset) {
    constexpr int TOGETHER = std::min(N_G, 4);
#pragma GCC unroll 2
    for (int g = 0; g < N_G; g += TOGETHER) {
        FourGroups acts[N_C];
#pragma GCC unroll 8
        for (int c = 0; c < N_C; c++) {
            acts[c] = load_groups(act[c] + offset + 4 * g);
        }
        add_some_groups<CODES, N_C>(z, weights + g * PANEL_ROWS * 4, acts, std::make_integer_sequence<int, TOGETHER>());
    }
}

template <int N_C> static inline void add_times(IntGrid<N_C> & to, const IntGrid<N_C> & sums, const int32_t * factors) {
    const Ints f0 = load_ints(factors);
    const Ints f1 = load_ints(factors + LANES);
#pragma GCC unroll 8
    for (int c = 0; c < N_C; c++) {
        to[c][0] = in_order(add_32(to[c][0], total_times(sums[c][0], f0)));
        to[c][1] = in_order(add_32(to[c][1], total_times(sums[c][1], f1)));
    }
}

// Integer sums of a block of 32 values.
template <Codes CODES, int N_C>
static inline void
sum_block(IntGrid<N_C> & z, const uint8_t * weights, const char * const (&act)[N_C], int offset, int start) {
    constexpr int STEP = groups_together(CODES);
    if constexpr (!SUMS_OF_16_BITS) {
        if constexpr (sums_start(Scheme::q8_0)) {
            start_sums<N_C>(z, act, start);
        } else {
            clear(z);
        }
        add_groups<CODES, N_C, STEP>(z, weights, act, offset);
    } else {
        constexpr bool STARTS = CODES != Codes::bytes;  // the start of signed bytes is 0
        if constexpr (STARTS) {
            start_sums<N_C>(z, act, start);
        }
#pragma GCC unroll 8
        for (int g = 0; g < N_GROUPS; g += STEP) {
            IntGrid<N_C> s;
            clear(s);
            add_groups<CODES, N_C, STEP>(s, weights + g * PANEL_ROWS * 4, act, offset + g * 4);
#pragma GCC unroll 8
            for (int c = 0; c < N_C; c++) {
#pragma GCC unroll 2
                for (int v = 0; v < TILE_VECTORS; v++) {
                    const Ints total = total_of(s[c][v]);
                    z[c][v]          = in_order(STARTS || g > 0 ? add_32(z[c][v], total) : total);
                }
            }
        }
    }
}

// a scale per 32 weights and per 32 activations
template <Codes CODES, int N_C>
static void
tile_q8_0(const Panel * panels, int row, int n_blocks, const char * const * columns, bool first, float * sums) {
    Floats       f[N_C][TILE_VECTORS];
    const char * act[N_C];
    load_columns(columns, act);
    load_sums<N_C>(sums, first, f);
    do {
        const uint8_t * weights = panels->codes[0][0][row];
        const float *   scales  = panels->scales[0] + row;
        for (int b = 0; b < std::min(n_blocks, N_BLOCKS); b++) {
            IntGrid<N_C> z;
            sum_block<CODES, N_C>(z, weights, act, BLOCK * b, (int) offsetof(ActBlocks, starts) + 4 * b);
            const Floats d0 = load_floats(scales);
            const Floats d1 = load_floats(scales + LANES);
#pragma GCC unroll 8
            for (int c = 0; c < N_C; c++) {
                const Floats d = broadcast_floats(act[c] + offsetof(ActBlocks, scales) + 4 * b);
                f[c][0]        = add_block(f[c][0], z[c][0], d0, d);
                f[c][1]        = add_block(f[c][1], z[c][1], d1, d);
            }
            weights += BLOCK * PANEL_ROWS;
            scales += PANEL_ROWS;
        }
    } while (next_panel<Scheme::q8_0>(panels, n_blocks, act));
    store_sums<N_C>(f, sums);
}

// Integer sums of products of N minima with the sums of quants that begin at SUMS in the activations.
#if QUANT_GEMM_NEON

// Minima are bytes, in the order of a group of weights. A sum is 256 times its upper byte plus its lower one, which is
// signed, too.
template <int N, size_t SUMS, int N_C>
static inline void sum_minima(const Panel & panel, int row, const char * const (&act)[N_C], IntGrid<N_C> & z) {
    FourGroups low[N_C], high[N_C];
#pragma GCC unroll 8
    for (int c = 0; c < N_C; c++) {
        const Ints a = load_ints(act[c] + SUMS);
        const Ints b = N == 16 ? load_ints(act[c] + SUMS + sizeof(Ints)) : a;
        low[c]       = to_8(lower_bytes(a, b));
        high[c]      = to_8(upper_bytes(add_16(a, 128), add_16(b, 128)));
    }
    const uint8_t * minima = (const uint8_t *) panel.minima_in_bytes[0][row];
    const auto      groups = std::make_integer_sequence<int, N / MINIMA_TOGETHER>();
    clear(z);
    add_some_groups<Codes::bytes, N_C>(z, minima, high, groups);
#pragma GCC unroll 8
    for (int c = 0; c < N_C; c++) {
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) {
            z[c][v] = vshlq_n_s32(z[c][v], 8);
        }
    }
    add_some_groups<Codes::bytes, N_C>(z, minima, low, groups);
}

#else

template <int N, size_t SUMS, int N_C>
static inline void sum_minima(const Panel & panel, int row, const char * const (&act)[N_C], IntGrid<N_C> & z) {
    clear(z);
#pragma GCC unroll 8
    for (int pair = 0; pair < N / 2; pair++) {
        const Ints m0 = load_ints(panel.minima[pair][row]);
        const Ints m1 = load_ints(panel.minima[pair][row + LANES]);
#pragma GCC unroll 8
        for (int c = 0; c < N_C; c++) {
            const Ints a = broadcast_ints(act[c] + SUMS + 4 * pair);
            z[c][0]      = add_pairs(z[c][0], m0, a);
            z[c][1]      = add_pairs(z[c][1], m1, a);
        }
    }
}

#endif

// 256 values: a factor for some weights (for all: panels hold quants times factors); minima, or none
template <Scheme SCHEME, Codes CODES, int N_C>
static void
tile_q8_K(const Panel * panels, int row, int n_blocks, const char * const * columns, bool first, float * sums) {
    constexpr int SUB     = weights_per_factor(SCHEME);
    constexpr int MIN_SUB = weights_per_minimum(SCHEME);
    constexpr int STEP    = std::min(4 * groups_together(CODES), std::min(SUB, BLOCK));
    constexpr int STARTS  = SUB == SLICE ? offsetof(ActSuperBlock, start) : offsetof(ActSuperBlock, starts);
    const char *  act[N_C];
    load_columns(columns, act);
    do {
        const Panel & panel = *panels;
        IntGrid<N_C>  products;
        clear(products);
        const uint8_t * weights = panel.codes[0][0][row];
        const int32_t * factors = panel.factors[0] + row;
        IntGrid<N_C>    s;
        clear(s);
        for (int b = 0; b < SLICE / SUB; b++) {
            if constexpr (sums_start(SCHEME)) {
                start_sums<N_C>(s, act, STARTS + 4 * b);
            }
#pragma GCC unroll 8
            for (int k = 0; k < SUB; k += STEP) {
                add_groups<CODES, N_C, STEP / 4>(s, weights + k * PANEL_ROWS, act, SUB * b + k);
                if (SUB != SLICE && (SUMS_OF_16_BITS || k + STEP == SUB)) {
                    add_times<N_C>(products, s, factors);
                    if (!FACTOR_DIFFERENCES) {
                        clear(s);
                    }
                }
            }
            if constexpr (SUB == SLICE) {
                memcpy(products, s, sizeof(s));
            }
            weights += SUB * PANEL_ROWS;
            factors += PANEL_ROWS;
        }
        IntGrid<N_C> minima;
        if constexpr (MIN_SUB != 0) {
            constexpr size_t SUMS = MIN_SUB == 16 ? offsetof(ActSuperBlock, sums_16) : offsetof(ActSuperBlock, sums);
            sum_minima<SLICE / MIN_SUB, SUMS, N_C>(panel, row, act, minima);
        }
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) {
            const Floats d = load_floats(panel.super_scales + row + LANES * v);
#pragma GCC unroll 8
            for (int c = 0; c < N_C; c++) {
                const Floats scale = broadcast_floats(act[c] + offsetof(ActSuperBlock, scale));
                float *      to    = sums + c * PANEL_ROWS + LANES * v;
                const Floats sum   = SETS_SUMS && first ? floats(0.0f) : load_floats(to);
                const Ints   whole = products[c][v];
                if constexpr (MIN_SUB == 0) {
                    store_floats(to, add_super_block(sum, whole, d, scale));
                    continue;
                }
                const Ints less = minima[c][v];
                if constexpr (has_minima(SCHEME)) {
                    const Floats dmin = load_floats(panel.minimum_scales + row + LANES * v);
                    store_floats(to, add_super_block(sum, whole, d, less, dmin, scale));
                } else {
                    store_floats(to, add_super_block(sum, sub_32(whole, less), d, scale));
                }
            }
        }
        first = false;
    } while (next_panel<SCHEME>(panels, n_blocks, act));
}

#if QUANT_GEMM_BF16

template <int N_C>
static void
tile_bf16(const Panel * panels, int row, int n_blocks, const char * const * columns, bool first, float * sums) {
    Floats       f[N_C][TILE_VECTORS];
    const char * act[N_C];
    load_columns(columns, act);
    load_sums<N_C>(sums, first, f);
    constexpr int MOST = panel_blocks(Scheme::bf16);
    do {
        const uint16_t * weights = panels->pairs[0][0][row];
        for (int p = 0; p < std::min(n_blocks, MOST) * N_PAIRS; p++) {
            const __m512bh w0 = (__m512bh) load_ints(weights + p * PANEL_ROWS * 2);
            const __m512bh w1 = (__m512bh) load_ints(weights + p * PANEL_ROWS * 2 + 32);
#pragma GCC unroll 8
            for (int c = 0; c < N_C; c++) {
                const __m512bh a = (__m512bh) broadcast_ints(act[c] + p * 4);
                f[c][0]          = _mm512_dpbf16_ps(f[c][0], w0, a);
                f[c][1]          = _mm512_dpbf16_ps(f[c][1], w1, a);
            }
        }
    } while (next_panel<Scheme::bf16>(panels, n_blocks, act));
    store_sums<N_C>(f, sums);
}

#endif

// 16-bit numbers that WIDEN makes float32, as activations are.
template <Floats (*WIDEN)(const void *), int N_C>
static void
tile_halves(const Panel * panels, int row, int n_blocks, const char * const * columns, bool first, float * sums) {
    Floats       f[N_C][TILE_VECTORS];
    const char * act[N_C];
    load_columns(columns, act);
    load_sums<N_C>(sums, first, f);
    // activations are float32 for both types
    static_assert(QUANT_GEMM_BF16 || act_row_size(Scheme::bf16, BLOCK) == act_row_size(Scheme::f16, BLOCK), "");
    constexpr int MOST = panel_blocks(Scheme::f16);
    do {
        for (int k = 0; k < std::min(n_blocks, MOST) * BLOCK; k += 4) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const Floats w0 = WIDEN(panels->halves[k / 2 + i / 2][row / LANES][i % 2]);
                const Floats w1 = WIDEN(panels->halves[k / 2 + i / 2][row / LANES + 1][i % 2]);
#pragma GCC unroll 8
                for (int c = 0; c < N_C; c++) {
                    const Floats a = broadcast_floats(act[c] + (k + i) * sizeof(float));
                    f[c][0]        = fma(w0, a, f[c][0]);
                    f[c][1]        = fma(w1, a, f[c][1]);
                }
            }
        }
    } while (next_panel<Scheme::f16>(panels, n_blocks, act));
    store_sums<N_C>(f, sums);
}

// Panels that follow each other in K, of n_blocks blocks in all. first: the sums are set, otherwise they are added to.
using Tile =
    void (*)(const Panel * panels, int row, int n_blocks, const char * const * columns, bool first, float * sums);

template <Scheme SCHEME, Codes CODES, int N_C>
static void tile(const Panel * panels, int row, int n_blocks, const char * const * columns, bool first, float * sums) {
    if constexpr (SCHEME == Scheme::q8_0) {
        tile_q8_0<CODES, N_C>(panels, row, n_blocks, columns, first, sums);
    } else if constexpr (SCHEME == Scheme::bf16) {
#if QUANT_GEMM_BF16
        tile_bf16<N_C>(panels, row, n_blocks, columns, first, sums);
#else
        tile_halves<from_bf16, N_C>(panels, row, n_blocks, columns, first, sums);
#endif
    } else if constexpr (SCHEME == Scheme::f16) {
        tile_halves<from_halves, N_C>(panels, row, n_blocks, columns, first, sums);
    } else {
        tile_q8_K<SCHEME, CODES, N_C>(panels, row, n_blocks, columns, first, sums);
    }
}

template <Scheme SCHEME, Codes CODES, int... N> static const Tile * tiles_of_columns(std::integer_sequence<int, N...>) {
    static const Tile all[] = { tile<SCHEME, CODES, N + 1>... };
    return all;
}

// The tiles of 1, 2, ... columns. Where sums have 32 bits, all quants have the same.
template <Scheme SCHEME, Codes CODES> static const Tile * tiles() {
    constexpr int MOST = is_plain(SCHEME) ? TILE_COLUMNS_PLAIN : TILE_COLUMNS;
    return tiles_of_columns<SCHEME, SUMS_OF_16_BITS ? CODES : Codes::bytes>(std::make_integer_sequence<int, MOST>());
}

static const Tile * tiles_of(const Format & format) {
    switch (format.scheme) {
#if !QUANT_GEMM_I8MM
    case Scheme::q8_0:
        return format.codes == Codes::below_16   ? tiles<Scheme::q8_0, Codes::below_16>()
               : format.codes == Codes::below_32 ? tiles<Scheme::q8_0, Codes::below_32>()
                                                 : tiles<Scheme::q8_0, Codes::bytes>();
    case Scheme::q8_K:
        return tiles<Scheme::q8_K, Codes::bytes>();
    case Scheme::q8_K_16:
        return format.codes == Codes::below_8 ? tiles<Scheme::q8_K_16, Codes::below_8>()
                                              : tiles<Scheme::q8_K_16, Codes::below_64>();
    case Scheme::q8_K_mins:
        return format.codes == Codes::below_16 ? tiles<Scheme::q8_K_mins, Codes::below_16>()
                                               : tiles<Scheme::q8_K_mins, Codes::below_32>();
    case Scheme::q8_K_16_mins:
        return tiles<Scheme::q8_K_16_mins, Codes::below_8>();
#endif
#if QUANT_GEMM_AVX512
    case Scheme::q8_K_256:
        return tiles<Scheme::q8_K_256, Codes::bytes>();
    case Scheme::q8_K_256_mins:
        return tiles<Scheme::q8_K_256_mins, Codes::bytes>();
#endif
    case Scheme::bf16:
        return tiles<Scheme::bf16, Codes::bytes>();
    case Scheme::f16:
        return tiles<Scheme::f16, Codes::bytes>();
    default:
        GGML_ABORT("no tile");
    }
}

void multiply(const Format & format,
              const Panel *  panels,
              int            n_blocks,
              Columns        columns,
              const Ahead &  ahead,
              bool           first_panels,
              float *        sums) {
    const bool   in_pairs = QUANT_GEMM_I8MM && !is_plain(format.scheme);
    const Tile * tiles    = in_pairs ? nullptr : tiles_of(format);
    const int    most     = is_plain(format.scheme) ? TILE_COLUMNS_PLAIN : TILE_COLUMNS;
    const int    n_tiles  = (columns.n + most - 1) / most;
    for (int t = 0; t < n_tiles; t++) {
        const int first = in_pairs ? most * t : columns.n * t / n_tiles;
        const int end   = in_pairs ? std::min(first + most, columns.n) : columns.n * (t + 1) / n_tiles;
        prefetch_share(ahead, t, n_tiles);
        if (!SETS_SUMS && first_panels) {
            std::fill(sums + first * PANEL_ROWS, sums + end * PANEL_ROWS, 0.0f);
        }
#if QUANT_GEMM_I8MM
        if (in_pairs) {
            multiply_i8mm(format, *panels, n_blocks, { columns.at + first, end - first }, sums + first * PANEL_ROWS);
            continue;
        }
#endif
        for (int row = 0; row < PANEL_ROWS; row += TILE_VECTORS * LANES) {
            tiles[end - first - 1](panels, row, n_blocks, columns.at + first, first_panels,
                                   sums + first * PANEL_ROWS + row);
        }
    }
}

#endif

}  // namespace quant_gemm
