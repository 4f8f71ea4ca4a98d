#pragma once

// Online softmax over tiles of keys, with the scores stored transposed: scores[key*n_cols + row], so that each vector
// lane is a row and there are no sums across lanes.

#include <cfloat>
#include <cstdint>

#include "latent-simd.h"

namespace latent {

// Converts scores [n_keys][n_cols] to weights exp(score - max) in place, and updates the running maximum and sum per
// column. rescale is set to the factor for everything summed before. A column with only -inf so far keeps
// maximum -inf, sum 0 and weights 0.
static inline void
softmax_tile(int64_t n_keys, int64_t n_cols, float * scores, float * maximum, float * sum, float * rescale) {
    const vf lowest = v_set(-FLT_MAX);
    for (int64_t col = 0; col < n_cols; col += LANES) {
        float *  s       = scores + col;
        const vf old_max = v_load(maximum + col);
        vf       new_max = old_max;
        for (int64_t key = 0; key < n_keys; ++key) {
            new_max = v_max(new_max, v_load(s + key * n_cols));
        }
        const vf base   = v_max(new_max, lowest);  // finite, so that -inf - base is -inf and not NaN
        const vf factor = v_exp(v_sub(old_max, base));
        vf       total  = v_mul(v_load(sum + col), factor);
        for (int64_t key = 0; key < n_keys; ++key) {
            const vf weight = v_exp(v_sub(v_load(s + key * n_cols), base));
            v_store(s + key * n_cols, weight);
            total = v_add(total, weight);
        }
        v_store(maximum + col, new_max);
        v_store(sum + col, total);
        v_store(rescale + col, factor);
    }
}

// dst = out / sum; zero for a row that saw no key.
static inline void write_row(const float * out, float sum, int64_t n, float * dst) {
    const float inverse = 1.0f / sum;
    for (int64_t d = 0; d < n; ++d) {
        dst[d] = sum == 0.0f ? 0.0f : out[d] * inverse;
    }
}

}  // namespace latent
