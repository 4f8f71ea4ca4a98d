#include "latent-pairs.h"

#include <algorithm>
#include <cmath>

namespace latent {

#if LATENT_PAIRS

// Lower bound for the largest value of a key, and for the largest weight of a segment, which is times the unit of its key.
// Below it, the inverse of the unit could be infinite. If all are smaller, they lose bits.
constexpr float SMALLEST = 1e-33f;

float magnitude(int64_t n, const float * row) {
    vf total   = v_set(0.0f);
    vf nothing = v_set(0.0f);  // NaN if a value is not finite
    for (int64_t i = 0; i < n; i += LANES) {
        const vf value = v_load(row + i);
        total          = v_fma(v_abs(value), v_set(1.0f / (float) n), total);
        nothing        = v_fma(value, v_set(0.0f), nothing);
    }
    return v_hsum(total) + v_hsum(nothing);
}

static int exponent_of(float x) {
    int exponent;
    std::frexp(x, &exponent);
    return std::clamp(exponent, -126, 126);
}

void normalise(int64_t n_rows, int64_t n_cols, Matrix<float> columns, float * units) {
    int64_t sum   = 0;
    int64_t count = 0;
    for (int64_t col = 0; col < n_cols; ++col) {
        if (units[col] > 0.0f) {
            sum += exponent_of(units[col]);
            ++count;
        }
    }
    const int typical = (int) std::lround((double) sum / (double) std::max<int64_t>(1, count));
    for (int64_t col0 = 0; col0 < n_cols; col0 += LANES) {
        float factors[LANES];
        for (int64_t i = 0; i < LANES; ++i) {
            float & unit = units[col0 + i];
            factors[i]   = 1.0f;
            if (!std::isnan(unit)) {
                unit       = std::ldexp(1.0f, unit > 0.0f ? std::max(exponent_of(unit), typical) : typical);
                factors[i] = 1.0f / unit;
            }
        }
        const vf factor = v_load(factors);
        float *  at     = columns.at + col0 / PANEL * columns.panel + col0 % PANEL;
        for (int64_t row = 0; row < n_rows; ++row) {
            v_store(at + row * columns.ld, v_mul(v_load(at + row * columns.ld), factor));
        }
    }
}

void round_values(
    int64_t n_keys, int64_t n_cols, Matrix<const float> values, Matrix<int32_t> pairs, const ValueUnits & units) {
    const auto at = [&](int64_t key, int64_t col) {
        return v_load(values.at + col / PANEL * values.panel + key * values.ld + col % PANEL);
    };
    float factors[SEGMENT_KEYS];
    for (int64_t key0 = 0; key0 < n_keys; key0 += SEGMENT_KEYS) {
        const int64_t end = std::min(n_keys, key0 + SEGMENT_KEYS);
        for (int64_t key = key0; key < end; ++key) {
            vf largest = v_set(SMALLEST);
            vf nothing = v_set(0.0f);
            for (int64_t col = 0; col < n_cols; col += LANES) {
                const vf value = at(key, col);
                largest        = v_max(largest, v_abs(value));
                nothing        = v_fma(value, v_set(0.0f), nothing);
            }
            const float most    = v_hmax(largest);
            units.of_key[key]   = most / MAX_VALUE + v_hsum(nothing);
            factors[key - key0] = MAX_VALUE / most;
        }
        float squares_up_to[SEGMENT_KEYS][LANES] = {};  // for each key, the largest of each lane
        for (int64_t col = 0; col < n_cols; col += LANES) {
            vf         squares = v_set(0.0f);
            const auto scaled  = [&](int64_t key) {
                const vf value = v_mul(at(key, col), v_set(factors[key - key0]));
                float *  most  = squares_up_to[key - key0];
                squares        = v_fma(value, value, squares);
                v_store(most, v_max(v_load(most), squares));
                return value;
            };
            for (int64_t key = key0; key < end; key += 2) {
                const vf low  = scaled(key);
                const vf high = key + 1 < end ? scaled(key + 1) : v_set(0.0f);
                v_store(pairs.at + col / PANEL * pairs.panel + key / 2 * pairs.ld + col % PANEL, v_pair(low, high));
            }
        }
        for (int64_t key = key0; key < end; ++key) {
            units.norm[key] = std::sqrt(v_hmax(v_load(squares_up_to[key - key0])));
        }
    }
}

void round_weights(int64_t            n_keys,
                   int64_t            n_cols,
                   const float *      weights,
                   const ValueUnits & of_values,
                   int32_t *          pairs,
                   float *            units) {
    for (int64_t key0 = 0; key0 < n_keys; key0 += SEGMENT_KEYS) {
        const int64_t end     = std::min(n_keys, key0 + SEGMENT_KEYS);
        const vf      max_sum = v_set(MAX_SUM / MAX_VALUE - ROUND_SUM);
        for (int64_t col = 0; col < n_cols; col += LANES) {
            const auto product = [&](int64_t key) {
                return v_mul(v_load(weights + key * n_cols + col), v_set(of_values.of_key[key]));
            };
            vf largest = v_set(SMALLEST);
            vf total   = v_set(0.0f);
            vf norm    = v_set(0.0f);  // up to the last key that counts: keys that only other queries see do not
            for (int64_t key = key0; key < end; ++key) {
                const vf x = product(key);
                largest    = v_max(largest, x);
                total      = v_add(total, x);
                norm       = v_max(norm, v_if_positive(x, v_set(of_values.norm[key])));
            }
            const vf max_norm = v_sub(v_div(v_set(MAX_SUM), v_add(norm, v_set(ROUND_VALUES))), v_set(ROUND_NORM));
            // norm(weights) <= sqrt(largest * total)
            const vf share = v_div(largest, v_max(total, largest));
            const vf bound = v_max(v_mul(share, max_sum), v_mul(v_sqrt(share), max_norm));
            // a whole number for the largest, so that equal weights have no error
            const vf most = v_round(v_min(v_set(MAX_WEIGHT), bound));
            const vf unit = v_div(largest, most);
            v_store(units + key0 / SEGMENT_KEYS * n_cols + col, v_fma(total, v_set(0.0f), unit));
            const vf   factor  = v_div(most, largest);
            vf         carry   = v_set(0.0f);
            const auto rounded = [&](int64_t key) {
                const vf exact = v_fma(product(key), factor, carry);
                const vf whole = v_round(exact);
                carry          = v_sub(exact, whole);
                return whole;
            };
            for (int64_t key = key0; key < end; key += 2) {
                const vf low  = rounded(key);
                const vf high = key + 1 < end ? rounded(key + 1) : v_set(0.0f);
                v_store(pairs + key / 2 * n_cols + col, v_pair(low, high));
            }
        }
    }
}

#endif

}  // namespace latent
