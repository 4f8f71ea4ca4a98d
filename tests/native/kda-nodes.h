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

}  // namespace kda_cases
