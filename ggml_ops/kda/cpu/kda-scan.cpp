// KDA scan on the CPU: splits the operator into heads, selects the kernel, and distributes the work.
//
// A unit of work is one head of one sequence, or, if that is faster, a block of its value channels. Every value is
// computed by the same instructions for any split, so results are bit-identical for any number of threads.

#include "kda-cpu.h"

#include "ggml-cpu-impl.h"
#include "ggml-kda-scan.h"
#include "kda-scan-impl.h"
#include "kimi-simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kda {

using namespace kimi_simd;

// The break-even point of chunks (README, When chunks are used).
static_assert(GGML_KDA_SCAN_CHUNKED_FROM >= CHUNK, "at least one chunk");

// What every block of a head repeats (decays, products of a chunk's tokens) takes as long as so many value channels.
constexpr int64_t REPEATED = 48;

// Minimum number of value channels per call of a vector path; 0 if this build has none.
#if defined(KIMI_SIMD)
constexpr int64_t COLUMN_TILE = 2 * VW;
#else
constexpr int64_t COLUMN_TILE = 0;
#endif

static float log_gate(const scan_head & head, int64_t t, int64_t i) {
    const float x = head.f[t][i] + head.dt_bias[i];
    if (head.lower_bound > -INFINITY) {
        return head.lower_bound * sigmoid(-head.a * x);
    }
    return head.a * (x > 20.0f ? x : log1pf(expf(x)));
}

// Slot T, if it exists, holds the state before the first token.
static void keep_state_found(const scan_head & head, int64_t j0, int64_t j1) {
    if (head.T >= head.n_slots) {
        return;
    }
    float *      to   = head.state_out + head.T * head.slot_stride + j0 * head.D;
    const size_t size = (j1 - j0) * head.D * sizeof(float);
    if (head.state_in) {
        memcpy(to, head.state_in + j0 * head.D, size);
    } else {
        memset(to, 0, size);
    }
}

void scan_reference(const scan_head & head, float * scratch) {
    const int64_t D = head.D;
    keep_state_found(head, 0, D);

    for (int64_t t = 0; t < head.T; ++t) {
        const float * from  = head.state_before(t);
        float *       to    = head.state_after(t);
        float *       out   = head.out_row(t);
        float *       decay = scratch;
        const float   beta  = sigmoid(head.beta[t][0]);

        for (int64_t i = 0; i < D; ++i) {
            decay[i] = expf(log_gate(head, t, i));
        }

        float square = 0.0f;
        for (int64_t j = 0; j < D; ++j) {
            float * row      = to + j * D;
            float   recalled = 0.0f;
            for (int64_t i = 0; i < D; ++i) {
                row[i] = from ? decay[i] * from[j * D + i] : 0.0f;
                recalled += row[i] * head.k[t][i];
            }
            const float delta = beta * (head.v[t][j] - recalled);
            out[j]            = 0.0f;
            for (int64_t i = 0; i < D; ++i) {
                row[i] += head.k[t][i] * delta;
                out[j] += row[i] * head.q[t][i];
            }
            square += out[j] * out[j];
        }

        const float scale = 1.0f / sqrtf(square / D + head.eps);
        for (int64_t j = 0; j < D; ++j) {
            out[j] *= scale * head.norm[j] * sigmoid(head.gate[t][j]);
        }
    }
}

static token_rows rows_of(const ggml_tensor * t, int64_t head, int64_t seq) {
    const char * data = (const char *) t->data + head * t->nb[1] + seq * t->nb[3];
    return { (const float *) data, t->nb[2] / sizeof(float) };
}

static scan_head head_of(const ggml_tensor * dst, const ggml_kda_state_dest * dest, int64_t h, int64_t s) {
    const ggml_tensor *        qkv    = dst->src[GGML_KDA_SCAN_QKV];
    const ggml_tensor *        f      = dst->src[GGML_KDA_SCAN_F];
    const ggml_tensor *        beta   = dst->src[GGML_KDA_SCAN_BETA];
    const ggml_tensor *        cache  = dst->src[GGML_KDA_SCAN_CACHE];
    const ggml_kda_scan_params params = ggml_kda_scan_get_params(dst);

    const int64_t D = f->ne[0];
    const int64_t H = f->ne[1];
    const int64_t T = f->ne[2];
    const int64_t S = f->ne[3];

    const int32_t row = ((const int32_t *) dst->src[GGML_KDA_SCAN_ROWS]->data)[s];
    GGML_ASSERT(row >= 0 && row < cache->ne[1]);

    scan_head head;
    head.D           = D;
    head.T           = T;
    head.q           = rows_of(qkv, h, s);
    head.k           = rows_of(qkv, H + h, s);
    head.v           = rows_of(qkv, 2 * H + h, s);
    head.f           = rows_of(f, h, s);
    head.gate        = rows_of(dst->src[GGML_KDA_SCAN_GATE], h, s);
    head.beta.data   = (const float *) ((const char *) beta->data + s * beta->nb[2]) + h;
    head.beta.stride = beta->nb[1] / sizeof(float);
    head.dt_bias     = (const float *) dst->src[GGML_KDA_SCAN_DT_BIAS]->data + h * D;
    head.norm        = (const float *) dst->src[GGML_KDA_SCAN_NORM]->data;
    head.a           = ((const float *) dst->src[GGML_KDA_SCAN_A]->data)[h];
    head.lower_bound = params.lower_bound;
    head.eps         = params.eps;
    head.n_slots     = params.n_snapshots;

    const float * state = (const float *) ((const char *) cache->data + row * cache->nb[1]);
    head.state_in       = row == params.zero_row ? nullptr : state + h * D * D;

    head.out        = (float *) dst->data + s * T * D * H + h * D;
    head.out_stride = D * H;

    if (dest) {
        head.state_out   = (float *) (dest->data + s * dest->seq_stride) + h * D * D;
        head.slot_stride = dest->slot_stride / sizeof(float);
    } else {
        head.state_out   = (float *) dst->data + T * S * D * H + (s * H + h) * D * D;
        head.slot_stride = S * H * D * D;
    }
    return head;
}

