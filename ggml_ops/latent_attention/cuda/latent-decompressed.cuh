#pragma once

// Latent attention on CUDA, decompressed: declarations common to its kernels.
//
// The keys are processed in runs, so that the expanded keys and values fit in a scratch of constant size:
//   look      once     which queries see which tiles of keys
//   weigh     once     k_b and v_b as halves
//   collect   per run  cache rows of any type as halves, hidden keys as zeros
//   expand    per run  keys and values of each head
//   attend    per run  online softmax over them; its state is carried from run to run
//
// All matmuls multiply halves and sum in float32; a value that needs more accuracy is the sum of two halves (`modes`).
// Powers of two keep every factor in the range of halves: one for each head of k_b and v_b (weights::units), one for
// each row of the cache, and one for each tile of keys (run::shifts), the unit of its keys and values in all heads.

#include "kimi-launch.cuh"
#include "latent-cuda.cuh"
#include "latent-device.cuh"

namespace latent_cuda {

constexpr int N_WEIGHTS     = N_LATENT * N_NOPE;  // per head of k_b
constexpr int TILE          = 32;                 // keys
constexpr int EXPAND_KEYS   = 4 * TILE;           // per block of `expand`
constexpr int BLOCK_QUERIES = 128;                // per block of `attend`
constexpr int BLOCK_THREADS = 256;
constexpr int BLOCK_WARPS   = BLOCK_THREADS / WARP;

static_assert(N_NOPE == N_VALUE, "k_b and v_b are of one size");

// Number of halves per value of each factor.
namespace modes {

struct f32 {
    static constexpr int CACHE = 2, WEIGHT = 2, QUERY = 2, KEY = 2, VALUE = 1, P = 2;
};

struct f16 : f32 {  // F16 and BF16 caches, exact: their rows fit into halves
    static constexpr int CACHE = 1;
};

// F16 and BF16 caches by default, and quantized ones
struct halves {
    static constexpr int CACHE = 1, WEIGHT = 1, QUERY = 1, KEY = 1, VALUE = 1, P = 1;
};

}  // namespace modes

// Visibility of a tile for a block of queries.
struct sight {
    uint32_t visible;  // keys visible to some query
    uint32_t plain;    // 1: all queries see all keys and the mask adds 0
};

struct weights {
    __half * values;  // [k_b, v_b][heads][WEIGHT terms][N_WEIGHTS], each head in the layout of the tensor
    float *  units;   // [k_b, v_b][heads]: factors that restore the scale
};

// Keys [begin, end) of some streams.
struct run {
    int        begin, end, stream0, n_streams;
    int        n_room;   // capacity of the arrays in keys, a multiple of EXPAND_KEYS
    uint32_t * seen;     // [streams][tiles]: keys that any query sees; of a tile without any, nothing else is written
    int *      shifts;   // [streams][tiles]: keys and values are in units of 2^(shift - UNIT_SHIFT)
    float *    factors;  // [streams][n_room]: scales an expanded row to these units
    __half *   latents;  // [streams][CACHE terms][n_room][N_LATENT]
    __half *   ropes;    // [streams][CACHE terms][n_room][N_ROPE], in the tile's units
    __half *   keys;     // [streams][heads][KEY terms][n_room][N_NOPE]
    __half *   values;   // [streams][heads][VALUE terms][n_room][N_VALUE]

    __host__ __device__ int n_tiles() const { return (end - begin + TILE - 1) / TILE; }

    __host__ __device__ int room_tiles() const { return n_room / TILE; }
};

struct prefill {
    const sight * sights;    // [mask_streams][query blocks][tiles of all keys]
    float2 *      max_sum;   // [streams][heads][queries]: the softmax state so far; its values are in `out`
    int           n_blocks;  // blocks of queries
    int           n_tiles;
    bool          first, last;  // whether this is the first or last run

    __device__ const sight * sights_of(int mask_stream, int block) const {
        return sights + (static_cast<int64_t>(mask_stream) * n_blocks + block) * n_tiles;
    }
};

// The largest magnitude is scaled to [2^4, 2^5) in a tile of the cache and to [1, 2) in a head of k_b and v_b, so that
// sums of N_LATENT products stay below 2^15.
constexpr int UNIT_SHIFT = 127 + 4;

// Exponent of x, clamped for scaling: far from the ends of the range, never that of infinity or NaN.
static __device__ __forceinline__ int scaling_exponent(float x) {
    const int exponent = exponent_of(x);
    return exponent == 255 ? 64 : min(max(exponent, 64), 190);
}

void look(const decompressed & args, const prefill & p, sight * to, cudaStream_t stream);
void weigh(const decompressed & args, int n_terms, const weights & to, cudaStream_t stream);
void collect(const decompressed & args, const prefill & p, const run & to, cudaStream_t stream);
template <typename MODE> void expand(const weights & w, int n_heads, const run & r, cudaStream_t stream);

}  // namespace latent_cuda
