#pragma once

// The nodes of the KDA operators with the inputs of kda-cases.h, for tests that use the kernels through ggml.

#include "check.h"
#include "ggml-backend.h"
#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"
#include "ggml.h"
#include "kda-cases.h"

#include <cstring>

namespace kda_cases {

// Row [b, c, d] of a tensor in the host's memory.
inline char * row_of(const ggml_tensor * t, int64_t b, int64_t c = 0, int64_t d = 0) {
    return (char *) t->data + b * t->nb[1] + c * t->nb[2] + d * t->nb[3];
}

// Writes x to a tensor of a backend whose rows may be non-contiguous.
template <typename T> void put(ggml_tensor * t, const std::vector<T> & x) {
    CHECK((int64_t) x.size() == ggml_nelements(t));
    size_t n = 0;
    for (int64_t d = 0; d < t->ne[3]; ++d) {
        for (int64_t c = 0; c < t->ne[2]; ++c) {
            for (int64_t b = 0; b < t->ne[1]; ++b, n += t->ne[0]) {
                const size_t offset = b * t->nb[1] + c * t->nb[2] + d * t->nb[3];
                ggml_backend_tensor_set(t, x.data() + n, offset, t->ne[0] * sizeof(T));
            }
        }
    }
}

// An operator's node and its sources. source(a, b, c, d) makes a tensor for activations; its rows may have gaps.
struct scan_node {
    ggml_tensor *qkv, *f, *dt, *a, *beta, *gate, *norm, *cache, *rows, *op;

    template <typename Source>
    scan_node(ggml_context * ctx, const scan_shape & n, const scan_inputs & x, const Source & source) {
        const int64_t size = n.D * n.D * n.H;
        qkv                = source(n.D, 3 * n.H, n.T, n.S);
        f                  = source(n.D, n.H, n.T, n.S);
        dt                 = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n.D * n.H);
        a                  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n.H);
        beta               = source(n.H, n.T, n.S, 1);
        gate               = source(n.D, n.H, n.T, n.S);
        norm               = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n.D);
        cache              = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, size, x.cache.size() / size);
        rows               = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n.S);

        ggml_tensor * src[] = { qkv, f, dt, a, beta, gate, norm, cache, rows };
        op = ggml_kda_scan(ctx, src, { (int32_t) n.K, x.zero_row, (float) x.eps, (float) x.lower_bound });
    }

    void fill(const scan_inputs & x) const {
        put(qkv, x.qkv);
        put(f, x.f);
        put(dt, x.dt_bias);
        put(a, x.a);
        put(beta, x.beta);
        put(gate, x.gate);
        put(norm, x.norm);
        put(cache, x.cache);
        put(rows, x.rows);
    }
};

struct conv_node {
    ggml_tensor *in[3], *w[3], *cache, *rows, *op;

    template <typename Source>
    conv_node(ggml_context * ctx, const conv_shape & n, const conv_inputs & x, const Source & source) {
        const int64_t C = n.D * n.H;
        for (int p = 0; p < 3; ++p) {
            in[p] = source(C, n.T, n.S, 1);
            w[p]  = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 4, 1, C);
        }
        cache = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 9 * C, x.cache.size() / (9 * C));
        rows  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n.S);

        ggml_tensor * src[] = { in[0], in[1], in[2], w[0], w[1], w[2], cache, rows };
        op                  = ggml_kda_conv(ctx, src, { (int32_t) n.D, (int32_t) n.K, x.zero_row, (float) x.eps });
    }

    void fill(const conv_inputs & x) const {
        for (int p = 0; p < 3; ++p) {
            put(in[p], x.x[p]);
            put(w[p], x.w[p]);
        }
        put(cache, x.cache);
        put(rows, x.rows);
    }
};

// Between operator and copy, rows are gathered for the cells after the batch's, as llama.cpp does when n_rs > n_seqs:
// one sequence, in row 1, of a cache of five rows; rows 2 and 3 receive the contents of rows[0] and rows[1], or zeros.
struct extra_rows {
    int32_t from[2];
    int32_t zero_row;  // filled with zeros first; -1: none
    bool    elided;    // whether the operator on the CPU may write to the cache itself
};

static const extra_rows all_extra_rows[] = {
    { { 3, 4 }, -1, true },
    { { 0, 4 }, 4, true },    // a new sequence replaces row 0 in row 2: zeros are read from row 4
    { { 1, 4 }, -1, false },  // reads the row whose new state the operator would have overwritten
    { { 0, 4 }, 1, false },   // the row of zeros is the row written
};

struct gathered_scan {
    extra_rows  extra;
    scan_shape  n;
    scan_inputs x;

    gathered_scan(const extra_rows & extra, int64_t T) :
        extra(extra), n{ 64, 2, T, 1, 1 }, x(make_scan(n, "ordinary", -INFINITY, false, false)) {
        x.cache    = normal(size() * 5, 0, 0.3f);
        x.rows     = { 1 };
        x.zero_row = extra.zero_row;
    }

    int64_t size() const { return n.D * n.D * n.H; }

    int64_t n_out() const { return n.D * n.H * n.T; }

    std::string name() const {
        return text("extra rows from %d and %d, zeros in %d, T=%d", extra.from[0], extra.from[1], extra.zero_row,
                    (int) n.T);
    }

    // The cache after the copy.
    std::vector<float> want() const {
        std::vector<float> cache = x.cache;
        const auto         row   = [&](int32_t i) { return cache.begin() + i * size(); };
        if (extra.zero_row >= 0) {
            std::fill_n(row(extra.zero_row), size(), 0.0f);
        }
        std::vector<float> gathered;
        for (const int32_t i : extra.from) {
            gathered.insert(gathered.end(), row(i), row(i) + size());
        }
        std::copy(gathered.begin(), gathered.end(), row(2));
        const scan_result y = scan(n, x);
        std::copy(y.states.begin(), y.states.end(), row(1));
        return cache;
    }
};

struct gathered_nodes {
    scan_node                  scan;
    ggml_tensor *              moved;
    std::vector<ggml_tensor *> all;  // in their order

    template <typename Source>
    gathered_nodes(ggml_context * ctx, const gathered_scan & g, const Source & source) : scan(ctx, g.n, g.x, source) {
        ggml_tensor * const cache = scan.cache;
        const int64_t       size = g.size(), n_out = g.n_out();
        const size_t        row = cache->nb[1];
        moved                   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 2);
        all                     = { scan.op };
        if (g.extra.zero_row >= 0) {
            all.push_back(ggml_fill_inplace(ctx, ggml_view_1d(ctx, cache, size, g.extra.zero_row * row), 0.0f));
        }
        ggml_tensor * others = ggml_view_2d(ctx, cache, size, 2, row, 2 * row);
        all.push_back(ggml_cpy(ctx, ggml_get_rows(ctx, cache, moved), others));
        ggml_tensor * from = ggml_view_3d(ctx, scan.op, size, 1, 1, size * 4, size * 4, n_out * 4);
        all.push_back(ggml_cpy(ctx, from, ggml_view_3d(ctx, cache, size, 1, 1, row, 5 * row, row)));
        all.push_back(ggml_scale(ctx, ggml_view_1d(ctx, scan.op, n_out, 0), 1.0f));
    }

    void fill(const gathered_scan & g) const {
        scan.fill(g.x);
        put(moved, std::vector<int32_t>(g.extra.from, g.extra.from + 2));
    }
};

}  // namespace kda_cases
