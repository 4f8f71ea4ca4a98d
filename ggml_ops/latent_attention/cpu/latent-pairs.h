#pragma once

// The last matmul of the decompressed form, softmax weights times values, with integers of 16 bits: an instruction does twice
// as many multiply-adds as in float32. All values of a key share one unit (the value of the integer 1), and the weights of
// one query for SEGMENT_KEYS keys share another. Values are at most MAX_VALUE in magnitude. The weights add up to at most
// MAX_WEIGHTS before rounding. So a sum of SEGMENT_KEYS products is below 2^31 for any data. If a value or a weight is not
// finite, its unit is NaN.

#include "ggml.h"
#include "latent-gemm.h"

namespace latent {

constexpr int64_t SEGMENT_KEYS = 64;
constexpr float   MAX_VALUE    = 11585.0f;
constexpr float   MAX_WEIGHT   = 32766.0f;  // one less than INT16_MAX, because a carried error can add 1
constexpr float   MAX_WEIGHTS  = 185000.0f;

// Rounding the largest weight to a whole number scales all weights, which adds at most SEGMENT_KEYS / 2 to their sum. Rounding
// the weights adds less than 1, because errors are carried.
static_assert((MAX_WEIGHTS + SEGMENT_KEYS / 2 + 1) * MAX_VALUE < 2147483647.0);

// Whether values of a cache of this type, with n_latent values per row, are multiplied as integers.
inline bool has_pairs(ggml_type cache, int64_t n_latent) {
    return LATENT_PAIRS && cache != GGML_TYPE_F32 && n_latent % LANES == 0;
}

#if LATENT_PAIRS

// Divides a row of n values, a multiple of LANES, by a power of two near their mean magnitude, and returns this power. If a
// value is not finite, fills the row with zeros and returns NaN.
float normalise(int64_t n, float * row);

// Values [keys][n_cols] in panels as pairs of neighbouring keys: pairs[key / 2][n_cols] in panels; units[key]. n_cols: a
// multiple of LANES.
void round_values(int64_t n_keys, int64_t n_cols, Matrix<const float> values, Matrix<int32_t> pairs, float * units);

// Softmax weights [keys][n_cols] times the unit of their key, as pairs of neighbouring keys [keys / 2][n_cols].
// units[key / SEGMENT_KEYS][n_cols]. The rounding error of a weight is carried to the next key, so that errors do not add up
// where many keys have the same weight and similar values.
void round_weights(
    int64_t n_keys, int64_t n_cols, const float * weights, const float * key_units, int32_t * pairs, float * units);

#endif

}  // namespace latent
