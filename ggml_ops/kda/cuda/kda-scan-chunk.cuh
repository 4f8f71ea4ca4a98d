#pragma once

// Data passed between the two kernels of the chunked KDA scan. For each chunk of 64 tokens of a head, `prepare`
// computes everything that depends only on its tokens, in the order in which `states` reads it for the recurrence.
//
// Over a chunk, with P_i the product of the decays up to token i, R_j that of those after j, E_ij of those after j up
// to i, and X = (I + L)^-1, L_ij = beta_i k_i.(E_ij k_j), j < i:
//   w = X beta (P k)     u = X beta v     A_ij = q_i.(E_ij k_j), j <= i
// and then, with S the state before the chunk,
//   U = u - w S          O = (P q) S + A U          S <- P_last S + (R k)^T U
//
// All right-hand factors of tensor-core products are stored as `frag_b`, split into bf16 and in lane order: 512 bytes
// for 16x8 numbers. The states kernel computes everything transposed, so that the state never leaves the accumulators:
// value channels are rows there, and the factors have
//   columns tokens, rows key channels       in -w and P q
//   columns tokens i, rows tokens j         in A
//   columns key channels, rows tokens       in R k

#include "kda-scan.cuh"

namespace kda_cuda {

constexpr int CHUNK     = 64;     // tokens
constexpr int TILE      = 8;      // columns of a fragment
constexpr int DEPTH     = 16;     // rows of a fragment
constexpr int FRAG_SIZE = 512;    // bytes
constexpr int STAGE     = 16384;  // maximum bytes that the states kernel loads at once
constexpr int TILES     = CHUNK / TILE;
constexpr int A_FRAGS   = 20;  // fragments of A with an element on or below the diagonal

constexpr int    SCHEDULERS = 4;     // of a multiprocessor
constexpr size_t ROOMY = 160 << 10;  // shared memory per block: 163 KiB and more on 8.0, 9.0 and 10.0; others have 99

// Offsets in bytes; D key and value channels.
template <int D> struct chunk_layout {
    static constexpr int WQ_STAGES = D / 32;                          // -w of 32 key channels, then P q of them
    static constexpr int A         = WQ_STAGES * STAGE;               // fragments of A, then P_last
    static constexpr int LAST      = A + A_FRAGS * FRAG_SIZE;         // [D] float
    static constexpr int RK        = LAST + D * (int) sizeof(float);  // by 8 key channels, then by 16 tokens
    static constexpr int RK_SIZE   = D / TILE * (CHUNK / DEPTH) * FRAG_SIZE;
    static constexpr int U         = RK + RK_SIZE;  // accumulators: by 16 value channels, 8 tokens
    static constexpr int SIZE      = U + D * CHUNK * (int) sizeof(float);
    static constexpr int STAGES    = WQ_STAGES + 1 + (RK_SIZE + STAGE - 1) / STAGE;

    static __device__ __forceinline__ int stage_begin(int stage) {
        return stage <= WQ_STAGES ? stage * STAGE : RK + (stage - WQ_STAGES - 1) * STAGE;
    }

    static __device__ __forceinline__ int stage_end(int stage) {
        if (stage < WQ_STAGES) {
            return (stage + 1) * STAGE;
        }
        const int end = RK + (stage - WQ_STAGES) * STAGE;
        return end < U ? end : U;
    }

    // fragment of -w or P q in the stage of its key channels; deep: index of 16 key channels
    static __device__ __forceinline__ int wq_offset(bool is_q, int deep, int tile) {
        return deep / 2 * STAGE + ((is_q ? 2 : 0) + deep % 2) * TILES * FRAG_SIZE + tile * FRAG_SIZE;
    }
};

// Index of the fragment of A for 8 tokens i (tile) and 16 tokens j (deep <= tile/2).
static __device__ __forceinline__ int a_frag(int tile, int deep) {
    const int n = tile / 2 + 1;  // fragments per tile of this pair
    return n * (n - 1) + tile % 2 * n + deep;
}

// A run of chunks of all sequences and heads, and its place in the workspace.
struct chunk_run {
    int    begin, end;  // tokens; begin is a multiple of CHUNK
    char * workspace;

    __host__ __device__ int n_chunks() const { return (end - begin + CHUNK - 1) / CHUNK; }

    __device__ char * at(int64_t size, int chunk, int h, int s, int n_heads) const {
        return workspace + ((int64_t) (s * n_heads + h) * n_chunks() + chunk) * size;
    }
};

void prepare_chunks(const scan_args & args, const chunk_run & run, const device_limits & device, cudaStream_t stream);
void carry_states(const scan_args & args, const chunk_run & run, const device_limits & device, cudaStream_t stream);

}  // namespace kda_cuda
