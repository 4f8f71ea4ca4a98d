// KDA scan in chunks of CHUNK tokens, vectorized. Within a chunk, with e_t the decay of token t, the products
//
//   P_i = e_0 ... e_i            decay from the chunk's start to token i, inclusive
//   E_ij = e_{j+1} ... e_i       decay from token j to token i
//
// are computed by multiplication only. All are <= 1 however strong the gates are: no log-gate is ever negated.
// The chunk then is (README, Chunked form)
//
//   L_ij = beta_i k_i . (E_ij k_j), j < i        A_ij = q_i . (E_ij k_j), j <= i
//   U = (I + L)^-1 beta (V - (P k) S)            O = (P q) S + A U            S <- P_last S + (E_last k)^T U
//
// The matmuls are computed in blocks of value channels, which are independent. For them the state is stored by columns:
// lanes are value channels, so there are no sums across lanes.

#include "kda-scan-gate.h"
#include "kda-scan-impl.h"
#include "kimi-simd.h"

#include <algorithm>
#include <cstring>

namespace kda {

#if defined(KIMI_SIMD)

constexpr int JB = 2 * VW;  // value channels per block
// rows per register tile: JB columns wide, so twice as many accumulators
constexpr int RT = VW == 8 ? 4 : 8;

template <int D> struct chunk_vectors {
    float decayed[2 * CHUNK][D];  // P_i k_i, then P_i q_i
    float to_end[CHUNK][D];       // E_last,j k_j
    float decay[CHUNK][D];        // e_i
    float total[D];               // P_last
    float L[CHUNK][CHUNK];
    float A[CHUNK][CHUNK];
    float beta[CHUNK];
    float product[2 * CHUNK][JB];  // (P k) S, overwritten by U; then (P q) S
    float out[CHUNK][D];           // O
};

// k_j <- e_i k_j, and its dot products with k_i and q_i, for N neighbouring j
template <int D, int N>
static KIMI_INLINE void
pair_products(float (*kj)[D], const float * e, const float * k, const float * q, vf * ek, vf * eq) {
    vf a[N] = {};
    vf b[N] = {};
    for (int n = 0; n < D; n += VW) {
        const vf vk = v_load(k + n);
        const vf vq = v_load(q + n);
        const vf ve = v_load(e + n);
        KIMI_UNROLL
        for (int j = 0; j < N; ++j) {
            const vf x = v_mul(v_load(kj[j] + n), ve);
            v_store(kj[j] + n, x);
            a[j] = v_fma(x, vk, a[j]);
            b[j] = v_fma(x, vq, b[j]);
        }
    }
    KIMI_UNROLL
    for (int j = 0; j < N; ++j) {
        ek[j] = a[j];
        eq[j] = b[j];
    }
}

// Everything that does not depend on the value channel.
template <int D> static void prepare(const scan_head & head, int64_t t0, chunk_vectors<D> & p) {
    for (int i = 0; i < CHUNK; ++i) {
        decays<D>(head, t0 + i, p.decay[i]);
    }
    for (int i = 0; i < D; i += VW) {
        v_store(p.total + i, v_set1(1.0f));
    }

    for (int i = 0; i < CHUNK; ++i) {
        const float * k = head.k[t0 + i];
        const float * q = head.q[t0 + i];

        vf ek[CHUNK] = {};
        vf eq[CHUNK] = {};
        vf kq        = v_zero();
        for (int n = 0; n < D; n += VW) {
            const vf vk = v_load(k + n);
            const vf vq = v_load(q + n);
            const vf P  = v_mul(v_load(p.total + n), v_load(p.decay[i] + n));
            v_store(p.total + n, P);
            v_store(p.decayed[i] + n, v_mul(P, vk));
            v_store(p.decayed[CHUNK + i] + n, v_mul(P, vq));
            v_store(p.to_end[i] + n, vk);
            kq = v_fma(vk, vq, kq);
        }
        eq[i] = kq;

        constexpr int N = 4;
        int           j = 0;
        for (; j + N <= i; j += N) {
            pair_products<D, N>(p.to_end + j, p.decay[i], k, q, ek + j, eq + j);
        }
        for (; j < i; ++j) {
            pair_products<D, 1>(p.to_end + j, p.decay[i], k, q, ek + j, eq + j);
        }

        p.beta[i]     = sigmoid(head.beta[t0 + i][0]);
        const vf beta = v_set1(p.beta[i]);
        for (int j = 0; j < CHUNK; j += VW) {
            v_store(p.L[i] + j, v_mul(beta, v_sum_rows(ek + j)));
            v_store(p.A[i] + j, v_sum_rows(eq + j));
        }
    }
}

// product = decayed * S, where S is D rows of JB value channels. Calls `ahead` before each register tile.
constexpr int TILES = 2 * CHUNK / RT;

template <int D, typename F> static void multiply(chunk_vectors<D> & p, const float * S, F && ahead) {
    for (int r0 = 0; r0 < 2 * CHUNK; r0 += RT) {
        ahead(r0 / RT);
        vf acc[RT][2] = {};
        for (int i = 0; i < D; ++i) {
            const vf s0 = v_load(S + i * JB);
            const vf s1 = v_load(S + i * JB + VW);
            KIMI_UNROLL
            for (int r = 0; r < RT; ++r) {
                const vf x = v_set1(p.decayed[r0 + r][i]);
                acc[r][0]  = v_fma(x, s0, acc[r][0]);
                acc[r][1]  = v_fma(x, s1, acc[r][1]);
            }
        }
        KIMI_UNROLL
        for (int r = 0; r < RT; ++r) {
            v_store(p.product[r0 + r], acc[r][0]);
            v_store(p.product[r0 + r] + VW, acc[r][1]);
        }
    }
}

// U by forward substitution and O, for the value channels j.. of one block
template <int D> static void solve(const scan_head & head, int64_t t0, int64_t j, chunk_vectors<D> & p) {
    for (int c = 0; c < JB; c += VW) {
        vf u[CHUNK];
        KIMI_UNROLL
        for (int i = 0; i < CHUNK; ++i) {
            u[i] = v_mul(v_set1(p.beta[i]), v_sub(v_load(head.v[t0 + i] + j + c), v_load(p.product[i] + c)));
        }
        KIMI_UNROLL
        for (int n = 0; n < CHUNK; ++n) {
            KIMI_UNROLL
            for (int i = n + 1; i < CHUNK; ++i) {
                u[i] = v_fnma(v_set1(p.L[i][n]), u[n], u[i]);
            }
            v_store(p.product[n] + c, u[n]);
        }

        vf o[CHUNK];
        KIMI_UNROLL
        for (int i = 0; i < CHUNK; ++i) {
            o[i] = v_load(p.product[CHUNK + i] + c);
        }
        KIMI_UNROLL
        for (int n = 0; n < CHUNK; ++n) {
            const vf un = v_load(p.product[n] + c);
            KIMI_UNROLL
            for (int i = n; i < CHUNK; ++i) {
                o[i] = v_fma(v_set1(p.A[i][n]), un, o[i]);
            }
            v_store(p.out[n] + j + c, o[n]);
        }
    }
}

// S <- P_last S + (E_last k)^T U
template <int D> static void update(const chunk_vectors<D> & p, float * S) {
    for (int i0 = 0; i0 < D; i0 += RT) {
        vf acc[RT][2];
        KIMI_UNROLL
        for (int r = 0; r < RT; ++r) {
            const vf x = v_set1(p.total[i0 + r]);
            acc[r][0]  = v_mul(x, v_load(S + (i0 + r) * JB));
            acc[r][1]  = v_mul(x, v_load(S + (i0 + r) * JB + VW));
        }
        for (int n = 0; n < CHUNK; ++n) {
            const vf u0 = v_load(p.product[n]);
            const vf u1 = v_load(p.product[n] + VW);
            KIMI_UNROLL
            for (int r = 0; r < RT; ++r) {
                const vf x = v_set1(p.to_end[n][i0 + r]);
                acc[r][0]  = v_fma(x, u0, acc[r][0]);
                acc[r][1]  = v_fma(x, u1, acc[r][1]);
            }
        }
        KIMI_UNROLL
        for (int r = 0; r < RT; ++r) {
            v_store(S + (i0 + r) * JB, acc[r][0]);
            v_store(S + (i0 + r) * JB + VW, acc[r][1]);
        }
    }
}

// from [ROWS][COLUMNS] to [COLUMNS][ROWS]
template <int ROWS, int COLUMNS> static void transpose(const float * from, float * to) {
    for (int row = 0; row < ROWS; row += VW) {
        for (int column = 0; column < COLUMNS; column += VW) {
            vf tile[VW];
            KIMI_UNROLL
            for (int r = 0; r < VW; ++r) {
                tile[r] = v_load(from + (row + r) * COLUMNS + column);
            }
            v_transpose(tile);
            KIMI_UNROLL
            for (int r = 0; r < VW; ++r) {
                v_store(to + (column + r) * ROWS + row, tile[r]);
            }
        }
    }
}

// Prefetches the rows of tokens [t, t + n) of a head: those that its next chunk reads, and those that it writes.
template <int D> static KIMI_INLINE void rows_ahead(const scan_head & head, int64_t t, int64_t n) {
    for (int64_t i = t; i < t + n; ++i) {
        prefetch(head.f[i], D);
        prefetch(head.k[i], D);
        prefetch(head.q[i], D);
        prefetch(head.v[i], D);
        prefetch(head.gate[i], D);
        prefetch<true>(head.out_row(i), D);
    }
}

// Prefetches part `part` of `n_parts` of the next chunk, or of the next head's state and first chunk.
template <int D>
static KIMI_INLINE void ahead(const scan_head & head, const scan_range & range, int64_t t, int part, int n_parts) {
    const int64_t i0 = CHUNK * part / n_parts;
    const int64_t i1 = CHUNK * (part + 1) / n_parts;
    if (t + CHUNK < range.t1) {
        rows_ahead<D>(head, t + CHUNK + i0, i1 - i0);
    } else if (range.next) {
        rows_ahead<D>(*range.next, i0, std::min(i1, range.next->T) - i0);
        if (range.next->state_in) {
            const int64_t j0 = D * part / n_parts;
            prefetch(range.next->state_in + j0 * D, (D * (part + 1) / n_parts - j0) * D);
        }
    }
}

template <int D> static void chunks(const scan_head & head, const scan_range & range, float * scratch) {
    static_assert(sizeof(chunk_vectors<D>) <= sizeof(float) * (scan_scratch_floats(D) - D * D), "scan_scratch_floats");
    float *            S  = scratch;
    chunk_vectors<D> & p  = *(chunk_vectors<D> *) (scratch + D * D);
    const int64_t      j0 = range.j0;
    const int64_t      j1 = range.j1;

    const float * from = head.state_before(range.t0);
    for (int64_t j = j0; j < j1; j += JB) {
        if (from) {
            transpose<JB, D>(from + j * D, S + j * D);
        } else {
            memset(S + j * D, 0, JB * D * sizeof(float));
        }
    }
    const int n_tiles = TILES * (int) ((j1 - j0) / JB);  // register tiles per chunk
    for (int64_t t = range.t0; t < range.t1; t += CHUNK) {
        prepare<D>(head, t, p);
        for (int64_t j = j0; j < j1; j += JB) {
            const int first = TILES * (int) ((j - j0) / JB);
            // prefetches the next data while this chunk multiplies
            multiply<D>(p, S + j * D, [&](int tile) { ahead<D>(head, range, t, first + tile, n_tiles); });
            solve<D>(head, t, j, p);
            update<D>(p, S + j * D);
        }
        if (range.finish) {
            finish<D>(head, t, CHUNK, &p.out[0][0], D);
        } else {
            for (int i = 0; i < CHUNK; ++i) {
                memcpy(head.out_row(t + i) + j0, p.out[i] + j0, (j1 - j0) * sizeof(float));
            }
        }
    }
    float * to = head.state_after(range.t1 - 1);
    for (int64_t j = j0; j < j1; j += JB) {
        transpose<D, JB>(S + j * D, to + j * D);
    }
}

void scan_chunks(const scan_head & head, const scan_range & range, float * scratch) {
    with_head_size(head.D, [&](auto D) { chunks<D>(head, range, scratch); });
}

#else

void scan_chunks(const scan_head &, const scan_range &, float *) {}

#endif

}  // namespace kda
