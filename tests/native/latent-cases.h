#pragma once

// Cases of latent attention for the kernels of GPUs: which shapes, masks and values.

#include "latent-attn-case.h"

struct LatentSetup {
    LatentShape shape;
    size_t      before = 0;  // bytes before the cache, which change its alignment
    int64_t     n_rows = 0;  // rows of the result to compare, 1: the first only; 0: all
};

// Flat and peaked scores; growing and shrinking values; large and small queries, and a query that sees small values
// next to one that sees large ones.
inline void add_value_cases(std::vector<LatentSetup> & cases,
                            const LatentShape &        scores,
                            const LatentShape &        values,
                            const LatentShape &        queries) {
    for (const float spread : { 0.0f, 5.0f, 40.0f }) {
        LatentShape s = scores;
        s.spread      = spread;
        cases.push_back({ s });
    }
    const float deviations[][2] = { { 1e-5f, 1e-5f }, { 1e-4f, 100.0f }, { 100.0f, 1e-4f } };
    for (const auto & [first, last] : deviations) {
        LatentShape s = values;
        s.spread      = 0.05f;
        s.first       = first;
        s.last        = last;
        cases.push_back({ s });
    }
    for (const float deviation : { 1e-6f, 1e6f }) {
        LatentShape s = queries;
        s.query       = deviation;
        cases.push_back({ s });
    }
    LatentShape varied = queries.with(2, 2);
    varied.first       = 1e-3f;
    varied.last        = 1e3f;
    cases.push_back({ varied, 0, 1 });
}

inline std::vector<LatentSetup> absorbed_cases(ggml_type type) {
    std::vector<LatentSetup> cases;
    LatentShape              base;
    base.cache   = type;
    base.n_heads = 4;
    for (const int64_t n_keys : { 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 129 }) {
        LatentShape s = base.with(n_keys % 2 ? 1 : 2, n_keys);
        s.poison      = true;
        cases.push_back({ s });
    }
    for (const char * mask : { "none", "mixed", "blind" }) {
        for (const int64_t n_heads : { 1, 3, 32 }) {
            LatentShape s = base.with(n_heads == 32 ? 2 : 9, 100);
            s.n_heads     = n_heads;
            s.n_streams   = n_heads == 3 ? 2 : 1;
            s.mask        = mask;
            s.poison      = true;
            cases.push_back({ s });
        }
    }
    LatentShape many = base.with(1, 300);
    many.n_heads     = 16;
    add_value_cases(cases, many, base.with(1, 300), base.with(1, 70));
    LatentShape kimi = base.with(1, 513);
    kimi.n_heads     = 32;
    cases.push_back({ kimi });
    // streams whose caches are only 4-byte aligned, if the type allows it
    LatentShape apart = base.with(1, 65);
    apart.n_streams   = 2;
    cases.push_back({ apart });
    if (ggml_is_quantized(type)) {
        cases.push_back({ apart, 4 });
    }
    return cases;
}
