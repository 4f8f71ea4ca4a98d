#pragma once

// Declarations common to the three stages of a matmul: packed activations (quant-gemm-acts.cpp), a panel of unpacked
// weights (quant-gemm-unpack.cpp), and the tiles that multiply them (quant-gemm-tile.cpp, -tile-i8mm.cpp, -tile-amx.cpp).
// Few columns without a panel: quant-gemm-dot.h.
//
// A panel is PANEL_ROWS weight rows by SLICE values of K, as unsigned bytes: for each group of four consecutive k, four
// bytes of every row. Types with signed values are shifted by an offset. To remove its contribution, offset times the sum
// of the activations' quants, each integer sum starts at minus that. Where sums have 16 bits (AVX2), factors times the
// offset are subtracted as minima are, and types of 8 bits stay signed. With NEON all bytes are signed; with i8mm, groups
// have eight k.

#include "quant-gemm-vector.h"
#include "quant-gemm.h"

#include <cstdint>

namespace quant_gemm {

#if QUANT_GEMM_KERNELS

constexpr int TILE_VECTORS  = 2;  // vectors of rows in a tile
constexpr int PANEL_VECTORS = QUANT_GEMM_NEON ? 8 : TILE_VECTORS;
constexpr int PANEL_ROWS    = PANEL_VECTORS * LANES;

#else

constexpr int PANEL_VECTORS = 2;
constexpr int PANEL_ROWS    = 32;

#endif

// Whether quants are signed in panels, and no integer sum starts at an offset.
constexpr bool SIGNED_PANELS = QUANT_GEMM_NEON;

// Whether panels have the differences between factors and the next ones. Then tiles do not reset integer sums after each
// factor: a sum includes all weights up to it.
constexpr bool FACTOR_DIFFERENCES = QUANT_GEMM_NEON;

// Neighbouring minima of a row, which are bytes with NEON, as many as an instruction multiplies.
constexpr int MINIMA_TOGETHER = QUANT_GEMM_I8MM ? 8 : 4;

// With i8mm, panels hold the scales and factors of each row twice, in the order of the sums (quant-gemm-tile-i8mm.cpp).
constexpr int ROW_NUMBERS = (QUANT_GEMM_I8MM ? 2 : 1) * PANEL_ROWS;

// Panels that follow each other in K and are multiplied at once, so that the float sums of most types are loaded and
// stored less often.
constexpr int MAX_PANELS = QUANT_GEMM_NEON ? 1 : 2;

constexpr int SLICE    = 256;  // values of K in a panel, so that its 8 KiB and the activations fit in L1
constexpr int BLOCK    = 32;   // values of K per scale (some types: 16)
constexpr int N_BLOCKS = SLICE / BLOCK;
constexpr int N_GROUPS = BLOCK / 4;
constexpr int N_PAIRS  = BLOCK / 2;
constexpr int SLICE_16 = 128;  // the same for 2-byte values

constexpr size_t CACHE_LINE = 64;

// The quantization of activations, which determines the form of the sum (the weight type's vec_dot type in ggml).
enum class Scheme {
    q8_0,           // a scale per 32 activations
    q8_K,           // a scale per 256; weights have a scale per 256 and an integer factor per 32
    q8_K_16,        // ... per 16
    q8_K_mins,      // ... per 32, and a minimum
    q8_K_16_mins,   // ... per 16, and a minimum
    q8_K_256,       // ... panels hold quants times factors
    q8_K_256_mins,  // ... the same, and a minimum per 16
    bf16,           // no scale: rounded to bf16
    f16,            // no scale: rounded to F16
};

constexpr bool is_plain(Scheme scheme) {
    return scheme == Scheme::bf16 || scheme == Scheme::f16;
}

constexpr bool has_minima(Scheme scheme) {
    return scheme == Scheme::q8_K_mins || scheme == Scheme::q8_K_16_mins || scheme == Scheme::q8_K_256_mins;
}

#if QUANT_GEMM_KERNELS

// Integer sums start at minus the offset times the sum of activations (in tiles only without SIGNED_PANELS); else factors
// times the offset are minima.
constexpr bool has_starts(Scheme scheme) {
    return !SUMS_OF_16_BITS && !has_minima(scheme) && !is_plain(scheme);
}

// Weights with one factor.
constexpr int weights_per_factor(Scheme scheme) {
    return scheme == Scheme::q8_K_16 || scheme == Scheme::q8_K_16_mins     ? 16
           : scheme == Scheme::q8_K_256 || scheme == Scheme::q8_K_256_mins ? 256
                                                                           : 32;
}

// Weights with one minimum; 0 if there are none.
constexpr int weights_per_minimum(Scheme scheme) {
    return scheme == Scheme::q8_K_mins                                                ? 32
           : has_minima(scheme) || (scheme == Scheme::q8_K_16 && !has_starts(scheme)) ? 16
                                                                                      : 0;
}

#endif

// A packed row of activations is K/256 of these for Scheme::q8_0, the last one zero-padded ...
struct ActBlocks {
    int8_t  codes[N_BLOCKS][BLOCK];
    float   scales[N_BLOCKS];
    int32_t starts[N_BLOCKS];  // -offset * sum of quants
};

static_assert(sizeof(ActBlocks) == 320, "activations are read at fixed distances");

// ... K/256 of these for the q8_K schemes; the values themselves for Scheme::bf16 (as float32 without AVX512-BF16) and,
// as float32, for Scheme::f16.
struct ActSuperBlock {
    int8_t codes[SLICE];

