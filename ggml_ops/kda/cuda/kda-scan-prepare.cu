// First kernel of the chunked KDA scan: computes what does not depend on the state, one block per chunk and head.
// Input: the tokens. Output: w, u, A, P q, R k and P_last in the layout of kda-scan-chunk.cuh.
//
// For each part of the key channels, A and L are accumulated (kda-scan-pairs.cuh) and final results are written. Then
// I + L is inverted in shared memory, and each warp solves for its 16 key channels and its 16 value channels.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kda-scan-pairs.cuh"

namespace kda_cuda {

// The chunk that a block prepares. Computed again at every use, to save registers.
struct block_chunk {
    const scan_args & args;
    const chunk_run & run;

    __device__ int head() const { return blockIdx.y; }

    __device__ int seq() const { return blockIdx.z; }

    __device__ int first() const { return run.begin + blockIdx.x * CHUNK; }

    __device__ int n_tokens() const { return run.end - first() < CHUNK ? run.end - first() : CHUNK; }

    // a row of token t of the chunk
    __device__ const float * row(const rows & x, int t) const { return x.at(head(), first() + t, seq()); }

    template <typename layout> __device__ char * to(int offset) const {
        return run.at(layout::SIZE, blockIdx.x, head(), seq(), args.n_heads) + offset;
    }
};

// Channels from c0 on of q and k, and the decays. Tokens after the chunk's last have no effect: k = 0, e = 1.
static __device__ __forceinline__ void
load_part(prepare_memory & mem, const tile_decays & decays, const block_chunk & chunk, int c0) {
    constexpr int     ROWS = PREPARE_THREADS / (PART / 4);  // that the block loads at once
    const scan_args & args = chunk.args;
    const int         at   = threadIdx.x % (PART / 4) * 4;
    const float *     q    = chunk.row(args.q, 0) + c0 + at;
    const float *     k    = chunk.row(args.k, 0) + c0 + at;
#pragma unroll
    for (int n = 0; n < CHUNK / ROWS; ++n) {
        const int    t    = threadIdx.x / (PART / 4) + n * ROWS;
        const bool   some = t < chunk.n_tokens();
        const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        store4(mem.q + t * PART_LD + at, some ? load4(q + (int64_t) t * args.q.token) : zero);
        store4(mem.k + t * PART_LD + at, some ? load4(k + (int64_t) t * args.k.token) : zero);
    }
    const int     c     = c0 + decays.channel;
    const float   dt    = args.dt_bias[chunk.head() * args.head_size + c];
    const float * f     = chunk.row(args.f, decays.tile * TILE) + c;
    const int     valid = chunk.n_tokens() - decays.tile * TILE;
    float         e[TILE];
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
        e[i] = i < valid ? f[(int64_t) i * args.f.token] + dt : 0.0f;
    }
    decays_of(e, args.a[chunk.head()], args.kind);

    float total = 1.0f;
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
        const float x = i < valid ? e[i] : 1.0f;
        total *= x;
        mem.factor[0][decays.at(i)] = x;
    }
    mem.totals[decays.tile][decays.channel] = total;
}

// The inverses of the four 16x16 blocks on the diagonal of I + x, in place: one block per warp, one column per lane.
static __device__ __forceinline__ void invert_diagonal(float * x, int warp, int lane) {
    if (warp >= CHUNK / DEPTH) {
        return;
    }
    float * block = x + warp * DEPTH * (SQUARE_LD + 1);
    float   y[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        y[i] = i == lane ? 1.0f : 0.0f;
#pragma unroll
        for (int j = 0; j < i; ++j) {
            y[i] -= block[i * SQUARE_LD + j] * y[j];
        }
    }
    __syncwarp();
    if (lane < DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            block[i * SQUARE_LD + lane] = y[i];
        }
    }
}

// Merges two neighbouring N x N inverses and the block below the first into one of 2N x 2N: X21 = -X22 (L21 X11).
template <int N> static __device__ __forceinline__ void merge_inverses(float * x, float * scratch) {
    constexpr int LD      = N + 4;
    const int     unit    = threadIdx.x;  // four neighbouring columns
    const int     pair    = unit / (N * N / 4);
    const int     i       = unit / (N / 4) % N;
    const int     j       = unit % (N / 4) * 4;
    const bool    active  = pair < CHUNK / (2 * N);
    float *       corner  = x + pair * 2 * N * (SQUARE_LD + 1);  // of X11
    float *       below   = corner + N * SQUARE_LD;              // of L21
    float *       product = scratch + pair * N * LD;
    if (active) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (int m = 0; m < N; ++m) {
            const float  l = below[i * SQUARE_LD + m];
            const float4 y = load4(corner + m * SQUARE_LD + j);
            sum            = make_float4(sum.x + l * y.x, sum.y + l * y.y, sum.z + l * y.z, sum.w + l * y.w);
        }
        store4(product + i * LD + j, sum);
    }
    __syncthreads();
    if (active) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (int m = 0; m < N; ++m) {
            const float  l = below[i * SQUARE_LD + N + m];
            const float4 y = load4(product + m * LD + j);
            sum            = make_float4(sum.x - l * y.x, sum.y - l * y.y, sum.z - l * y.z, sum.w - l * y.w);
        }
        store4(below + i * SQUARE_LD + j, sum);
    }
    __syncthreads();
}

