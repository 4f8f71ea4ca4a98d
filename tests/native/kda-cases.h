#pragma once

// Inputs for the tests of all KDA operators: ordinary and hostile gates, permuted and new rows, rows of NaN that must
// not be read; and the error measure of the results.

#include "kda/conv-oracle.h"
#include "kda/scan-oracle.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace kda_cases {

using namespace kda_oracle;

inline std::mt19937 rng(1);

inline std::vector<float> normal(size_t n, float mean = 0, float sd = 1) {
    std::normal_distribution<float> d(mean, sd);
    std::vector<float>              x(n);
    for (auto & y : x) {
        y = d(rng);
    }
    return x;
}

// Normalised mean square error; values below 1e-30 count as zeros.
template <typename A, typename B> inline double nmse(const A * x, const B * y, size_t n) {
    double err = 0, ref = 1e-60 * n;
    for (size_t i = 0; i < n; ++i) {
        err += ((double) x[i] - y[i]) * ((double) x[i] - y[i]);
        ref += (double) y[i] * y[i];
    }
    return err / ref;
}

inline bool same_bits(const std::vector<float> & x, const std::vector<float> & y) {
    return x.size() == y.size() && memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

// Rows of the sequences: permuted, or in place; the row of a new sequence is NaN.
template <typename Inputs> void choose_rows(Inputs & x, int64_t S, int64_t n_rows, bool new_seq, bool in_place) {
    x.rows.resize(n_rows);
    std::iota(x.rows.begin(), x.rows.end(), 0);
    if (!in_place) {
        std::shuffle(x.rows.begin(), x.rows.end(), rng);
    }
    x.rows.resize(S);
    x.zero_row = -1;
    if (new_seq) {
        x.zero_row = x.rows[S - 1] = in_place ? S : 0;
        const size_t size          = x.cache.size() / n_rows;
        std::fill_n(x.cache.begin() + x.zero_row * size, size, NAN);
    }
}

static const char * const gates[] = { "ordinary", "strong",   "deadly", "open",    "beta0",
                                      "beta1",    "parallel", "zero",   "denormal" };

inline scan_inputs
make_scan(const scan_shape & n, const std::string & gate, double lower_bound, bool new_seq, bool in_place) {
    const int64_t D = n.D, H = n.H, n_tokens = n.T * n.S, n_rows = (n.S + 2) * std::min(n.T + 1, n.K);
    scan_inputs   x;
    x.qkv         = normal(D * 3 * H * n_tokens);
    x.f           = normal(D * H * n_tokens, 0, 2);
    x.dt_bias     = normal(D * H, -2, 1);
    x.a           = normal(H, 0, 1);
    x.beta        = normal(H * n_tokens, 0, 2);
    x.gate        = normal(D * H * n_tokens);
    x.norm        = normal(D, 1, 0.2f);
    x.cache       = normal(D * D * H * n_rows, 0, 0.3f);
    x.eps         = 1e-5;
    x.lower_bound = lower_bound;
    for (auto & a : x.a) {
        a = -expf(a);
    }
    if (gate == "strong") {
        x.f = normal(D * H * n_tokens, 10, 10);  // log-gates of -20 and stronger
    } else if (gate == "deadly") {
        x.f = normal(D * H * n_tokens, 0, 40);  // from -700 to 0 within one token
        std::fill(x.a.begin(), x.a.end(), -7.0f);
    } else if (gate == "open") {
        x.f = normal(D * H * n_tokens, -12, 2);  // a decay of nearly 1
    } else if (gate == "small") {
        std::for_each(x.cache.begin(), x.cache.end(), [](float & s) { s *= 0.1f; });
    } else if (gate == "beta0" || gate == "beta1") {
        std::fill(x.beta.begin(), x.beta.end(), gate == "beta0" ? -200.0f : 200.0f);
    }
    const std::vector<float> common = normal(D);
    for (int64_t r = 0; r < 3 * H * n_tokens; ++r) {
        float * p     = x.qkv.data() + r * D;
        double  norm2 = 1e-6;
        for (int64_t i = 0; i < D; ++i) {
            if (gate == "parallel" && r / H % 3 == 1) {
                p[i] = common[i] + 1e-3f * p[i];
            } else if (gate == "zero" && r % 5 == 0) {
                p[i] = 0;
            } else if (gate == "denormal" && r / H % 3 == 2) {
                p[i] *= 1e-38f;
            } else if (gate == "small" && r / H % 3 == 2) {
                p[i] *= 0.1f;  // the squares of the results are as large as eps
            }
            norm2 += (double) p[i] * p[i];
        }
        if (r / H % 3 < 2) {
            for (int64_t i = 0; i < D; ++i) {
                p[i] *= (r / H % 3 == 0 ? 1.0 / sqrt((double) D) : 1.0) / sqrt(norm2);
            }
        }
    }
    if (gate == "denormal") {
        for (auto & s : x.cache) {
            s *= 1e-38f;
        }
    }
    choose_rows(x, n.S, n_rows, new_seq, in_place);
    return x;
}

inline conv_inputs make_conv(const conv_shape & n, bool new_seq, bool in_place) {
    const int64_t C = n.D * n.H, n_rows = (n.S + 2) * std::min(n.T + 1, n.K);
    conv_inputs   x;
    for (int p = 0; p < 3; ++p) {
        x.x[p] = normal(C * n.T * n.S, 0, p == 1 ? 1e-3f : 2);
        x.w[p] = normal(4 * C, 0, 0.5f);
    }
    std::fill_n(x.x[0].begin(), n.D, 0.0f);
    x.cache = normal(9 * C * n_rows);
    x.eps   = 3e-6;
    choose_rows(x, n.S, n_rows, new_seq, in_place);
    return x;
}

}  // namespace kda_cases
