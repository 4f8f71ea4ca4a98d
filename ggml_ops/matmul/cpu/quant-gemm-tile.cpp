// The tiles: a panel of 32 weight rows times one to six activation rows, with the sums in registers.
//
// For each four values of K there are two loads of weights; each activation row takes one broadcast and two
// instructions of 64 multiplications. A block of 32 values is summed as integers, then scaled and added as floats.

#include "quant-gemm-panel.h"

namespace quant_gemm {

#if QUANT_GEMM_VNNI

static constexpr int TILE_COLUMNS       = 6;  // 12 integer and 12 float sums, out of 32 registers
static constexpr int TILE_COLUMNS_PLAIN = 8;  // bf16 and f16: 16 float sums

static inline __m512i broadcast32(const char * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return _mm512_set1_epi32(x);
}

static inline __m512 broadcast_float(const char * p) {
    return _mm512_castsi512_ps(broadcast32(p));
}

template <int N_C> static inline void load_columns(const char * const * columns, const char * (&act)[N_C]) {
#pragma GCC                           unroll 8
    for (int c = 0; c < N_C; c++) {
        act[c] = columns[c];
    }
}

template <int N_C> static inline void load_sums(const float * sums, __m512 (&f)[N_C][2]) {
#pragma GCC                           unroll 8
    for (int c = 0; c < N_C; c++) {
        f[c][0] = _mm512_load_ps(sums + c * PANEL_ROWS);
        f[c][1] = _mm512_load_ps(sums + c * PANEL_ROWS + 16);
    }
}

template <int N_C> static inline void store_sums(const __m512 (&f)[N_C][2], float * sums) {
#pragma GCC                           unroll 8
    for (int c = 0; c < N_C; c++) {
        _mm512_store_ps(sums + c * PANEL_ROWS, f[c][0]);
        _mm512_store_ps(sums + c * PANEL_ROWS + 16, f[c][1]);
    }
}

// Adds N_G groups of four values of K to the integer sums.
template <int N_C, int N_G>
static inline void
add_groups(__m512i (&z)[N_C][2], const uint8_t * weights, const char * const (&act)[N_C], int offset) {
#pragma GCC unroll 8
    for (int g = 0; g < N_G; g++) {
        const __m512i w0 = _mm512_load_si512(weights + g * PANEL_ROWS * 4);
        const __m512i w1 = _mm512_load_si512(weights + g * PANEL_ROWS * 4 + 64);
#pragma GCC unroll 8
        for (int c = 0; c < N_C; c++) {
            const __m512i a = broadcast32(act[c] + offset + g * 4);
            z[c][0]         = _mm512_dpbusd_epi32(z[c][0], w0, a);
            z[c][1]         = _mm512_dpbusd_epi32(z[c][1], w1, a);
        }
    }
}

template <int N_C> static inline void start_sums(__m512i (&z)[N_C][2], const char * const (&act)[N_C], int offset) {
#pragma GCC                           unroll 8
    for (int c = 0; c < N_C; c++) {
        z[c][0] = broadcast32(act[c] + offset);
        z[c][1] = z[c][0];
    }
}

// a scale per 32 weights and per 32 activations
template <int N_C>
static void tile_q8_0(const Panel & panel, int n_blocks, const char * const * columns, float * sums) {
    __m512       f[N_C][2];
    const char * act[N_C];
    load_columns(columns, act);
    load_sums(sums, f);
    const uint8_t * weights = &panel.codes[0][0][0][0];
    const float *   scales  = panel.scales[0];
    for (int b = 0; b < n_blocks; b++) {
        __m512i z[N_C][2];
        start_sums<N_C>(z, act, (int) offsetof(ActBlocks, starts) + 4 * b);
        add_groups<N_C, N_GROUPS>(z, weights, act, BLOCK * b);
        const __m512 d0 = _mm512_load_ps(scales);
        const __m512 d1 = _mm512_load_ps(scales + 16);
#pragma GCC unroll 8
        for (int c = 0; c < N_C; c++) {
            const __m512 d = broadcast_float(act[c] + offsetof(ActBlocks, scales) + 4 * b);
            f[c][0]        = add_block(f[c][0], z[c][0], d0, d);
            f[c][1]        = add_block(f[c][1], z[c][1], d1, d);
        }
        weights += BLOCK * PANEL_ROWS;
        scales += PANEL_ROWS;
    }
    store_sums(f, sums);
}

// 256 values: a factor per SUB weights (256: panels hold quants times factors); a minimum per MIN_SUB, or none (0)
template <int N_C, int SUB, int MIN_SUB>
static void tile_q8_K(const Panel & panel, const char * const * columns, float * sums) {
    constexpr int STEP             = SUB < BLOCK ? SUB : BLOCK;
    constexpr int STARTS           = SUB == SLICE ? offsetof(ActSuperBlock, start) : offsetof(ActSuperBlock, starts);
    __m512i       products[N_C][2] = {};
    const char *  act[N_C];
    load_columns(columns, act);
    const uint8_t * weights = &panel.codes[0][0][0][0];
    const int32_t * factors = panel.factors[0];
    for (int b = 0; b < SLICE / SUB; b++) {
        __m512i z[N_C][2] = {};
        if (MIN_SUB == 0) {  // types with a minimum are already unsigned
            start_sums<N_C>(z, act, STARTS + 4 * b);
        }
        for (int k = 0; k < SUB; k += STEP) {
            add_groups<N_C, STEP / 4>(z, weights + k * PANEL_ROWS, act, SUB * b + k);
        }
        const __m512i f0 = _mm512_load_si512(factors);
        const __m512i f1 = _mm512_load_si512(factors + 16);
#pragma GCC unroll 8
        for (int c = 0; c < N_C; c++) {
            products[c][0] = SUB == SLICE ? z[c][0] : _mm512_add_epi32(products[c][0], _mm512_mullo_epi32(z[c][0], f0));
            products[c][1] = SUB == SLICE ? z[c][1] : _mm512_add_epi32(products[c][1], _mm512_mullo_epi32(z[c][1], f1));
        }
        weights += SUB * PANEL_ROWS;
        factors += PANEL_ROWS;
    }
    __m512i minima[N_C][2] = {};
    if constexpr (MIN_SUB != 0) {
        constexpr size_t SUMS = MIN_SUB == 16 ? offsetof(ActSuperBlock, sums_16) : offsetof(ActSuperBlock, sums);
#pragma GCC unroll 8
        for (int pair = 0; pair < SLICE / MIN_SUB / 2; pair++) {
            const __m512i m0 = _mm512_load_si512(&panel.minima[pair][0]);
            const __m512i m1 = _mm512_load_si512(&panel.minima[pair][16]);
#pragma GCC unroll 8
            for (int c = 0; c < N_C; c++) {
                const __m512i a = broadcast32(act[c] + SUMS + 4 * pair);
                minima[c][0]    = _mm512_dpwssd_epi32(minima[c][0], m0, a);
                minima[c][1]    = _mm512_dpwssd_epi32(minima[c][1], m1, a);
            }
        }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m512 d    = _mm512_load_ps(panel.super_scales + 16 * half);
        const __m512 dmin = MIN_SUB != 0 ? _mm512_load_ps(panel.minimum_scales + 16 * half) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int c = 0; c < N_C; c++) {
            const __m512 scale = broadcast_float(act[c] + offsetof(ActSuperBlock, scale));
            float *      to    = sums + c * PANEL_ROWS + 16 * half;
            const __m512 sum   = _mm512_load_ps(to);
            if constexpr (MIN_SUB != 0) {
                _mm512_store_ps(to, add_super_block(sum, products[c][half], d, minima[c][half], dmin, scale));
            } else {
                _mm512_store_ps(to, add_super_block(sum, products[c][half], d, scale));
            }
        }
    }
}