// X beta, tokens from `row` on by tokens from `column` on.
static __device__ __forceinline__ frag_a solved(const prepare_memory & mem, int row, int column, int lane) {
    frag_a a;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const int    i = row + lane / 4 + n % 2 * 8;
        const int    j = column + lane % 4 * 2 + n / 2 * 8;
        const float2 x = *reinterpret_cast<const float2 *>(mem.l + i * SQUARE_LD + j);
        a.set(n, split(x.x * mem.beta[j], x.y * mem.beta[j + 1]));
    }
    return a;
}

static __device__ __forceinline__ frag_b half_of(const frag_a & a, int half) {
    return { { a.hi[half], a.hi[2 + half] }, { a.lo[half], a.lo[2 + half] } };
}

// 16 value channels and 16 tokens of v, transposed. v: the lane's first channel and token; n: tokens from there on
static __device__ __forceinline__ frag_a values(const float * v, int stride, int n) {
    frag_a a;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
        const int     t = m / 2 * 8;
        const float * x = v + (int64_t) t * stride + m % 2 * 8;
        a.set(m, split(t < n ? x[0] : 0.0f, t + 1 < n ? x[stride] : 0.0f));
    }
    return a;
}

// A for tokens j from 16*deep on and the tokens i of a tile.
static __device__ __forceinline__ frag_b pairs_by_tokens(const prepare_memory & mem, int deep, int tile, int lane) {
    const float * row = mem.a + (tile * TILE + lane / 4) * SQUARE_LD + deep * DEPTH + lane % 4 * 2;
    frag_b        b;
    b.set(0, split(row[0], row[1]));
    b.set(1, split(row[8], row[9]));
    return b;
}

