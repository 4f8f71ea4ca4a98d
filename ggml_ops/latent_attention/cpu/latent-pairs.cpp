#include "latent-pairs.h"

#include <algorithm>
#include <cmath>

namespace latent {

#if LATENT_PAIRS

// Rows whose largest value is smaller become zero; the inverse of a smaller one could be infinite.
constexpr float SMALLEST = 1e-30f;

static float largest_lane(vf a) {
    float x[LANES];
    v_store(x, a);
    return *std::max_element(x, x + LANES);
}

float round_row(const float * x, int64_t n, int32_t * pairs) {
    vf largest = v_set(0.0f);
    vf nothing = v_set(0.0f);  // NaN if a value is not finite
    for (int64_t i = 0; i < n; i += LANES) {
        const vf value = v_load(x + i);
        largest        = v_max(largest, v_abs(value));
        nothing        = v_fma(value, v_set(0.0f), nothing);
    }
    const float most  = largest_lane(largest);
    const bool  some  = most > SMALLEST;
    const float whole = some ? 1.0f / most : 0.0f;
    float       norm  = 0.0f;
    for (int64_t i0 = 0; i0 < n; i0 += SEGMENT) {
        vf squares = v_set(0.0f);
        for (int64_t i = i0; i < std::min(n, i0 + SEGMENT); i += LANES) {
            const vf value = v_mul(v_load(x + i), v_set(whole));
            squares        = v_fma(value, value, squares);
        }
        norm = std::max(norm, v_hsum(squares));
    }
    const float steps  = some ? std::min((float) INT16_MAX, MAX_NORM / std::sqrt(norm)) : 0.0f;  // of the largest value
    const vf    factor = v_set(steps * whole);
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        v_store(pairs + i / 2, v_neighbours(v_mul(v_load(x + i), factor), v_mul(v_load(x + i + LANES), factor)));
    }
    return (some ? most / steps : 0.0f) + v_hsum(nothing);
}

void round_values(int64_t n_keys, int64_t n_cols, Matrix<const float> values, Matrix<int32_t> pairs, float * units) {
    const auto at = [&](int64_t key, int64_t col) {
        return v_load(values.at + col / PANEL * values.panel + key * values.ld + col % PANEL);
    };
    for (int64_t key0 = 0; key0 < n_keys; key0 += 2) {
        const int64_t n        = std::min<int64_t>(2, n_keys - key0);
        vf            steps[2] = { v_set(0.0f), v_set(0.0f) };  // 1 as an integer
        for (int64_t i = 0; i < n; ++i) {
            vf largest = v_set(0.0f);
            vf nothing = v_set(0.0f);
            for (int64_t col = 0; col < n_cols; col += LANES) {
                const vf value = at(key0 + i, col);
                largest        = v_max(largest, v_abs(value));
                nothing        = v_fma(value, v_set(0.0f), nothing);
            }
            const float most = largest_lane(largest);
            const bool  some = most > SMALLEST;
            steps[i]         = v_set(some ? MAX_VALUE / most : 0.0f);
            units[key0 + i]  = (some ? most / MAX_VALUE : 0.0f) + v_hsum(nothing);
        }
        for (int64_t col = 0; col < n_cols; col += LANES) {
            const vf first  = v_mul(at(key0, col), steps[0]);
            const vf second = n == 1 ? v_set(0.0f) : v_mul(at(key0 + 1, col), steps[1]);
            v_store(pairs.at + col / PANEL * pairs.panel + key0 / 2 * pairs.ld + col % PANEL, v_pair(first, second));
        }
    }
}

void round_weights(
    int64_t n_keys, int64_t n_cols, const float * weights, const float * key_units, int32_t * pairs, float * units) {
    for (int64_t key0 = 0; key0 < n_keys; key0 += SEGMENT_KEYS) {
        const int64_t end = std::min(n_keys, key0 + SEGMENT_KEYS);
        for (int64_t col = 0; col < n_cols; col += LANES) {
            const auto product = [&](int64_t key) {
                return v_mul(v_load(weights + key * n_cols + col), v_set(key_units[key]));
            };
            vf largest = v_set(0.0f);
            vf total   = v_set(0.0f);
            for (int64_t key = key0; key < end; ++key) {
                const vf x = product(key);
                largest    = v_max(largest, x);
                total      = v_add(total, x);
            }
            float most[LANES], all[LANES], factor[LANES];
            v_store(most, largest);
            v_store(all, total);
            float * unit = units + key0 / SEGMENT_KEYS * n_cols + col;
            for (int i = 0; i < LANES; ++i) {
                // a whole number for the largest, so that equal weights have no error
                const float steps = std::floor(std::min((float) INT16_MAX, MAX_WEIGHTS * most[i] / all[i]));
                const bool  some  = all[i] > SMALLEST;
                factor[i]         = some ? steps / most[i] : 0.0f;
                unit[i]           = (some ? most[i] / steps : 0.0f) + all[i] * 0.0f;
            }
            const vf f = v_load(factor);
            for (int64_t key = key0; key < end; key += 2) {
                const vf second = key + 1 < end ? v_mul(product(key + 1), f) : v_set(0.0f);
                v_store(pairs + key / 2 * n_cols + col, v_pair(v_mul(product(key), f), second));
            }
        }
    }
}

#endif

}  // namespace latent
