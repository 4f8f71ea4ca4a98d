#pragma once

// KDA scan on CUDA. Specification: ggml_ops/kda/README.md.

#include "kda-params.cuh"

namespace kda_cuda {

struct scan_args {
    rows          q, k, v, f, gate;
    rows          beta;  // one float per row
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

// What the choice of kernels depends on.
struct device_limits {
    int    capability;    // 10*major + minor, of the compiled code
    int    n_sms;         // multiprocessors
    size_t block_shared;  // maximum bytes of shared memory per block
};

// Work in `side` begins after that in `main`, and ends before what is launched in `main` after the call.
struct scan_streams {
    cudaStream_t main, side;
};

// Tokens [begin, end) of every sequence. If begin > 0, the state before them is in slot n_slots - 1.
struct token_range {
    int begin, end;
};

// Token by token; supported head sizes: 32, 64, 96, 128, 256. If rows conflict (kda-device.cuh), it copies the states of
// all slots to the cache.
void scan_steps(const scan_args & args, const token_range & range, const device_limits & device, cudaStream_t stream);

// In chunks; requires compute capability 8.0 and head sizes up to 128. Writes the state after the last token to slot
// n_slots - 1, and no other. `workspace`: chunk_workspace bytes, 16-byte aligned.
void   scan_chunks(const scan_args &     args,
                   const token_range &   range,
                   const device_limits & device,
                   void *                workspace,
                   const scan_streams &  streams);
size_t chunk_workspace(const scan_args & args, const token_range & range, const device_limits & device);

// Why chunks are not supported, or nullptr. capability: as in device_limits.
const char * chunks_refused(int head_size, int capability);

// Number of tokens processed in chunks: all but those whose states are requested, or 0 for a short sequence.
int tokens_in_chunks(const scan_args & args, const device_limits & device);

// All tokens, with the fastest kernels.
void scan(const scan_args & args, const device_limits & device, void * workspace, const scan_streams & streams);

// out = norm * rms_norm(out) * sigmoid(gate) in place; called by kernels that split a head's value channels.
void scan_finish(const scan_args & args, const token_range & range, cudaStream_t stream);

}  // namespace kda_cuda
