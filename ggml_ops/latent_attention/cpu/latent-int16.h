#pragma once

// Attention over quantized keys with integer matmuls: quants as stored, widened to 16 bits, times queries
// (scores) or softmax weights (values) rounded to 15 bits and a sign. An instruction does twice as many multiplications
// as in float32, and the rounding error (NMSE about 1e-9) is far below that of the cache's own type.
// For types with one scale per 32 quants and no offset; other types and CPUs without the instruction use float32.

#include "latent-simd.h"
#include "latent-tile.h"

namespace latent {

constexpr int64_t CODES_A_SCALE   = 32;
constexpr int64_t ROOM_PER_COLUMN = MAX_TILE_KEYS / 2 + 1;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define LATENT_INT16 1
#else
#define LATENT_INT16 0  // the functions below are not defined
#endif

inline bool has_int16(ggml_type type) {
    return LATENT_INT16 && (type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0);
}

// A tile of keys as quants and scales. The caller owns the memory.
struct CodeTile {
    int64_t   n_dims;    // quants per key
    int64_t   n_values;  // the first n_values are the value; both multiples of CODES_A_SCALE
    int16_t * codes;     // [key][n_dims], for the scores
    float *   scales;    // [key][n_dims / CODES_A_SCALE]
    int32_t * pairs;     // [block][PAIRS]: the quants of two neighbouring keys interleaved, for the values
    float *   room;      // ROOM_PER_COLUMN floats for each column of the weights
    int       n_keys;

    static constexpr int64_t PAIRS = (MAX_TILE_KEYS / 2 + 1) * CODES_A_SCALE;  // padding against cache set conflicts

    int64_t n_scales() const { return n_dims / CODES_A_SCALE; }
};

// Reads the tile's keys from src, whose row stride is `stride` bytes.
void read_codes(const KeyTile & tile, ggml_type type, const char * src, size_t stride, CodeTile & codes);

// Values of x[d0 .. d1), scaled so that the largest magnitude of all n values becomes INT16_MAX, and rounded: pair by
// pair (the first in the lower half) to pairs[0], pairs[ldp], ... d0 and d1 are even. Returns that magnitude, or NaN if a
// value is not finite.
float round_pairs(const float * x, int64_t n, int64_t d0, int64_t d1, int32_t * pairs, int64_t ldp);

// scores[key][col] = scale[col] * sum over d of queries[d][col] * codes[key][d] * scales[key][d/32].
// queries: pairs of neighbouring d, [n_dims/2][n_cols] of two int16 (the lower d in the lower half).
void score_int16(int64_t n_cols, const CodeTile & codes, const int32_t * queries, const float * scale, float * scores);

// out[row][d] = out[row][d] * rescale[row] + sum over keys of weights[key][row] * codes[key][d] * scales[key][d/32],
// for d < n_values; rescale null: out is overwritten. Weights times scales are rounded with one factor per row and
// block of 32 values, computed for this tile, so that tiles with small weights keep their precision. Columns of
// weights: n_rows, padded.
void add_values_int16(
    int64_t n_rows, const CodeTile & codes, const float * weights, const float * rescale, Ahead & ahead, float * out);

}  // namespace latent
