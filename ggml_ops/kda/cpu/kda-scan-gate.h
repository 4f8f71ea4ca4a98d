#pragma once

// The gates and the output norm of the KDA scan, vectorized; used by the stepwise and by the chunked kernel.

#include "kda-scan-impl.h"
#include "kimi-simd.h"

#if defined(KIMI_SIMD)

namespace kda {

using namespace kimi_simd;

// decay = e^(log-gate) of token t. In two passes: the dependency chain of one vector through both is too long for a CPU
// to overlap it with the next one's.
template <int D> static KIMI_INLINE void decays(const scan_head & head, int64_t t, float * decay) {
    const float * f     = head.f[t];
    const float * dt    = head.dt_bias;
    const vf      a     = v_set1(head.a);
    const vf      bound = v_set1(head.lower_bound);
    if (head.lower_bound > -INFINITY) {
        for (int i = 0; i < D; i += VW) {
            const vf x = v_mul(a, v_add(v_load(f + i), v_load(dt + i)));
            v_store(decay + i, v_mul(bound, v_sigmoid(v_sub(v_zero(), x))));
        }
    } else {
        for (int i = 0; i < D; i += VW) {
            v_store(decay + i, v_mul(a, v_softplus(v_add(v_load(f + i), v_load(dt + i)))));
        }
    }
    for (int i = 0; i < D; i += VW) {
        v_store(decay + i, v_exp(v_load(decay + i)));
    }
}

// out = norm * rms_norm(o) * sigmoid(gate) for tokens [t0, t0 + n), n <= CHUNK; o: their rows, row stride `stride`
// floats, may be equal to out. A token's result does not depend on n.
template <int D>
static KIMI_INLINE void finish(const scan_head & head, int64_t t0, int n, const float * o, size_t stride) {
    alignas(64) float scale[CHUNK];
    for (int i0 = 0; i0 < n; i0 += VW) {
        vf square[VW] = {};
        for (int i = 0; i < VW && i0 + i < n; ++i) {
            vf sum = v_zero();
            for (int j = 0; j < D; j += VW) {
                const vf x = v_load(o + (i0 + i) * stride + j);
                sum        = v_fma(x, x, sum);
            }
            square[i] = sum;
        }
        const vf mean = v_mul(v_sum_rows(square), v_set1(1.0f / D));
        v_store(scale + i0, v_div(v_set1(1.0f), v_sqrt(v_add(mean, v_set1(head.eps)))));
    }
    for (int i = 0; i < n; ++i) {
        const float * gate = head.gate[t0 + i];
        float *       out  = head.out_row(t0 + i);
        const vf      s    = v_set1(scale[i]);
        for (int j = 0; j < D; j += VW) {
            const vf normed = v_mul(v_mul(v_load(o + i * stride + j), s), v_load(head.norm + j));
            v_store(out + j, v_mul(normed, v_sigmoid(v_load(gate + j))));
        }
    }
}

}  // namespace kda

#endif
