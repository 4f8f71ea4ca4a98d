// KDA conv on the CPU. A unit of work is one head of q, of k or of v in one sequence: its taps and its history are
// transposed to rows by tap once, then the tokens are processed. Neighbouring heads are processed together, token by
// token, so that memory is accessed in runs of a few kilobytes.

#include "kda-cpu.h"

#include "ggml-cpu-impl.h"
#include "ggml-kda-conv.h"
#include "kimi-simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kda {

using namespace kimi_simd;

constexpr int WIDTH          = GGML_KDA_CONV_WIDTH;
constexpr int HISTORY        = WIDTH - 1;
constexpr int HEADS_TOGETHER = 8;  // heads processed together
// prefetch distance in tokens: each row is in another page, where hardware prefetching has to start again
constexpr int AHEAD = 1;

// One head of q, k or v in one sequence.
struct conv_unit {
    int64_t D;
    int64_t T;

    const float * input;         // input[t*input_stride + c]
    size_t        input_stride;  // in floats
    const float * weight;        // weight[c*WIDTH + tap]
    const float * state_in;      // state_in[c*HISTORY + tap], or nullptr for zeros

    float * out;         // out[t*out_stride + c]
    size_t  out_stride;  // in floats
    float * state_out;   // of slot 0, as state_in
    size_t  slot_stride;
    int64_t n_slots;

    bool  normed;  // q and k
    float eps;
    float scale;

    float * by_tap;  // scratch: WIDTH rows of weights, HISTORY rows of inputs before the first token

    const float * tap(int i) const { return by_tap + i * D; }

    // inputs of token t; t >= -HISTORY
    const float * row(int64_t t) const { return t < 0 ? by_tap + (WIDTH + HISTORY + t) * D : input + t * input_stride; }
};

static size_t unit_scratch_floats(int64_t D) {
    return (WIDTH + HISTORY) * D;
}

// from [D][N] to [N][D]
template <int N> static void transpose(const float * from, int64_t D, float * to) {
    for (int64_t c = 0; c < D; ++c) {
        for (int i = 0; i < N; ++i) {
            to[i * D + c] = from[c * N + i];
        }
    }
}

static void lay_out_by_tap(const conv_unit & u) {
    float * history = u.by_tap + WIDTH * u.D;
    transpose<WIDTH>(u.weight, u.D, u.by_tap);
    if (u.state_in) {
        transpose<HISTORY>(u.state_in, u.D, history);
    } else {
        memset(history, 0, HISTORY * u.D * sizeof(float));
    }
}

static void write_states(const conv_unit & u) {
    for (int64_t s = 0; s < std::min(u.T + 1, u.n_slots); ++s) {
        float * state = u.state_out + s * u.slot_stride;
        for (int i = 0; i < HISTORY; ++i) {
            const float * x = u.row(u.T - s - HISTORY + i);
            for (int64_t c = 0; c < u.D; ++c) {
                state[c * HISTORY + i] = x[c];
            }
        }
    }
}

static void convolve_reference(const conv_unit & u, int64_t t) {
    float * out    = u.out + t * u.out_stride;
    float   square = 0.0f;
    for (int64_t c = 0; c < u.D; ++c) {
        float y = 0.0f;
        for (int i = 0; i < WIDTH; ++i) {
            y += u.tap(i)[c] * u.row(t - HISTORY + i)[c];
        }
        out[c] = y / (1.0f + expf(-y));
        square += out[c] * out[c];
    }
    if (u.normed) {
        const float scale = u.scale / sqrtf(square + u.eps);
        for (int64_t c = 0; c < u.D; ++c) {
            out[c] *= scale;
        }
    }
}

#if defined(KIMI_SIMD)

static void convolve(const conv_unit & u, int64_t t) {
    float *       out = u.out + t * u.out_stride;
    const float * x0  = u.row(t - 3);
    const float * x1  = u.row(t - 2);
    const float * x2  = u.row(t - 1);
    const float * x3  = u.row(t);

    vf square = v_zero();
    for (int64_t c = 0; c < u.D; c += VW) {
        vf y = v_mul(v_load(u.tap(0) + c), v_load(x0 + c));
        y    = v_fma(v_load(u.tap(1) + c), v_load(x1 + c), y);
        y    = v_fma(v_load(u.tap(2) + c), v_load(x2 + c), y);
        y    = v_fma(v_load(u.tap(3) + c), v_load(x3 + c), y);
        y    = v_mul(y, v_sigmoid(y));
        v_store(out + c, y);
        square = v_fma(y, y, square);
    }
    if (u.normed) {
        const vf scale = v_set1(u.scale / sqrtf(v_hsum(square) + u.eps));
        for (int64_t c = 0; c < u.D; c += VW) {
            v_store(out + c, v_mul(v_load(out + c), scale));
        }
    }
}

