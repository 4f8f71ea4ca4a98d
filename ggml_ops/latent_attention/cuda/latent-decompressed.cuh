#pragma once

// Latent attention on CUDA, decompressed: what its kernels share.
//
// The keys go through in runs, so that what is expanded of them fits a scratch of constant size:
//   look      once  which queries see which tiles of keys
//   weigh     once  k_b and v_b as halves
//   collect   a run cache rows of any type as halves, unseen keys as zeros
//   expand    a run keys and values of each head
//   attend    a run online softmax over them; its state goes from run to run
//
// All products are of halves with float32 sums; what one half does not hold well enough is the sum of two (`modes`).
// Powers of two keep every factor in the range of halves: one for each head of k_b and v_b (weights::units), one for
// each row of the cache, one for each tile of keys (run::shifts), in whose units keys and values of all heads are.

#include "latent-cuda.cuh"
#include "latent-device.cuh"

namespace latent_cuda {

constexpr int N_WEIGHTS     = N_LATENT * N_NOPE;  // of a head in k_b
constexpr int TILE          = 32;                 // keys
constexpr int EXPAND_KEYS   = 4 * TILE;           // of a block of `expand`
constexpr int BLOCK_QUERIES = 128;                // of a block of `attend`
constexpr int BLOCK_THREADS = 256;
constexpr int BLOCK_WARPS   = BLOCK_THREADS / WARP;

static_assert(N_NOPE == N_VALUE, "k_b and v_b are of one size");

// How many halves make a value of each factor.
namespace modes {

struct f32 {
    static constexpr int CACHE = 2, WEIGHT = 2, QUERY = 2, KEY = 2, VALUE = 1, P = 2;
};

struct f16 : f32 {  // bf16 too: cache rows are exact
    static constexpr int CACHE = 1;
};

struct quantised {
    static constexpr int CACHE = 1, WEIGHT = 1, QUERY = 1, KEY = 1, VALUE = 1, P = 1;
};

}  // namespace modes

// What the queries of a block see of a tile.
struct sight {
    uint32_t visible;  // keys that some query sees
    uint32_t plain;    // 1: all queries see all keys and the mask adds nothing
};

struct weights {
    __half * values;  // [k_b, v_b][heads][WEIGHT terms][N_WEIGHTS], each head as it lies in the tensor
    float *  units;   // [k_b, v_b][heads]: what they are to be multiplied with
};

// Keys [begin, end) of some streams.
struct run {
    int        begin, end, stream0, n_streams;
    int        n_room;   // keys that the arrays have room for, a multiple of EXPAND_KEYS
    uint32_t * seen;     // [streams][tiles]: keys that any query sees; nothing else is written of a tile without
    int *      shifts;   // [streams][tiles]: keys and values are in units of 2^(shift - UNIT_SHIFT)
    float *    factors;  // [streams][n_room]: brings an expanded row to these units
    __half *   latents;  // [streams][CACHE terms][n_room][N_LATENT]
    __half *   ropes;    // [streams][CACHE terms][n_room][N_ROPE], in the tile's units
    __half *   keys;     // [streams][heads][KEY terms][n_room][N_NOPE]
    __half *   values;   // [streams][heads][VALUE terms][n_room][N_VALUE]

    __host__ __device__ int n_tiles() const { return (end - begin + TILE - 1) / TILE; }

    __host__ __device__ int room_tiles() const { return n_room / TILE; }
};

struct prefill {
    const sight * sights;    // [mask_streams][query blocks][tiles of all keys]
    float2 *      max_sum;   // [streams][heads][queries]: the softmax so far; its values are in `out`, in units of 1
    int           n_blocks;  // of queries
    int           n_tiles;
    bool          first, last;  // run

    __device__ const sight * sights_of(int mask_stream, int block) const {
        return sights + (static_cast<int64_t>(mask_stream) * n_blocks + block) * n_tiles;
    }
};

// The greatest magnitude of a tile of the cache is brought to [2^4, 2^5), that of k_b and v_b of a head to [1, 2): then
// sums of N_LATENT products stay below 2^15.
constexpr int UNIT_SHIFT = 127 + 4;

// As it is used to scale: far from the ends of the range, and not that of infinity and NaN.
static __device__ __forceinline__ int scaling_exponent(float x) {
    const int exponent = exponent_of(x);
    return exponent == 255 ? 64 : min(max(exponent, 64), 190);
}

void look(const decompressed & args, const prefill & p, sight * to, cudaStream_t stream);
void weigh(const decompressed & args, int n_terms, const weights & to, cudaStream_t stream);
void collect(const decompressed & args, const prefill & p, const run & to, cudaStream_t stream);
template <typename MODE> void expand(const weights & w, int n_heads, const run & r, cudaStream_t stream);

}  // namespace latent_cuda
