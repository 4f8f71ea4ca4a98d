#pragma once

// The last matmul of the decompressed form, softmax weights times values, with integers of 16 bits: an instruction (two
// with AVX2 without VNNI) does twice as many multiply-adds as in float32. All values of a key share one unit (the value of
// the integer 1), and the weights of one query for SEGMENT_KEYS keys, a segment, share another. If a value or a weight is
// not finite, its unit is NaN.
//
// The magnitude of a sum over a segment is below 2^31 for any data. It is at most sum(weights) * MAX_VALUE, and at most
// (Cauchy-Schwarz) norm(weights) * norm(values of the column). round_weights scales the weights so that one of these two
// products is below 2^31.

#include "ggml.h"
#include "latent-gemm.h"

namespace latent {

constexpr int64_t SEGMENT_KEYS = 32;
constexpr float   MAX_VALUE    = 16384.0f;
constexpr float   MAX_WEIGHT   = 32766.0f;       // a carried error can add 1
constexpr float   MAX_SUM      = 2147000000.0f;  // below 2^31 also with the errors of float32
constexpr float   ROUND_VALUES = 3.0f;           // rounding adds at most sqrt(SEGMENT_KEYS) / 2 to the norm of a column

// Rounding the largest weight to a whole number scales all weights, which adds at most SEGMENT_KEYS / 2 to their sum and
// sqrt(SEGMENT_KEYS) / 2 to their norm. Rounding the weights adds at most 1 to their sum, because errors are carried, and
// sqrt(SEGMENT_KEYS) to their norm.
constexpr float ROUND_SUM  = SEGMENT_KEYS / 2 + 1;
constexpr float ROUND_NORM = 9.0f;

static_assert(MAX_WEIGHT + 1 <= 32767);
static_assert(4 * ROUND_VALUES * ROUND_VALUES >= SEGMENT_KEYS && ROUND_NORM * ROUND_NORM >= 2.25 * SEGMENT_KEYS);

// Whether values of a cache of this type, with n_latent values per row, are multiplied as integers.
inline bool has_pairs(ggml_type cache, int64_t n_latent) {
    return LATENT_PAIRS && cache != GGML_TYPE_F32 && n_latent % LANES == 0;
}

#if LATENT_PAIRS

// Mean magnitude of a row of n values, a multiple of LANES; NaN if a value is not finite.
float magnitude(int64_t n, const float * row);

// Divides each column of a matrix in panels by a power of two near its mean magnitude. Quiet columns are divided by the power
// of a typical one: otherwise a large value in a quiet column could take all bits of the others. units: the mean
// magnitudes, replaced by the powers; NaN remains, and this column is not divided. n_cols: a multiple of LANES.
void normalise(int64_t n_rows, int64_t n_cols, Matrix<float> columns, float * units);

// Units of the values of a tile, and the norms that limit the weights. norm[key]: the largest norm of a column, of the values
// from the start of the segment up to this key.
struct ValueUnits {
    float * of_key;
    float * norm;
};

// Values [keys][n_cols] in panels as pairs of neighbouring keys: pairs[key / 2][n_cols] in panels. n_cols: a multiple of
// LANES.
void round_values(
    int64_t n_keys, int64_t n_cols, Matrix<const float> values, Matrix<int32_t> pairs, const ValueUnits & units);

// Softmax weights [keys][n_cols] times the unit of their key, as pairs of neighbouring keys [keys / 2][n_cols].
// units[key / SEGMENT_KEYS][n_cols]. The rounding error of a weight is carried to the next key, so that errors do not add up
// where many keys have the same weight and similar values.
void round_weights(int64_t            n_keys,
                   int64_t            n_cols,
                   const float *      weights,
                   const ValueUnits & of_values,
                   int32_t *          pairs,
                   float *            units);

#endif

}  // namespace latent