#endif

static conv_unit unit_of(const ggml_tensor * dst, const ggml_kda_state_dest * dest, int64_t x, int64_t h, int64_t s) {
    const ggml_tensor *        input  = dst->src[GGML_KDA_CONV_Q + x];
    const ggml_tensor *        cache  = dst->src[GGML_KDA_CONV_CACHE];
    const ggml_kda_conv_params params = ggml_kda_conv_get_params(dst);

    const int64_t D = params.head_size;
    const int64_t C = input->ne[0];
    const int64_t T = input->ne[1];
    const int64_t S = input->ne[2];

    const int32_t row = ((const int32_t *) dst->src[GGML_KDA_CONV_ROWS]->data)[s];
    GGML_ASSERT(row >= 0 && row < cache->ne[1]);

    const int64_t first = x * C + h * D;  // channel index over q, k and v

    conv_unit u    = {};
    u.D            = D;
    u.T            = T;
    u.input        = (const float *) ((const char *) input->data + s * input->nb[2]) + h * D;
    u.input_stride = input->nb[1] / sizeof(float);
    u.weight       = (const float *) dst->src[GGML_KDA_CONV_WQ + x]->data + h * D * WIDTH;
    u.state_in     = row == params.zero_row
                         ? nullptr
                         : (const float *) ((const char *) cache->data + row * cache->nb[1]) + first * HISTORY;
    u.out          = (float *) dst->data + s * T * 3 * C + first;
    u.out_stride   = 3 * C;
    if (dest) {
        u.state_out   = (float *) (dest->data + s * dest->seq_stride) + first * HISTORY;
        u.slot_stride = dest->slot_stride / sizeof(float);
    } else {
        u.state_out   = (float *) dst->data + T * S * 3 * C + (s * 3 * C + first) * HISTORY;
        u.slot_stride = S * 3 * C * HISTORY;
    }
    u.n_slots = params.n_snapshots;
    u.normed  = x != GGML_KDA_CONV_V;
    u.eps     = params.eps;
    u.scale   = x == GGML_KDA_CONV_Q ? 1.0f / sqrtf((float) D) : 1.0f;
    return u;
}

}  // namespace kda

size_t ggml_kda_conv_work_size(const ggml_tensor * op, int n_tasks) {
    const int64_t D = ggml_kda_conv_get_params(op).head_size;
    return kda::HEADS_TOGETHER * kda::unit_scratch_floats(D) * sizeof(float) * n_tasks;
}

void ggml_compute_forward_kda_conv(const ggml_compute_params * params,
                                   ggml_tensor *               dst,
                                   const ggml_kda_state_dest * dest) {
    using namespace kda;

    const ggml_tensor * q = dst->src[GGML_KDA_CONV_Q];
    const int64_t       D = ggml_kda_conv_get_params(dst).head_size;
    const int64_t       H = q->ne[0] / D;

    float * scratch = thread_scratch(params, HEADS_TOGETHER * unit_scratch_floats(D));

#if defined(KIMI_SIMD)
    const auto convolve_token = params->use_ref || D % VW != 0 ? convolve_reference : convolve;
#else
    const auto convolve_token = convolve_reference;
#endif
    const int64_t n_units = 3 * H * q->ne[2];
    const int64_t u0      = n_units * params->ith / params->nth;
    const int64_t u1      = n_units * (params->ith + 1) / params->nth;
    for (int64_t i = u0; i < u1;) {
        // up to the end of q, k or v of this sequence
        const int n = (int) std::min<int64_t>({ HEADS_TOGETHER, u1 - i, H - i % H });
        conv_unit units[HEADS_TOGETHER];
        for (int g = 0; g < n; ++g) {
            units[g]        = unit_of(dst, dest, (i + g) / H % 3, (i + g) % H, (i + g) / H / 3);
            units[g].by_tap = scratch + g * unit_scratch_floats(D);
            lay_out_by_tap(units[g]);
        }
        for (int64_t t = 0; t < q->ne[1]; ++t) {
            for (int g = 0; g < n; ++g) {
                if (t + AHEAD < q->ne[1]) {
                    prefetch(units[g].row(t + AHEAD), D);
                    prefetch<true>(units[g].out + (t + AHEAD) * units[g].out_stride, D);
                }
                convolve_token(units[g], t);
            }
        }
        for (int g = 0; g < n; ++g) {
            write_states(units[g]);
        }
        i += n;
    }
}