// All tokens of value channels [j0, j1): chunks as long as the states inside them are not requested, then steps.
static void
scan_columns(const scan_head & head, const scan_head * next, int64_t j0, int64_t j1, bool finish, float * scratch) {
    keep_state_found(head, j0, j1);
    int64_t t = 0;
    if (head.T >= GGML_KDA_SCAN_CHUNKED_FROM) {
        const int64_t n = (head.T - head.n_slots + 1) / CHUNK * CHUNK;
        if (n >= CHUNK) {
            scan_chunks(head, { 0, n, j0, j1, finish, n == head.T ? next : nullptr }, scratch);
        }
        t = std::max<int64_t>(n, 0);
    }
    scan_steps(head, { t, head.T, j0, j1, finish, nullptr }, scratch);
}

// Blocks of value channels per head: the number with the shortest time. Each doubling saves a quarter of it or more,
// because blocks have a barrier before the output norm.
static int64_t blocks_per_head(int64_t D, int64_t n_heads, int n_threads) {
    const auto time = [&](int64_t n) { return (n_heads * n + n_threads - 1) / n_threads * (D / n + REPEATED); };
    int64_t    best = 1;
    for (int64_t n = 2; COLUMN_TILE > 0 && D % (n * COLUMN_TILE) == 0; n *= 2) {
        best = 4 * time(n) <= 3 * time(best) ? n : best;
    }
    return best;
}

}  // namespace kda

size_t ggml_kda_scan_work_size(const ggml_tensor * op, int n_tasks) {
    return kda::scan_scratch_floats(op->src[GGML_KDA_SCAN_F]->ne[0]) * sizeof(float) * n_tasks;
}

void ggml_compute_forward_kda_scan(const ggml_compute_params * params,
                                   ggml_tensor *               dst,
                                   const ggml_kda_state_dest * dest) {
    using namespace kda;

    const ggml_tensor * f       = dst->src[GGML_KDA_SCAN_F];
    const int64_t       D       = f->ne[0];
    const int64_t       H       = f->ne[1];
    const int64_t       n_heads = H * f->ne[3];

    float * scratch = thread_scratch(params, scan_scratch_floats(D));

    const bool    plain   = params->use_ref || COLUMN_TILE == 0 || !ggml_kda_head_size_supported(D);
    const int64_t blocks  = plain ? 1 : blocks_per_head(D, n_heads, params->nth);
    const int64_t columns = D / blocks;
    const int64_t n_units = n_heads * blocks;

    const int64_t u0 = n_units * params->ith / params->nth;
    const int64_t u1 = n_units * (params->ith + 1) / params->nth;
    for (int64_t u = u0; u < u1; ++u) {
        const int64_t   unit = u / blocks;
        const int64_t   j0   = u % blocks * columns;
        const scan_head head = head_of(dst, dest, unit % H, unit / H);
        if (plain) {
            scan_reference(head, scratch);
        } else {
            const bool      whole = blocks == 1;
            const int64_t   after = whole && u + 1 < u1 ? unit + 1 : unit;
            const scan_head next  = head_of(dst, dest, after % H, after / H);
            scan_columns(head, after > unit ? &next : nullptr, j0, j0 + columns, whole, scratch);
        }
    }

    if (blocks > 1) {
        // the norm needs all channels of a head: after the last block
        ggml_barrier(params->threadpool);
        const int64_t T  = f->ne[2];
        const int64_t n  = n_heads * T;
        const int64_t r0 = n * params->ith / params->nth;
        const int64_t r1 = n * (params->ith + 1) / params->nth;
        for (int64_t r = r0; r < r1; ++r) {
            scan_finish(head_of(dst, dest, r / T % H, r / T / H), r % T, r % T + 1);
        }
    }
}