// -w = -X beta (P k), key channels from 16*warp on.
template <typename layout>
static __device__ __forceinline__ void solve_keys(
    const block_chunk & chunk, const prepare_memory & mem, const frag_b (&pk)[2][CHUNK / DEPTH], int warp, int lane) {
#pragma unroll 1
    for (int m = 0; m < CHUNK / DEPTH; ++m) {
        float w[2][4] = {};  // 16 tokens, two tiles of key channels
#pragma unroll
        for (int deep = 0; deep < CHUNK / DEPTH; ++deep) {
            if (deep > m) {
                break;
            }
            const frag_a x = solved(mem, m * DEPTH, deep * DEPTH, lane);
            mma_split(w[0], x, pk[0][deep]);
            mma_split(w[1], x, pk[1][deep]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            frag_b minus_w;
            minus_w.set(0, split(-w[0][2 * i], -w[0][2 * i + 1]));
            minus_w.set(1, split(-w[1][2 * i], -w[1][2 * i + 1]));
            store_frag(chunk.template to<layout>(layout::wq_offset(false, warp, 2 * m + i)), 0, lane, minus_w);
        }
    }
}

// u = X beta v, value channels from 16*warp on, transposed.
template <typename layout>
static __device__ __forceinline__ void
solve_values(const block_chunk & chunk, const prepare_memory & mem, int warp, int lane) {
    const int     stride = chunk.args.v.token;
    const int     first  = lane % 4 * 2;  // token
    const float * from   = chunk.row(chunk.args.v, first) + warp * DEPTH + lane / 4;
    frag_a        v[CHUNK / DEPTH];
#pragma unroll
    for (int deep = 0; deep < CHUNK / DEPTH; ++deep) {
        const int t = deep * DEPTH;
        v[deep]     = values(from + (int64_t) t * stride, stride, chunk.n_tokens() - first - t);
    }
#pragma unroll 1
    for (int m = 0; m < CHUNK / DEPTH; ++m) {
        float u[2][4] = {};  // 16 value channels, two tiles of tokens
#pragma unroll
        for (int deep = 0; deep < CHUNK / DEPTH; ++deep) {
            if (deep > m) {
                break;
            }
            const frag_a x = solved(mem, m * DEPTH, deep * DEPTH, lane);
            mma_split(u[0], v[deep], half_of(x, 0));
            mma_split(u[1], v[deep], half_of(x, 1));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float * to = reinterpret_cast<float *>(chunk.template to<layout>(layout::U));
            store4(to + ((warp * TILES + 2 * m + i) * WARP + lane) * 4,
                   make_float4(u[i][0], u[i][1], u[i][2], u[i][3]));
        }
    }
}

template <int D>
static __global__ void __launch_bounds__(PREPARE_THREADS, 2) prepare_kernel(const scan_args args, const chunk_run run) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    using layout = chunk_layout<D>;
    __shared__ prepare_memory mem;

    const int warp = threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;

    const block_chunk chunk = { args, run };
    if (threadIdx.x < CHUNK) {
        const int t = threadIdx.x;
        mem.beta[t] = t < chunk.n_tokens() ? sigmoid(*chunk.row(args.beta, t)) : 0.0f;
    }
    pair_sums   sums;
    frag_b      pk[2][CHUNK / DEPTH];  // P k of key channels from 16*warp on
    tile_decays decays;
    for (int c0 = 0; c0 < D; c0 += PART) {
        load_part(mem, decays, chunk, c0);
        __syncthreads();
        near_pairs(sums, mem, warp, lane);
        decays.reload(mem.factor[0]);
        decays.level_to<8>(mem.factor[1], mem.totals);
        __syncthreads();
        far_pairs<8>(sums, mem, mem.factor[1], warp, lane);
        decays.level_to<16>(mem.factor[0], mem.totals);
        __syncthreads();
        far_pairs<16>(sums, mem, mem.factor[0], warp, lane);
        decays.level_to<32>(mem.factor[1], mem.totals);
        __syncthreads();
        far_pairs<32>(sums, mem, mem.factor[1], warp, lane);
        decays.rows_to<TILES - 1>(mem.factor[0], mem.totals, 0);
        __syncthreads();

        const float * prefix = mem.factor[0];
#pragma unroll
        for (int c = 0; c < PART; c += DEPTH) {
            store_frag(chunk.template to<layout>(layout::wq_offset(true, (c0 + c) / DEPTH, warp)), 0, lane,
                       channels_by_tokens(mem.q, prefix, c, warp * TILE, lane));
        }
        if (warp * DEPTH / PART == c0 / PART) {
#pragma unroll
            for (int x = 0; x < 2 * CHUNK / DEPTH; ++x) {
                const int c      = warp * DEPTH - c0 + x % 2 * TILE;
                pk[x % 2][x / 2] = tokens_by_channels(mem.k, prefix, x / 2 * DEPTH, c, lane);
            }
        }
        if (warp == TILES - 1) {
            reinterpret_cast<float *>(chunk.template to<layout>(layout::LAST))[c0 + lane] =
                prefix[(CHUNK - 1) * PART_LD + lane];
        }
        decays.columns_to<TILES - 1>(mem.factor[1], mem.totals, TILES);
        __syncthreads();
#pragma unroll
        for (int x = warp; x < PART / TILE * (CHUNK / DEPTH); x += PREPARE_WARPS) {
            const int tile = x / (CHUNK / DEPTH);
            const int deep = x % (CHUNK / DEPTH);
            store_frag(chunk.template to<layout>(layout::RK), (c0 / TILE + tile) * (CHUNK / DEPTH) + deep, lane,
                       tokens_by_channels(mem.k, mem.factor[1], deep * DEPTH, tile * TILE, lane));
        }
        __syncthreads();
    }

    for (int x = threadIdx.x; x < SQUARE / 4; x += PREPARE_THREADS) {
        store4(mem.l + 4 * x, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        store4(mem.a + 4 * x, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
    __syncthreads();
    put_sums(sums, mem, warp, lane);
    __syncthreads();
    for (int deep = 0; deep <= warp / 2; ++deep) {
        store_frag(chunk.template to<layout>(layout::A), a_frag(warp, deep), lane,
                   pairs_by_tokens(mem, deep, warp, lane));
    }
    invert_diagonal(mem.l, warp, lane);
    __syncthreads();
    merge_inverses<16>(mem.l, mem.scratch);
    merge_inverses<32>(mem.l, mem.scratch);

    if (warp < D / DEPTH) {
        solve_keys<layout>(chunk, mem, pk, warp, lane);
        solve_values<layout>(chunk, mem, warp, lane);
    }
#else
    __trap();  // chunks_refused rejects older devices
#endif
}

template <int D> static void launch_prepare(const scan_args & args, const chunk_run & run, cudaStream_t stream) {
    const dim3 grid(run.n_chunks(), args.n_heads, args.n_seqs);
    prepare_kernel<D><<<grid, PREPARE_THREADS, 0, stream>>>(args, run);
}

void prepare_chunks(const scan_args & args, const chunk_run & run, cudaStream_t stream) {
    with_head_size(chunked_sizes(), args.head_size, [&](auto D) { launch_prepare<D>(args, run, stream); });
}

}  // namespace kda_cuda

#endif
