#pragma once

// KDA conv as specified in README.md, in float64, one line of mathematics per line of code.
// Inputs are dense arrays in the order of the specification's shapes, first dimension fastest.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace kda_oracle {

struct conv_shape {
    int64_t D, H, T, S, K;  // head size, heads, tokens per sequence, sequences, snapshots
};

struct conv_inputs {
    std::vector<float>   x[3];  // q, k, v
    std::vector<float>   w[3];
    std::vector<float>   cache;
    std::vector<int32_t> rows;
    int32_t              zero_row;
    double               eps;
};

struct conv_result {
    std::vector<double> out;     // [3*C, T, S]
    std::vector<double> states;  // [9*C, S, K]; slots after T stay zero
};

inline conv_result conv(const conv_shape & n, const conv_inputs & in) {
    const int64_t D = n.D;
    const int64_t C = D * n.H;

    conv_result y;
    y.out.resize(3 * C * n.T * n.S);
    y.states.resize(9 * C * n.S * n.K);

    for (int64_t s = 0; s < n.S; ++s) {
        // input of channel c of q, k or v at token t; t >= -3
        const auto input = [&](int64_t p, int64_t c, int64_t t) -> double {
            if (t >= 0) {
                return in.x[p][(s * n.T + t) * C + c];
            }
            return in.rows[s] == in.zero_row ? 0.0 : in.cache[in.rows[s] * 9 * C + (p * C + c) * 3 + (3 + t)];
        };
        for (int64_t p = 0; p < 3; ++p) {
            for (int64_t t = 0; t < n.T; ++t) {
                double * out = y.out.data() + ((s * n.T + t) * 3 + p) * C;
                for (int64_t h = 0; h < n.H; ++h) {
                    double square = 0;
                    for (int64_t c = h * D; c < (h + 1) * D; ++c) {
                        double z = 0;
                        for (int64_t i = 0; i < 4; ++i) {
                            z += (double) in.w[p][c * 4 + i] * input(p, c, t - 3 + i);
                        }
                        out[c] = z / (1.0 + std::exp(-z));
                        square += out[c] * out[c];
                    }
                    for (int64_t c = h * D; p < 2 && c < (h + 1) * D; ++c) {
                        out[c] *= (p == 0 ? 1.0 / std::sqrt((double) D) : 1.0) / std::sqrt(square + in.eps);
                    }
                }
            }
            for (int64_t slot = 0; slot < std::min(n.T + 1, n.K); ++slot) {
                for (int64_t c = 0; c < C; ++c) {
                    for (int64_t i = 0; i < 3; ++i) {
                        y.states[(slot * n.S + s) * 9 * C + (p * C + c) * 3 + i] = input(p, c, n.T - slot - 3 + i);
                    }
                }
            }
        }
    }
    return y;
}

}  // namespace kda_oracle
