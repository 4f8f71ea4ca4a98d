#pragma once

// Declarations common to the files of the KDA scan on the CPU: one head of one sequence in the layout of the kernels.

#include "ggml-kda-scan.h"
#include "ggml.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace kda {

static inline float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

// rows of one head over tokens: data[t*stride + i]
struct token_rows {
    const float * data;
    size_t        stride;  // in floats

    const float * operator[](int64_t t) const { return data + t * stride; }
};

// One head of one sequence. The state is s[j*D + i] = S[i][j]: one row for each value channel j.
struct scan_head {
    int64_t D;
    int64_t T;

    token_rows    q, k, v;  // [D]; q scaled, q and k normalized
    token_rows    f;        // [D] forget gate before dt_bias
    token_rows    beta;     // [1] before the sigmoid
    token_rows    gate;     // [D] output gate before the sigmoid
    const float * dt_bias;  // [D]
    const float * norm;     // [D]
    float         a;        // -exp(A_log)
    float         lower_bound;
    float         eps;

    const float * state_in;     // [D*D], or nullptr for zeros
    float *       state_out;    // [D*D] of slot 0
    size_t        slot_stride;  // in floats
    int64_t       n_slots;

    float * out;         // out[t*out_stride + j]
    size_t  out_stride;  // in floats

    // Destination of the state after token t: its snapshot, or, if older than all of them, the oldest one,
    // which a later token overwrites.
    float * state_after(int64_t t) const {
        const int64_t back = T - 1 - t;
        return state_out + (back < n_slots ? back : n_slots - 1) * slot_stride;
    }

    // the state before token t; nullptr for zeros
    const float * state_before(int64_t t) const { return t == 0 ? state_in : state_after(t - 1); }

    float * out_row(int64_t t) const { return out + t * out_stride; }
};

// Tokens per chunk: one tile with exact decay. Larger chunks save no work on a CPU (README).
constexpr int CHUNK = 16;

// Floats of scratch per thread for head size D: the state by columns, then for each token of a chunk: decay,
// output, k, and the three products with the decay, the four small matrices, and padding for vectors.
constexpr int64_t scan_scratch_floats(int64_t D) {
    return D * D + (7 * CHUNK + 4) * D + 4 * CHUNK * CHUNK + 4 * CHUNK * 32;
}

// Calls f with the head size, a supported one, as a compile-time constant.
template <typename F> static void with_head_size(int64_t D, const F & f) {
#define CALL(n)                                                                                                        \
    case n:                                                                                                            \
        return f(std::integral_constant<int, n>());
    switch (D) {
        GGML_KDA_HEAD_SIZES(CALL)
    default:
        GGML_ABORT("KDA_SCAN: unsupported head size %d", (int) D);
    }
#undef CALL
}

// The plain path: all columns and the output norm of one head, token by token, in scalar float32.
// scratch: scan_scratch_floats(D)
void scan_reference(const scan_head & head, float * scratch);

// Tokens [t0, t1) and value channels [j0, j1), both multiples of their tiles. With `finish`, which requires all value
// channels, the output norm and gate are applied; otherwise S^T q is written to out.
struct scan_range {
    int64_t           t0, t1, j0, j1;
    bool              finish;
    const scan_head * next;  // the head after this one, whose state and first tokens are prefetched; may be nullptr
};

// The vector paths, for builds with vectors and supported head sizes.
void scan_steps(const scan_head & head, const scan_range & range, float * scratch);
void scan_chunks(const scan_head & head, const scan_range & range, float * scratch);

// out = norm * rms_norm(out) * sigmoid(gate) for tokens [t0, t1)
void scan_finish(const scan_head & head, int64_t t0, int64_t t1);

}  // namespace kda
