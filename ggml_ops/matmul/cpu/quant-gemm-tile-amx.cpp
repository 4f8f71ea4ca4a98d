// The tiles for AMX: up to 16 columns by the rows of a panel, in tile registers; for K types and BF16.
//
// Panels of K types hold quants times factors, so one sum covers 256 weights. A product that does not fit in a byte is
// split; its upper part is in a second plane. Integer sums are stored by tile registers and scaled by vector instructions,
// with the float operations of the other kernels, so the results have their bits. BF16 has no scales; its sums stay in tile
// registers for a panel.

#include "quant-gemm-amx.h"
#include "quant-gemm-panel.h"

#include <algorithm>

#if QUANT_GEMM_AMX && !defined(AMX_EMULATED)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quant_gemm {

#if QUANT_GEMM_AMX

static bool ask_for_tiles() {
    if (!environment_switch("KIMI_AMX", true)) {
        return false;
    }
#if defined(AMX_EMULATED)
    return true;
#else
    constexpr unsigned REQUIRED = 1u << 22 | 1u << 24 | 1u << 25;  // CPUID 7, EDX: AMX-BF16, AMX-TILE, AMX-INT8
    unsigned           a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & REQUIRED) != REQUIRED) {
        return false;
    }
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#endif
}

bool has_tiles() {
    static const bool has = ask_for_tiles();
    return has;
}

// Columns are multiplied in units of nearly the same size.
static int count_units(int n_columns) {
    return (n_columns + REGISTER_ROWS - 1) / REGISTER_ROWS;
}

static int columns_of_unit(int n_columns) {
    return (n_columns + count_units(n_columns) - 1) / count_units(n_columns);
}

constexpr bool has_second_plane(Scheme scheme) {
    return scheme == Scheme::q8_K || scheme == Scheme::q8_K_16 || scheme == Scheme::q8_K_mins;
}

// Minima are multiplied by tile products, too, in the second plane.
constexpr bool has_plane_of_minima(Scheme scheme) {
    return scheme == Scheme::q8_K_256_mins;
}

// Copies what is multiplied of a column: tiles are loaded from rows at equal distances, faster if none crosses a cache line.
template <Scheme SCHEME> static inline void place_column(const char * column, int n_bytes, int c, TileUnit & unit) {
    for (int i = 0; i < n_bytes; i += 64) {
        store_ints(unit.acts[c] + i, _mm512_loadu_si512(column + i));
    }
    if constexpr (!is_plain(SCHEME)) {
        const ActSuperBlock & act = *(const ActSuperBlock *) column;
        unit.scales[c]            = act.scale;
        unit.starts[c]            = act.start;
        if constexpr (SCHEME == Scheme::q8_K_mins) {
            memcpy(unit.sums[c], act.sums, sizeof(act.sums));
        } else if constexpr (has_plane_of_minima(SCHEME)) {
            // A sum is 64 * high + low. Minima are multiplied by low and, 16 times as large, by 4 * high.
            const __m128i order  = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
            const __m128i sums[] = { _mm_loadu_si128((const __m128i *) act.sums_16),
                                     _mm_loadu_si128((const __m128i *) act.sums_16 + 1) };
            const auto    low    = [](__m128i x) { return _mm_and_si128(x, _mm_set1_epi16(63)); };
            const auto    high   = [](__m128i x) { return _mm_slli_epi16(_mm_srai_epi16(x, 6), 2); };
            const auto    store  = [&](int at, __m128i first, __m128i second) {
                const __m128i bytes = _mm_shuffle_epi8(_mm_packs_epi16(first, second), order);
                _mm_store_si128((__m128i *) (unit.sums[c] + at), bytes);
            };
            store(0, low(sums[0]), low(sums[1]));
            store(16, high(sums[0]), high(sums[1]));
            memset(unit.sums[c] + 32, 0, sizeof(unit.sums[c]) - 32);
        }
    }
}