    union {
        int32_t starts[SLICE / 16];   // -offset * sum of 16 quants (q8_K_16), or of 32
        int16_t sums_16[SLICE / 16];  // sum of 16 quants, for the minima of 16 weights
    };

    union {
        int16_t sums[N_BLOCKS];  // sum of 32 quants, for the minima of q8_K_mins
        int32_t start;           // -offset * sum of 256 quants (q8_K_256)
    };

    float   scale;
    int32_t padding[3];
};

static_assert(sizeof(ActSuperBlock) == 352, "activations are read at fixed distances");

// Size of a packed row of k activations in bytes.
constexpr size_t act_row_size(Scheme scheme, int64_t k) {
    switch (scheme) {
    case Scheme::q8_0:
        return (k + SLICE - 1) / SLICE * sizeof(ActBlocks);
    case Scheme::bf16:
        return k * (QUANT_GEMM_BF16 ? sizeof(ggml_bf16_t) : sizeof(float));
    case Scheme::f16:
        return k * sizeof(float);
    default:
        return k / SLICE * sizeof(ActSuperBlock);
    }
}

struct alignas(64) Panel {
    union {
        uint8_t  codes[N_BLOCKS][N_GROUPS][PANEL_ROWS][4];
        uint16_t pairs[SLICE_16 / BLOCK][N_PAIRS][PANEL_ROWS][2];  // bf16
        uint16_t halves[SLICE_16 / 2][PANEL_VECTORS][2]
                       [PANEL_ROWS / PANEL_VECTORS];  // f16, and bf16 as float32: per vector of rows, two values of k
    };

    union {
        float   scales[N_BLOCKS][ROW_NUMBERS];  // q8_0: per block of 32
        int32_t factors[SLICE / 16]
                       [ROW_NUMBERS];  // q8_K, q8_K_mins: per block of 32 (half of the array), q8_K_16: of 16
    };

    float super_scales[ROW_NUMBERS];  // of 256 weights

    union {
        int16_t minima[N_BLOCKS][PANEL_ROWS][2];  // of two neighbouring blocks of 32 (half of the array), or of 16
        int8_t  minima_in_bytes[SLICE / 16 / MINIMA_TOGETHER][PANEL_ROWS][MINIMA_TOGETHER];  // with NEON
    };

    float minimum_scales[ROW_NUMBERS];
};

// Fills a panel with `n_blocks` blocks of 32 values from block `block` on of the rows row .. row + PANEL_ROWS - 1;
// rows after n_rows - 1 repeat the last one (or the last group of 8). weights: first row; stride: row stride in bytes.
using Unpack = void (*)(
    const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int n_blocks, Panel & panel);

struct Format {
    ggml_type         type;
    quant_gemm_layout layout;
    Scheme            scheme;
    int               offset;  // added to signed values to make them unsigned
    Codes             codes;   // what the quants can be
    Unpack            unpack;
    int               min_columns;  // minimum number of columns of a matrix for which panels are faster

