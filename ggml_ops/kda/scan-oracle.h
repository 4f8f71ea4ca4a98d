#pragma once

// KDA scan as specified in README.md, in float64, one line of mathematics per line of code.
// Inputs are dense arrays in the order of the specification's shapes, first dimension fastest.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace kda_oracle {

struct scan_shape {
    int64_t D, H, T, S, K;  // head size, heads, tokens per sequence, sequences, snapshots
};

struct scan_inputs {
    std::vector<float>   qkv, f, dt_bias, a, beta, gate, norm, cache;
    std::vector<int32_t> rows;
    int32_t              zero_row;
    double               eps;
    double               lower_bound;  // -INFINITY: none
};

struct scan_result {
    std::vector<double> out;     // [D, H, T, S]
    std::vector<double> states;  // [D*D*H, S, K]; slots after T stay zero
};

inline double sigmoid(double x) {
    return 1.0 / (1.0 + std::exp(-x));
}

inline scan_result scan(const scan_shape & n, const scan_inputs & x) {
    const int64_t D = n.D;
    const int64_t H = n.H;

    scan_result y;
    y.out.resize(D * H * n.T * n.S);
    y.states.resize(D * D * H * n.S * n.K);

    std::vector<double> m(D * D);  // m[j*D + i] = S[i][j]
    std::vector<double> decay(D), o(D);
    for (int64_t s = 0; s < n.S; ++s) {
        for (int64_t h = 0; h < H; ++h) {
            const bool    zero = x.rows[s] == x.zero_row;
            const float * from = x.cache.data() + (x.rows[s] * H + h) * D * D;
            for (int64_t i = 0; i < D * D; ++i) {
                m[i] = zero ? 0.0 : from[i];
            }
            const auto keep = [&](int64_t slot) {
                if (slot < n.K) {
                    std::copy(m.begin(), m.end(), y.states.begin() + ((slot * n.S + s) * H + h) * D * D);
                }
            };
            keep(n.T);
            for (int64_t t = 0; t < n.T; ++t) {
                const int64_t token = s * n.T + t;
                const float * q     = x.qkv.data() + (token * 3 * H + h) * D;
                const float * k     = x.qkv.data() + (token * 3 * H + H + h) * D;
                const float * v     = x.qkv.data() + (token * 3 * H + 2 * H + h) * D;
                const float * f     = x.f.data() + (token * H + h) * D;
                const float * gate  = x.gate.data() + (token * H + h) * D;
                const double  beta  = sigmoid(x.beta[token * H + h]);

                for (int64_t i = 0; i < D; ++i) {
                    const double z = (double) f[i] + x.dt_bias[h * D + i];
                    const double g = x.lower_bound > -INFINITY
                                         ? x.lower_bound * sigmoid(-(double) x.a[h] * z)
                                         : x.a[h] * (std::fmax(z, 0.0) + std::log1p(std::exp(-std::fabs(z))));
                    decay[i]       = std::exp(g);
                }
                double square = 0;
                for (int64_t j = 0; j < D; ++j) {
                    double recalled = 0;
                    for (int64_t i = 0; i < D; ++i) {
                        m[j * D + i] *= decay[i];
                        recalled += m[j * D + i] * k[i];
                    }
                    o[j] = 0;
                    for (int64_t i = 0; i < D; ++i) {
                        m[j * D + i] += k[i] * beta * (v[j] - recalled);
                        o[j] += m[j * D + i] * q[i];
                    }
                    square += o[j] * o[j];
                }
                for (int64_t j = 0; j < D; ++j) {
                    y.out[(token * H + h) * D + j] =
                        x.norm[j] * o[j] / std::sqrt(square / D + x.eps) * sigmoid(gate[j]);
                }
                keep(n.T - 1 - t);
            }
        }
    }
    return y;
}

}  // namespace kda_oracle
