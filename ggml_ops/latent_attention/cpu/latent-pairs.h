#pragma once

// Values of the decompressed form as integers of 16 bits: an instruction multiplies twice as many of them as of float32.
// Each row is rounded with its own unit (the value of the integer 1). Sums of products stay below 2^31 for any data:
//   values = latent * v_b     a sum has SEGMENT products, whose factors have norms of at most MAX_NORM (Cauchy-Schwarz)
//   out    = weights * value  a sum has SEGMENT_KEYS products; the weights add up to at most MAX_WEIGHTS, and no value is
//                             larger than MAX_VALUE
// The rounding errors of ordinary data: NMSE 1e-8 for a value, 2e-8 for a weight. A row with a value that is not finite
// has the unit NaN.

#include "ggml.h"
#include "latent-gemm.h"

namespace latent {

constexpr int64_t SEGMENT      = 128;
constexpr int64_t SEGMENT_KEYS = 64;
constexpr float   MAX_NORM     = 46300.0f;
constexpr float   MAX_VALUE    = 16383.0f;
constexpr float   MAX_WEIGHTS  = 131000.0f;

static_assert((MAX_NORM + 6) * (MAX_NORM + 6) < 2147483647.0, "rounding adds at most sqrt(SEGMENT) / 2 to a norm");
static_assert((MAX_WEIGHTS + SEGMENT_KEYS / 2) * MAX_VALUE < 2147483647.0);

// Whether the values of a cache of this type, with n_latent values per row, are computed as integers.
inline bool has_pairs(ggml_type cache, int64_t n_latent) {
    return LATENT_PAIRS && cache != GGML_TYPE_F32 && n_latent % (2 * LANES) == 0;
}

#if LATENT_PAIRS

// x[n] as pairs of neighbours, n a multiple of 2 * LANES. Returns the unit.
float round_row(const float * x, int64_t n, int32_t * pairs);

// Values [keys][n_cols] in panels as pairs of neighbouring keys: pairs[key / 2][n_cols] in panels; units[key]. n_cols: a
// multiple of LANES.
void round_values(int64_t n_keys, int64_t n_cols, Matrix<const float> values, Matrix<int32_t> pairs, float * units);

// Softmax weights [keys][n_cols] times the unit of their key, as pairs of neighbouring keys [keys / 2][n_cols].
// units[key / SEGMENT_KEYS][n_cols].
void round_weights(
    int64_t n_keys, int64_t n_cols, const float * weights, const float * key_units, int32_t * pairs, float * units);

#endif

}  // namespace latent