constexpr size_t GROUP_STRIDE = PANEL_ROWS * 4;
constexpr size_t SUM_STRIDE   = PANEL_ROWS * sizeof(int32_t);

template <int C, bool UNSIGNED> static inline void add_bytes() {
    if constexpr (UNSIGNED) {
        add_unsigned<C, ACTS, WEIGHTS>();
    } else {
        add_signed<C, ACTS, WEIGHTS>();
    }
}

// Adds products of 64 values of K to registers C and C + 1, one for each vector of rows. weights: of these values.
template <int C, bool UNSIGNED> static inline void add_values(const uint8_t (*weights)[PANEL_ROWS][4]) {
    load_tile<WEIGHTS>(weights[0][0], GROUP_STRIDE);
    add_bytes<C, UNSIGNED>();
    load_tile<WEIGHTS>(weights[0][LANES], GROUP_STRIDE);
    add_bytes<C + 1, UNSIGNED>();
}

// The integer sums of both planes, in registers.
template <Scheme SCHEME> static inline void multiply_super_block(const TilePanel & panel, const TileUnit & unit) {
    constexpr int UPPER = SUMS + PANEL_VECTORS;
    clear_tile<SUMS>();
    clear_tile<SUMS + 1>();
    if constexpr (has_second_plane(SCHEME) || has_plane_of_minima(SCHEME)) {
        clear_tile<UPPER>();
        clear_tile<UPPER + 1>();
    }
    if constexpr (has_plane_of_minima(SCHEME)) {
        load_tile<ACTS>(unit.sums[0], sizeof(unit.sums[0]));
        add_values<UPPER, true>(panel.upper_codes[0]);
    }
#pragma GCC unroll 4
    for (int b = 0; b < N_BLOCKS; b += 2) {
        load_tile<ACTS>(unit.acts[0] + b * BLOCK, sizeof(unit.acts[0]));
        add_values<SUMS, true>(panel.codes[b]);
        if constexpr (has_second_plane(SCHEME)) {
            add_values<UPPER, has_minima(SCHEME)>(panel.upper_codes[b]);
        }
    }
}

template <Scheme SCHEME> static inline void store_sums(TileSums & z) {
    store_tile<SUMS>(z[0][0], SUM_STRIDE);
    store_tile<SUMS + 1>(z[0][0] + LANES, SUM_STRIDE);
    if constexpr (has_second_plane(SCHEME) || has_plane_of_minima(SCHEME)) {
        store_tile<SUMS + 2>(z[1][0], SUM_STRIDE);
        store_tile<SUMS + 3>(z[1][0] + LANES, SUM_STRIDE);
    }
}

// The integer sum of the minima of a vector of rows with the sums of a column's quants.
template <Scheme SCHEME>
static inline Ints sum_of_minima(const Panel & panel, int v, int c, const TileUnit & unit, const TileSums & z) {
    if constexpr (has_plane_of_minima(SCHEME)) {
        return load_ints(z[1][c] + v * LANES);
    }
    Ints sum = ints(0);
#pragma GCC unroll 4
    for (int pair = 0; pair < N_BLOCKS / 2; pair++) {
        int32_t two;
        memcpy(&two, unit.sums[c] + 4 * pair, sizeof(two));
        sum = add_pairs(sum, load_ints(panel.minima[pair][v * LANES]), ints(two));
    }
    return sum;
}

// Adds the scaled sums of column c.
template <Scheme SCHEME>
static inline void
scale_sums(const Panel & panel, int shift, int c, bool first, const TileUnit & unit, const TileSums & z, float * to) {
    const Floats scale = floats(unit.scales[c]);
#pragma GCC unroll 2
    for (int v = 0; v < PANEL_VECTORS; v++, to += LANES) {
        const Floats sum      = first ? floats(0.0f) : load_floats(to);
        const Floats d        = load_floats(panel.super_scales + v * LANES);
        Ints         products = load_ints(z[0][c] + v * LANES);
        if constexpr (has_second_plane(SCHEME)) {
            products = add_32(products, left_32(load_ints(z[1][c] + v * LANES), shift));
        }
        if constexpr (SCHEME == Scheme::q8_K_256) {
            products = add_32(products, ints(unit.starts[c]));
        }
        if constexpr (has_minima(SCHEME)) {
            const Ints   less = sum_of_minima<SCHEME>(panel, v, c, unit, z);
            const Floats dmin = load_floats(panel.minimum_scales + v * LANES);
            store_floats(to, add_super_block(sum, products, d, less, dmin, scale));
        } else {
            store_floats(to, add_super_block(sum, products, d, scale));
        }
    }
}

