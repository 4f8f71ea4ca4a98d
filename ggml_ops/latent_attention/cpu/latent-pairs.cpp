#include "latent-pairs.h"

#include <algorithm>
#include <cmath>

namespace latent {

#if LATENT_PAIRS

// Lower bound for the largest value of a row and the largest weight of a segment: below it, the inverse of the unit could be
// infinite. If all are smaller, they lose bits.
constexpr float SMALLEST = 1e-33f;

float normalise(int64_t n, float * row) {
    vf total   = v_set(0.0f);
    vf nothing = v_set(0.0f);  // NaN if a value is not finite
    for (int64_t i = 0; i < n; i += LANES) {
        const vf value = v_load(row + i);
        total          = v_fma(v_abs(value), v_set(1.0f / (float) n), total);
        nothing        = v_fma(value, v_set(0.0f), nothing);
    }
    if (v_hsum(nothing) != 0.0f) {
        std::fill(row, row + n, 0.0f);
        return NAN;
    }
    int exponent;
    std::frexp(v_hsum(total), &exponent);
    exponent        = std::clamp(exponent, -126, 126);
    const vf factor = v_set(std::ldexp(1.0f, -exponent));
    for (int64_t i = 0; i < n; i += LANES) {
        v_store(row + i, v_mul(v_load(row + i), factor));
    }
    return std::ldexp(1.0f, exponent);
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
        vf most = v_set(0.0f);
        for (int64_t col = 0; col < n_cols; col += LANES) {
            vf         squares = v_set(0.0f);
            const auto scaled  = [&](int64_t key) {
                const vf value = v_mul(at(key, col), v_set(factors[key - key0]));
                squares        = v_fma(value, value, squares);
                return value;
            };
            for (int64_t key = key0; key < end; key += 2) {
                const vf low  = scaled(key);
                const vf high = key + 1 < end ? scaled(key + 1) : v_set(0.0f);
                v_store(pairs.at + col / PANEL * pairs.panel + key / 2 * pairs.ld + col % PANEL, v_pair(low, high));
            }
            most = v_max(most, squares);
        }
        units.norm[key0 / SEGMENT_KEYS] = std::sqrt(v_hmax(most));
    }
}

void round_weights(int64_t            n_keys,
                   int64_t            n_cols,
                   const float *      weights,
                   const ValueUnits & of_values,
                   int32_t *          pairs,
                   float *            units) {
    for (int64_t key0 = 0; key0 < n_keys; key0 += SEGMENT_KEYS) {
        const int64_t end      = std::min(n_keys, key0 + SEGMENT_KEYS);
        const vf      max_sum  = v_set(MAX_SUM / MAX_VALUE - ROUND_SUM);
        const vf      max_norm = v_set(MAX_SUM / (of_values.norm[key0 / SEGMENT_KEYS] + ROUND_VALUES) - ROUND_NORM);
        for (int64_t col = 0; col < n_cols; col += LANES) {
            const auto product = [&](int64_t key) {
                return v_mul(v_load(weights + key * n_cols + col), v_set(of_values.of_key[key]));
            };
            vf largest = v_set(SMALLEST);
            vf total   = v_set(0.0f);
            for (int64_t key = key0; key < end; ++key) {
                const vf x = product(key);
                largest    = v_max(largest, x);
                total      = v_add(total, x);
            }
            // norm(weights) <= sqrt(largest * total)
            const vf share = v_div(largest, v_max(total, largest));
            const vf bound = v_max(v_mul(share, max_sum), v_mul(v_sqrt(share), max_norm));
            // a whole number for the largest, so that equal weights have no error
            const vf most  = v_round(v_min(v_set(MAX_WEIGHT), bound));
            const vf unit  = v_div(largest, most);
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