#if defined(__AVX512BF16__)

template <int N_C>
static void tile_bf16(const Panel & panel, int n_blocks, const char * const * columns, float * sums) {
    __m512       f[N_C][2];
    const char * act[N_C];
    load_columns(columns, act);
    load_sums(sums, f);
    const uint16_t * weights = &panel.pairs[0][0][0][0];
    for (int p = 0; p < n_blocks * N_PAIRS; p++) {
        const __m512bh w0 = (__m512bh) _mm512_load_si512(weights + p * PANEL_ROWS * 2);
        const __m512bh w1 = (__m512bh) _mm512_load_si512(weights + p * PANEL_ROWS * 2 + 32);
#pragma GCC unroll 8
        for (int c = 0; c < N_C; c++) {
            const __m512bh a = (__m512bh) broadcast32(act[c] + p * 4);
            f[c][0]          = _mm512_dpbf16_ps(f[c][0], w0, a);
            f[c][1]          = _mm512_dpbf16_ps(f[c][1], w1, a);
        }
    }
    store_sums(f, sums);
}

#else

template <int N_C> static void tile_bf16(const Panel &, int, const char * const *, float *) {}  // never called

#endif

template <int N_C> static void tile_f16(const Panel & panel, int n_blocks, const char * const * columns, float * sums) {
    __m512       f[N_C][2];
    const char * act[N_C];
    load_columns(columns, act);
    load_sums(sums, f);
    for (int k = 0; k < n_blocks * BLOCK; k += 4) {
#pragma GCC unroll 4
        for (int i = k; i < k + 4; i++) {
            const __m512 w0 = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *) panel.halves[i / 2][0][i % 2]));
            const __m512 w1 = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *) panel.halves[i / 2][1][i % 2]));