// Adds a slice of BF16 numbers to the sums.
static inline void multiply_bf16(const Panel & panel, int n_blocks, bool first, const TileUnit & unit, float * sums) {
    if (first) {
        clear_tile<SUMS>();
        clear_tile<SUMS + 1>();
    } else {
        load_tile<SUMS>(sums, SUM_STRIDE);
        load_tile<SUMS + 1>(sums + LANES, SUM_STRIDE);
    }
    for (int b = 0; b < n_blocks; b++) {
        load_tile<ACTS>(unit.acts[0] + b * BLOCK * sizeof(ggml_bf16_t), sizeof(unit.acts[0]));
        load_tile<WEIGHTS>(panel.pairs[b][0][0], GROUP_STRIDE);
        add_bf16<SUMS, ACTS, WEIGHTS>();
        load_tile<WEIGHTS>(panel.pairs[b][0][LANES], GROUP_STRIDE);
        add_bf16<SUMS + 1, ACTS, WEIGHTS>();
    }
    store_tile<SUMS>(sums, SUM_STRIDE);
    store_tile<SUMS + 1>(sums + LANES, SUM_STRIDE);
}

// Steps: a unit of columns by a slice of K, in the order of slices. Tile registers read what was written a step before, and
// vector instructions what tile registers stored a step before, because stores just made are not yet in the cache. While
// tiles are multiplied, one of the two units for float32 and vpdpbusd waits.
template <Scheme SCHEME> class Multiplication {
  public:
    Multiplication(
        const TileWeights & weights, Columns columns, const Ahead & ahead, float * sums, TileScratch & scratch) :
        weights(weights), columns(columns), ahead(ahead), sums(sums), scratch(scratch),
        n_slices((weights.n_blocks + BLOCKS - 1) / BLOCKS), n_units(count_units(columns.n)),
        unit_size(columns_of_unit(columns.n)), n_steps(n_slices * n_units) {}

    void run() {
        keep_tiles_awake();
        unpack(0);
        place(0);
        for (int64_t step = 0; step < n_steps; step++) {
            place(step + 1);
            prefetch_share(ahead, step, n_steps);
            const TilePanel & panel = scratch.panels[slice_of(step) % 2];
            const TileUnit &  unit  = scratch.units[step % 3];
            if constexpr (is_plain(SCHEME)) {
                multiply_bf16(panel, blocks(slice_of(step)), is_first(step), unit, sums_of(step));
            } else {
                multiply_super_block<SCHEME>(panel, unit);
                scale(step - 1);
            }
            if (step % n_units == 0) {  // the panel of the slice before is not needed any more
                unpack(slice_of(step) + 1);
            }
            if constexpr (!is_plain(SCHEME)) {
                store_sums<SCHEME>(scratch.sums);
            }
        }
        if constexpr (!is_plain(SCHEME)) {
            scale(n_steps - 1);
        }
    }

  private:
    static constexpr int BLOCKS       = panel_blocks(SCHEME);
    static constexpr int AWAKE_COLUMN = 8;  // keep_tiles_awake() after so many columns

    const TileWeights & weights;
    const Columns       columns;
    const Ahead &       ahead;
    float *             sums;
    TileScratch &       scratch;
    const int64_t       n_slices;
    const int           n_units;
    const int           unit_size;
    const int64_t       n_steps;

    int64_t slice_of(int64_t step) const { return step / n_units; }

    int blocks(int64_t slice) const { return (int) std::min<int64_t>(BLOCKS, weights.n_blocks - slice * BLOCKS); }

    bool is_first(int64_t step) const { return step < n_units; }

    int first_column(int64_t step) const { return (int) (step % n_units) * unit_size; }

    int n_columns(int64_t step) const { return std::min(unit_size, columns.n - first_column(step)); }

    float * sums_of(int64_t step) const { return sums + first_column(step) * PANEL_ROWS; }

    void unpack(int64_t slice) {
        if (slice < n_slices) {
            const TileWeights & w = weights;
            w.format.unpack_for_tiles(w.rows, w.stride, w.row, w.n_rows, slice * BLOCKS, blocks(slice),
                                      scratch.panels[slice % 2]);
        }
    }

    void place(int64_t step) {
        if (step >= n_steps) {
            return;
        }
        const int64_t slice   = slice_of(step);
        const int     n_bytes = blocks(slice) * BLOCK * (is_plain(SCHEME) ? sizeof(ggml_bf16_t) : 1);
        for (int c = 0; c < n_columns(step); c++) {
            if (c % AWAKE_COLUMN == 0) {
                keep_tiles_awake();
            }
            const char * column = columns.at[first_column(step) + c];
            place_column<SCHEME>(column + slice * act_row_size(SCHEME, BLOCKS * BLOCK), n_bytes, c,
                                 scratch.units[step % 3]);
        }
    }

    void scale(int64_t step) {
        if (step < 0) {
            return;
        }
        const Panel &    panel = scratch.panels[slice_of(step) % 2];
        const TileUnit & unit  = scratch.units[step % 3];
        for (int c = 0; c < n_columns(step); c++) {
            if (c % AWAKE_COLUMN == 0) {
                keep_tiles_awake();
            }
            scale_sums<SCHEME>(panel, second_plane_shift(weights.format.codes), c, is_first(step), unit, scratch.sums,
                               sums_of(step) + c * PANEL_ROWS);
        }
    }
};

