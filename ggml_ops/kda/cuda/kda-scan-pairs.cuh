#pragma once

// Dot products of pairs of tokens of a chunk, with decay: A_ij = q_i.(E_ij k_j) and L_ij = beta_i k_i.(E_ij k_j).
//
// The log-gate has no lower bound, so decays are only ever products of e^g, each at most 1. The decay between two
// tokens j < i is split at a boundary between them: rows i are multiplied with the decays from the boundary to i,
// columns j with those after j up to the boundary, and the rest is a matmul. Boundaries are nested: at 32 for the
// halves of the chunk, at 16 inside them, at 8; pairs inside a tile of 8 are computed one by one. At each level a token
// is either a row or a column, so one array of factors suffices. Key channels are processed in parts of 32: a warp's
// lanes are the channels of a part, a warp is a tile of 8 tokens.

#include "kda-frags.cuh"
#include "kda-scan-chunk.cuh"

namespace kda_cuda {

constexpr int PREPARE_THREADS = 256;
constexpr int PREPARE_WARPS   = PREPARE_THREADS / WARP;
constexpr int PART            = WARP;      // key channels at a time
constexpr int PART_LD         = PART + 8;  // floats between rows of a part; two channels of eight rows are in all banks
constexpr int SQUARE_LD       = CHUNK + 8;  // floats between rows of L and A
constexpr int PART_ARRAY      = CHUNK * PART_LD;
constexpr int SQUARE          = CHUNK * SQUARE_LD;
constexpr int SCRATCH         = 32 * 36;  // floats, for the inverse

static_assert(PREPARE_WARPS == TILES, "a warp for each tile of 8 tokens");

// A part's channels of q and k.
struct part_rows {
    float q[PART_ARRAY], k[PART_ARRAY];
};

// The block's shared memory. L and A reuse the memory of the part's arrays after the last part. With two sets of rows,
// those of the next part arrive while this one is computed.
template <int SETS> struct alignas(16) prepare_memory {
    union {
        struct {
            part_rows rows[SETS];
            float     factor[2][PART_ARRAY];
        };

        struct {
            float l[SQUARE], a[SQUARE], scratch[SCRATCH];
        };
    };

    float totals[TILES][PART];  // product of a tile's decays
    float beta[CHUNK];
};

// A thread's decays: one channel in one tile.
struct tile_decays {
    float e[TILE];
    int   channel = threadIdx.x % WARP;
    int   tile    = threadIdx.x / WARP;

    // Loads the thread's decays again: keeping them during near_pairs would cost too many registers.
    __device__ void reload(const float * from) {
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
            e[i] = from[at(i)];
        }
    }

    __device__ int at(int i) const { return (tile * TILE + i) * PART_LD + channel; }

    // Products of the decays from tile `from` up to each token; tile - from <= MOST.
    template <int MOST> __device__ void rows_to(float * to, const float (&totals)[TILES][PART], int from) const {
        float x = 1.0f;
#pragma unroll
        for (int n = 0; n < MOST; ++n) {
            if (from + n < tile) {
                x *= totals[from + n][channel];
            }
        }
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
            x *= e[i];
            to[at(i)] = x;
        }
    }

    // Products of the decays after each token, up to the end of tile `end` - 1; end - 1 - tile <= MOST.
    template <int MOST> __device__ void columns_to(float * to, const float (&totals)[TILES][PART], int end) const {
        float x = 1.0f;
#pragma unroll
        for (int n = 1; n <= MOST; ++n) {
            if (end - n > tile) {
                x *= totals[end - n][channel];
            }
        }
#pragma unroll
        for (int i = TILE - 1; i >= 0; --i) {
            to[at(i)] = x;
            x *= e[i];
        }
    }

    // The factors of the level whose boundary is in the middle of 2*HALF tokens.
    template <int HALF> __device__ void level_to(float * to, const float (&totals)[TILES][PART]) const {
        constexpr int N    = HALF / TILE;  // tiles
        const int     half = tile / N;
        if (half % 2 == 1) {
            rows_to<N - 1>(to, totals, half * N);
        } else {
            columns_to<N - 1>(to, totals, (half + 1) * N);
        }
    }
};

