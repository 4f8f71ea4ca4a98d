#pragma once

// Values of the decompressed form as integers of 16 bits: an instruction multiplies twice as many of them as of float32.
// The values of a key and the weights of a query for SEGMENT_KEYS keys have a unit each (the value of the integer 1). No
// absolute value is larger than MAX_VALUE, and the weights add up to about MAX_WEIGHTS at most, so that the sum of their
// products is below 2^31 for any data. What is not finite makes a unit NaN.

#include "ggml.h"
#include "latent-gemm.h"

namespace latent {

constexpr int64_t SEGMENT_KEYS = 64;
constexpr float   MAX_VALUE    = 16383.0f;
constexpr float   MAX_WEIGHT   = 32766.0f;  // one less than an integer of 16 bits holds: see round_weights
constexpr float   MAX_WEIGHTS  = 131000.0f;

// Rounding the largest weight to a whole number adds at most SEGMENT_KEYS / 2 to the sum of all, rounding the others 1.
static_assert((MAX_WEIGHTS + SEGMENT_KEYS / 2 + 1) * MAX_VALUE < 2147483647.0);

// Whether values of a cache of this type, with n_latent values per row, are multiplied as integers.
inline bool has_pairs(ggml_type cache, int64_t n_latent) {
    return LATENT_PAIRS && cache != GGML_TYPE_F32 && n_latent % LANES == 0;
}

#if LATENT_PAIRS

// Divides a row of n values, a multiple of LANES, by a power of two, so that its largest magnitude is in [0.5, 1) (smaller
// if it is below 2^-126), and returns that power. A row with a value that is not finite becomes zero: returns NaN.
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