#pragma GCC unroll 8
            for (int c = 0; c < N_C; c++) {
                const __m512 a = broadcast_float(act[c] + i * sizeof(float));
                f[c][0]        = _mm512_fmadd_ps(w0, a, f[c][0]);
                f[c][1]        = _mm512_fmadd_ps(w1, a, f[c][1]);
            }
        }
    }
    store_sums(f, sums);
}

template <int N_C>
static void tile(Scheme scheme, const Panel & panel, int n_blocks, const char * const * columns, float * sums) {
    switch (scheme) {
    case Scheme::q8_0:
        return tile_q8_0<N_C>(panel, n_blocks, columns, sums);
    case Scheme::q8_K:
        return tile_q8_K<N_C, 32, 0>(panel, columns, sums);
    case Scheme::q8_K_16:
        return tile_q8_K<N_C, 16, 0>(panel, columns, sums);
    case Scheme::q8_K_mins:
        return tile_q8_K<N_C, 32, 32>(panel, columns, sums);
    case Scheme::q8_K_256:
        return tile_q8_K<N_C, 256, 0>(panel, columns, sums);
    case Scheme::q8_K_256_mins:
        return tile_q8_K<N_C, 256, 16>(panel, columns, sums);
    case Scheme::bf16:
        return tile_bf16<N_C>(panel, n_blocks, columns, sums);
    case Scheme::f16:
        return tile_f16<N_C>(panel, n_blocks, columns, sums);
    }
}

void multiply(Scheme scheme, const Panel & panel, int n_blocks, Columns columns, const Ahead & ahead, float * sums) {
    using Tile                = void (*)(Scheme, const Panel &, int, const char * const *, float *);
    static const Tile tiles[] = { nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8> };
    const bool        plain   = scheme == Scheme::bf16 || scheme == Scheme::f16;
    const int         most    = plain ? TILE_COLUMNS_PLAIN : TILE_COLUMNS;
    const int         n_tiles = (columns.n + most - 1) / most;
    for (int t = 0; t < n_tiles; t++) {
        const int first = columns.n * t / n_tiles;
        const int end   = columns.n * (t + 1) / n_tiles;
        for (size_t i = ahead.size * t / n_tiles; i < ahead.size * (t + 1) / n_tiles; i += CACHE_LINE) {
            __builtin_prefetch(ahead.first + i);
        }
        tiles[end - first](scheme, panel, n_blocks, columns.at + first, sums + first * PANEL_ROWS);
    }
}

#endif

}  // namespace quant_gemm