// Partial sums of a thread over key channels: rows of q (A) and of k (L).
struct pair_sums {
    float near_q[TILE] = {}, near_k[TILE] = {};  // tile `warp`: column lane%8, a quarter of the channels: lane/8
    float half32[2][4] = {};                     // 16x16 of rows from 32 on, columns before 32: q or k by warp
    float half16[4]    = {};                     // 16x8 of one pair of tiles of 16: q or k by warp
    float half8[4]     = {};                     // 8x8 of one pair of tiles of 8: q above, k below; warps 0..3
};

// e: the decays
static __device__ __forceinline__ void
near_pairs(pair_sums & sums, const part_rows & rows, const float * e, int warp, int lane) {
    const int first  = warp * TILE * PART_LD;
    const int column = lane % TILE;
#pragma unroll 1
    for (int c = first + lane / TILE * 4; c < first + PART; c += 16) {
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
            const float4 k = load4(rows.k + c + i * PART_LD);
            const float4 y = mul4(x, load4(e + c + i * PART_LD));
            x.x            = i == column ? k.x : y.x;
            x.y            = i == column ? k.y : y.y;
            x.z            = i == column ? k.z : y.z;
            x.w            = i == column ? k.w : y.w;
            sums.near_q[i] += dot4(load4(rows.q + c + i * PART_LD), x);
            sums.near_k[i] += dot4(k, x);
        }
    }
}

// Two neighbouring channels of a row, times their factors.
static __device__ __forceinline__ terms<2> scaled(const float * x, const float * factor, int row, int c) {
    const int    at = row * PART_LD + c;
    const float2 a  = *reinterpret_cast<const float2 *>(x + at);
    const float2 b  = *reinterpret_cast<const float2 *>(factor + at);
    return split(a.x * b.x, a.y * b.y);
}

// One channel of two neighbouring tokens, times their factors.
static __device__ __forceinline__ terms<2> scaled_tokens(const float * x, const float * factor, int token, int c) {
    const int at = token * PART_LD + c;
    const int up = at + PART_LD;
    return split(x[at] * factor[at], x[up] * factor[up]);
}

// rows: of tokens; columns of the fragment: tokens from `token` on
static __device__ __forceinline__ frag_b
channels_by_tokens(const float * x, const float * factor, int c, int token, int lane) {
    frag_b b;
    b.set(0, scaled(x, factor, token + lane / 4, c + lane % 4 * 2));
    b.set(1, scaled(x, factor, token + lane / 4, c + lane % 4 * 2 + 8));
    return b;
}

static __device__ __forceinline__ frag_b
tokens_by_channels(const float * x, const float * factor, int token, int c, int lane) {
    frag_b b;
    b.set(0, scaled_tokens(x, factor, token + lane % 4 * 2, c + lane / 4));
    b.set(1, scaled_tokens(x, factor, token + lane % 4 * 2 + 8, c + lane / 4));
    return b;
}

// Rows from `upper` on of x and from `lower` on of y as the left factor, 16 channels from c on.
static __device__ __forceinline__ frag_a
token_rows(const float * x, int upper, const float * y, int lower, const float * factor, int c, int lane) {
    const int g = lane / 4;
    const int i = c + lane % 4 * 2;
    frag_a    a;
    a.set(0, scaled(x, factor, upper + g, i));
    a.set(1, scaled(y, factor, lower + g, i));
    a.set(2, scaled(x, factor, upper + g, i + 8));
    a.set(3, scaled(y, factor, lower + g, i + 8));
    return a;
}

// Distribution of the pairs of a level over the warps.
struct level_place {
    int  row, column;  // tokens
    bool is_k;
};

