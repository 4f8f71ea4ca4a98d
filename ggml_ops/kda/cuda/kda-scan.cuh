#pragma once

// KDA scan on CUDA. Specification: ggml_ops/kda/README.md.

#include "kda-params.cuh"

namespace kda_cuda {

struct scan_args {
    rows          q, k, v, f, gate;
    rows          beta;  // one float a row
    const float * dt_bias;
    const float * a;
    const float * norm;
    float *       out;  // [D, H, T, S]
    states        st;   // [D*D*H]
    int           head_size, n_heads, n_tokens, n_seqs;
    float         eps;
    gate_kind     kind;

    __host__ __device__ float * out_at(int h, int t, int s) const {
        return out + ((s * (int64_t) n_tokens + t) * n_heads + h) * head_size;
    }
};

// Tokens [begin, end) of every sequence. Where begin > 0, the state in front of them lies in slot n_slots - 1.
struct token_range {
    int begin, end;
};

// Token by token, any supported head size: 32, 64, 96, 128, 256.
void scan_steps(const scan_args & args, const token_range & range, cudaStream_t stream);

// In chunks, on compute capability 8.0 and later, head sizes up to 128. Leaves the state behind the last token in slot
// n_slots - 1, and no other. `workspace`: chunk_workspace bytes, aligned to 16.
void   scan_chunks(const scan_args & args, const token_range & range, void * workspace, cudaStream_t stream);
size_t chunk_workspace(const scan_args & args, const token_range & range);

// Why chunks cannot serve; nullptr where they can. capability: 10*major + minor.
const char * chunks_refused(int head_size, int capability);

// Tokens that chunks serve: all but those whose states are asked for, or none of a short sequence.
int tokens_in_chunks(int n_tokens, int n_slots);

// All tokens, by what serves best.
void scan(const scan_args & args, int capability, void * workspace, cudaStream_t stream);

// out = norm * rms_norm(out) * sigmoid(gate) in place; kernels that hold a head's value channels apart end with it.
void scan_finish(const scan_args & args, const token_range & range, cudaStream_t stream);

}  // namespace kda_cuda