    // On CPUs with tile registers, if unpack_for_tiles is not nullptr.
    Unpack unpack_for_tiles;
    int    min_tile_columns;
};

// The value of an environment variable that is 0 or 1; `otherwise` if it is unset, or another text, which is logged.
bool environment_switch(const char * name, bool otherwise);

// The format of a type and layout, or nullptr.
const Format * find_format(ggml_type type, quant_gemm_layout layout);

// Blocks of 32 values in a panel.
constexpr int panel_blocks(Scheme scheme) {
    return (is_plain(scheme) ? SLICE_16 : SLICE) / BLOCK;
}

// Quantizes a row of k floats as ggml does for this weight type and packs it.
void pack_row(const Format & format, const float * x, int64_t k, char * packed);

// The format for the node, or nullptr if it is not supported.
const Format * format_of(const ggml_tensor * dst, quant_gemm_layout layout);

// Whether n_columns of one matrix of the node are multiplied as dot products of rows, else as panels. The two give the
// same bits, except for plain numbers.
bool uses_dots(const Format & format, const ggml_tensor * dst, int64_t n_columns);

// Whether panels of n_columns of one matrix are multiplied by tile registers.
bool uses_tiles(const Format & format, int64_t n_columns);

// Packs this thread's share of the rows of src1, contiguously.
void pack_rows(const Format & format, const ggml_tensor * src1, char * acts, int ith, int nth);

// Bytes to prefetch during the computation.
struct Ahead {
    const char * first;
    size_t       size;
};

// The addresses of n packed rows of activations, or of one block in each.
struct Columns {
    const char * const * at;
    int                  n;
};

#if QUANT_GEMM_KERNELS

// Prefetches n bytes: weights come from memory, and hardware prefetching is not far enough ahead. (GCC removes calls of
// functions that only prefetch, if it does not inline them.)
template <int LOCALITY> inline __attribute__((always_inline)) void prefetch(const void * p, size_t n) {
    for (size_t i = 0; i < n; i += CACHE_LINE) {
        __builtin_prefetch((const char *) p + i, 0, LOCALITY);
    }
}

// Prefetches part `part` of n_parts, into L1.
inline __attribute__((always_inline)) void prefetch_share(const Ahead & ahead, int64_t part, int64_t n_parts) {
    const size_t first = ahead.size * part / n_parts;
    prefetch<3>(ahead.first + first, ahead.size * (part + 1) / n_parts - first);
}

template <int N, int M> inline void clear(Ints (&sums)[N][M]) {
#pragma GCC                         unroll 8
    for (int i = 0; i < N; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < M; j++) {
            sums[i][j] = zero();
        }
    }
}

// The float operations of 256 values, for all kernels, so that the sums of a row and a column have the same bits in each
// of them. products: integer sum of quants times factors.
inline Floats add_super_block(Floats sum, Ints products, Floats scale, Floats act_scale) {
    return fma(mul(to_floats(products), scale), act_scale, sum);
}

// The same with minima: their integer sum, and its scale.
inline Floats
add_super_block(Floats sum, Ints products, Floats scale, Ints minima, Floats minimum_scale, Floats act_scale) {
    const Floats less = mul(to_floats(minima), minimum_scale);
    return add_difference(sum, to_floats(products), scale, less, act_scale);
}

// The same for 32 values with one scale; products: their integer sum.
inline Floats add_block(Floats sum, Ints products, Floats scale, Floats act_scale) {
    return fma(to_floats(products), mul(scale, act_scale), sum);
}

#endif

// `multiply` with i8mm, for quantized weights and one to four columns.
void multiply_i8mm(const Format & format, const Panel & panel, int n_blocks, Columns columns, float * sums);

// Bits by which sums of the second plane are shifted. Factors of Q4_K and Q5_K, which have six bits, are split there, so
// that a quant times either part fits in a byte; other products are split after multiplication.
constexpr int second_plane_shift(Codes codes) {
    return codes == Codes::below_16 ? 4 : codes == Codes::below_32 ? 3 : 8;
}

constexpr int REGISTER_ROWS = 16;  // of a tile register

// Up to 16 columns in a slice of K.
struct alignas(CACHE_LINE) TileUnit {
    int8_t  acts[REGISTER_ROWS][SLICE];
    int8_t  sums[REGISTER_ROWS][CACHE_LINE];  // of quants, for minima
    float   scales[REGISTER_ROWS];
    int32_t starts[REGISTER_ROWS];
};

// Integer sums of both planes.
using TileSums = int32_t[2][REGISTER_ROWS][PANEL_ROWS];

// A panel for tile registers, with a second plane.
struct TilePanel : Panel {
    uint8_t upper_codes[N_BLOCKS][N_GROUPS][PANEL_ROWS][4];
};

struct alignas(CACHE_LINE) TileScratch {
    TilePanel panels[2];
    TileUnit  units[3];
    TileSums  sums;
};

// PANEL_ROWS rows of weights from `row` on.
struct TileWeights {
    const Format & format;
    const char *   rows;    // the first one of the matrix
    size_t         stride;  // bytes between rows
    int64_t        row;
    int64_t        n_rows;  // of the matrix
    int64_t        n_blocks;
};

// Sets the shapes of the tile registers for n_columns columns; end_tiles() clears them.
void begin_tiles(int n_columns);
void end_tiles();

// Sets sums[column][row] (PANEL_ROWS floats per column) to the matmul of the weights with packed rows.
void multiply_tiles(
    const TileWeights & weights, Columns columns, const Ahead & ahead, float * sums, TileScratch & scratch);

// Adds to sums[column][row] (PANEL_ROWS floats per column) the matmul of panels, of n_blocks blocks in all, with packed
// rows. `columns` points to the first block of the rows that belongs to the panels. first: the sums are set instead.
void multiply(const Format & format,
              const Panel *  panels,
              int            n_blocks,
              Columns        columns,
              const Ahead &  ahead,
              bool           first,
              float *        sums);

}  // namespace quant_gemm