static __device__ __forceinline__ level_place place32(int warp) {
    return { 32 + 16 * (warp % 2), 16 * (warp / 4), warp / 2 % 2 == 1 };
}

static __device__ __forceinline__ level_place place16(int warp) {
    return { 32 * (warp / 4) + 16, 32 * (warp / 4) + TILE * (warp % 2), warp / 2 % 2 == 1 };
}

template <int HALF>
static __device__ __forceinline__ void
far_pairs(pair_sums & sums, const part_rows & rows, const float * factor, int warp, int lane) {
#pragma unroll 1
    for (int c = 0; c < PART; c += DEPTH) {
        if (HALF == 8) {
            if (warp < 4) {
                const int    row = 16 * warp + 8;
                const frag_a a   = token_rows(rows.q, row, rows.k, row, factor, c, lane);
                mma_split(sums.half8, a, channels_by_tokens(rows.k, factor, c, row - 8, lane));
            }
            continue;
        }
        const level_place at = HALF == 32 ? place32(warp) : place16(warp);
        const float *     x  = at.is_k ? rows.k : rows.q;
        const frag_a      a  = token_rows(x, at.row, x, at.row + 8, factor, c, lane);
        if (HALF == 32) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                mma_split(sums.half32[n], a, channels_by_tokens(rows.k, factor, c, at.column + n * TILE, lane));
            }
        } else {
            mma_split(sums.half16, a, channels_by_tokens(rows.k, factor, c, at.column, lane));
        }
    }
}

// 8 rows and 8 columns of A or of L (times beta): half of an accumulator.
template <int SETS>
static __device__ __forceinline__ void
put_pairs(prepare_memory<SETS> & mem, bool is_k, int row, int column, float x, float y, int lane) {
    const int   i                   = row + lane / 4;
    const float scale               = is_k ? mem.beta[i] : 1.0f;
    float *     to                  = (is_k ? mem.l : mem.a) + i * SQUARE_LD + column + lane % 4 * 2;
    *reinterpret_cast<float2 *>(to) = make_float2(scale * x, scale * y);
}

// Stores the sums as the lower triangles L and A; all other elements are already zero.
template <int SETS>
static __device__ __forceinline__ void
put_sums(const pair_sums & sums, prepare_memory<SETS> & mem, int warp, int lane) {
    const int column = lane % TILE;
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
        float q = sums.near_q[i];
        float k = sums.near_k[i];
#pragma unroll
        for (int mask = TILE; mask < WARP; mask *= 2) {
            q += __shfl_xor_sync(ALL_LANES, q, mask);
            k += __shfl_xor_sync(ALL_LANES, k, mask);
        }
        const int row = warp * TILE + i;
        const int at  = row * SQUARE_LD + warp * TILE + column;
        if (lane / TILE == i / 2) {
            mem.a[at] = i >= column ? q : 0.0f;
            mem.l[at] = i > column ? mem.beta[row] * k : 0.0f;
        }
    }
    const level_place far = place32(warp);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const float * c = sums.half32[n];
        put_pairs(mem, far.is_k, far.row, far.column + n * TILE, c[0], c[1], lane);
        put_pairs(mem, far.is_k, far.row + 8, far.column + n * TILE, c[2], c[3], lane);
    }
    const level_place mid = place16(warp);
    put_pairs(mem, mid.is_k, mid.row, mid.column, sums.half16[0], sums.half16[1], lane);
    put_pairs(mem, mid.is_k, mid.row + 8, mid.column, sums.half16[2], sums.half16[3], lane);
    if (warp < 4) {
        put_pairs(mem, false, 16 * warp + 8, 16 * warp, sums.half8[0], sums.half8[1], lane);
        put_pairs(mem, true, 16 * warp + 8, 16 * warp, sums.half8[2], sums.half8[3], lane);
    }
}

}  // namespace kda_cuda