void begin_tiles(int n_columns) {
    TileShapes shapes;
    for (int t = SUMS; t <= ACTS; t++) {
        shapes.rows[t] = columns_of_unit(n_columns);
    }
    shapes.rows[WEIGHTS] = REGISTER_ROWS;
    shapes.rows[ONE_SUM] = shapes.rows[ONE_ROW] = 1;
    for (int t = SUMS; t <= ONE_ROW; t++) {
        shapes.row_bytes[t] = 64;
    }
    set_tile_shapes(shapes);
}

void end_tiles() {
    release_tiles();
}

void multiply_tiles(
    const TileWeights & weights, Columns columns, const Ahead & ahead, float * sums, TileScratch & scratch) {
    switch (weights.format.scheme) {
    case Scheme::q8_K:
        return Multiplication<Scheme::q8_K>(weights, columns, ahead, sums, scratch).run();
    case Scheme::q8_K_16:
        return Multiplication<Scheme::q8_K_16>(weights, columns, ahead, sums, scratch).run();
    case Scheme::q8_K_mins:
        return Multiplication<Scheme::q8_K_mins>(weights, columns, ahead, sums, scratch).run();
    case Scheme::q8_K_256:
        return Multiplication<Scheme::q8_K_256>(weights, columns, ahead, sums, scratch).run();
    case Scheme::q8_K_256_mins:
        return Multiplication<Scheme::q8_K_256_mins>(weights, columns, ahead, sums, scratch).run();
    case Scheme::bf16:
        return Multiplication<Scheme::bf16>(weights, columns, ahead, sums, scratch).run();
    default:
        GGML_ABORT("no tile");
    }
}

#else

bool has_tiles() {
    return false;
}

// never called
void begin_tiles(int) {}

void end_tiles() {}

void multiply_tiles(const TileWeights &, Columns, const Ahead &, float *, TileScratch &) {}

#endif

}  // namespace quant_gemm
