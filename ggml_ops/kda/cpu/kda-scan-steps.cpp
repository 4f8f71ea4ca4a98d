// KDA scan token by token, vectorized. For one token, with row m_j of the state (one for each value channel j):
//
//   d_j = beta (v_j - m_j . (e k))        o_j = m_j . (e q) + (k . q) d_j        m_j <- e m_j + k d_j
//
// so both products are computed in one pass over the old state and the state is written once. VW rows are processed
// together: they stay in the L1 cache between the passes and across the tokens of a group.

#include "kda-scan-gate.h"
#include "kda-scan-impl.h"
#include "kimi-simd.h"

#include <algorithm>
#include <cstring>

namespace kda {

#if defined(KIMI_SIMD)

// tokens prepared together: their vectors and a tile of the state fit in the L1 cache
constexpr int TOKENS_TOGETHER = 8;

template <int D> struct step_vectors {
    float decay[TOKENS_TOGETHER][D];
    float k[TOKENS_TOGETHER][D];
    float decay_k[TOKENS_TOGETHER][D];
    float decay_q[TOKENS_TOGETHER][D];
    float kq[TOKENS_TOGETHER];
    float beta[TOKENS_TOGETHER];
};

template <int D> static void prepare(const scan_head & head, int64_t t, step_vectors<D> & p, int n) {
    const float * k = head.k[t];
    const float * q = head.q[t];
    decays<D>(head, t, p.decay[n]);

    vf kq = v_zero();
    for (int i = 0; i < D; i += VW) {
        const vf e  = v_load(p.decay[n] + i);
        const vf vk = v_load(k + i);
        const vf vq = v_load(q + i);
        v_store(p.k[n] + i, vk);
        v_store(p.decay_k[n] + i, v_mul(e, vk));
        v_store(p.decay_q[n] + i, v_mul(e, vq));
        kq = v_fma(vk, vq, kq);
    }
    p.kq[n]   = v_hsum(kq);
    p.beta[n] = sigmoid(head.beta[t][0]);
}

// One token on VW rows of the state.
template <int D>
static KIMI_INLINE void
step(const step_vectors<D> & p, int n, const float * v, const float * from, float * to, float * out) {
    constexpr int NV = D / VW;

    vf sk[VW];
    vf sq[VW];
    {
        vf ek[NV];
        vf eq[NV];
        KIMI_UNROLL
        for (int i = 0; i < NV; ++i) {
            ek[i] = v_load(p.decay_k[n] + i * VW);
            eq[i] = v_load(p.decay_q[n] + i * VW);
        }
        KIMI_UNROLL
        for (int r = 0; r < VW; ++r) {
            vf a = v_zero();
            vf b = v_zero();
            KIMI_UNROLL
            for (int i = 0; i < NV; ++i) {
                const vf m = v_load(from + r * D + i * VW);
                a          = v_fma(m, ek[i], a);
                b          = v_fma(m, eq[i], b);
            }
            sk[r] = a;
            sq[r] = b;
        }
    }

    const vf d = v_mul(v_set1(p.beta[n]), v_sub(v_load(v), v_sum_rows(sk)));
    v_store(out, v_fma(v_set1(p.kq[n]), d, v_sum_rows(sq)));

    alignas(64) float delta[VW];
    v_store(delta, d);
    {
        vf e[NV];
        vf k[NV];
        KIMI_UNROLL
        for (int i = 0; i < NV; ++i) {
            e[i] = v_load(p.decay[n] + i * VW);
            k[i] = v_load(p.k[n] + i * VW);
        }
        for (int r = 0; r < VW; ++r) {
            const vf dr = v_set1(delta[r]);
            KIMI_UNROLL
            for (int i = 0; i < NV; ++i) {
                const vf m = v_load(from + r * D + i * VW);
                v_store(to + r * D + i * VW, v_fma(k[i], dr, v_mul(e[i], m)));
            }
        }
    }
}

template <int D> static void steps(const scan_head & head, const scan_range & range, float * scratch) {
    static_assert(sizeof(step_vectors<D>) <= sizeof(float) * (6 * CHUNK * D), "scan_scratch_floats");
    step_vectors<D> & p = *(step_vectors<D> *) scratch;

    for (int64_t g = range.t0; g < range.t1; g += TOKENS_TOGETHER) {
        const int n_group = (int) std::min<int64_t>(TOKENS_TOGETHER, range.t1 - g);
        for (int n = 0; n < n_group; ++n) {
            prepare<D>(head, g + n, p, n);
        }
        for (int64_t j = range.j0; j < range.j1; j += VW) {
            for (int n = 0; n < n_group; ++n) {
                const int64_t t    = g + n;
                const float * from = head.state_before(t);
                float *       to   = head.state_after(t);
                if (from == nullptr) {
                    memset(to + j * D, 0, VW * D * sizeof(float));
                    from = to;
                }
                step<D>(p, n, head.v[t] + j, from + j * D, to + j * D, head.out_row(t) + j);
            }
        }
        if (range.finish) {
            finish<D>(head, g, n_group, head.out_row(g), head.out_stride);
        }
    }
}

template <int D> static void finish_all(const scan_head & head, int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; t += CHUNK) {
        finish<D>(head, t, (int) std::min<int64_t>(CHUNK, t1 - t), head.out_row(t), head.out_stride);
    }
}

void scan_steps(const scan_head & head, const scan_range & range, float * scratch) {
    with_head_size(head.D, [&](auto D) { steps<D>(head, range, scratch); });
}

void scan_finish(const scan_head & head, int64_t t0, int64_t t1) {
    with_head_size(head.D, [&](auto D) { finish_all<D>(head, t0, t1); });
}

#else

void scan_steps(const scan_head &, const scan_range &, float *) {}

void scan_finish(const scan_head &, int64_t, int64_t) {}

#endif

}  // namespace kda
