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

// Starts to load channels from c0 on of q and k. Tokens after the chunk's last have no effect: k = 0.
static __device__ __forceinline__ void load_rows(part_rows & to, const block_chunk & chunk, int c0) {
    constexpr int     ROWS = PREPARE_THREADS / (PART / 4);  // that the block loads at once
    const scan_args & args = chunk.args;
    const int         at   = threadIdx.x % (PART / 4) * 4;
    const float *     q    = chunk.row(args.q, 0) + c0 + at;
    const float *     k    = chunk.row(args.k, 0) + c0 + at;
#pragma unroll
    for (int n = 0; n < CHUNK / ROWS; ++n) {
        const int t    = threadIdx.x / (PART / 4) + n * ROWS;
        const int size = t < chunk.n_tokens() ? 16 : 0;
        const int from = t < chunk.n_tokens() ? t : 0;
        copy_16_async(to.q + t * PART_LD + at, q + (int64_t) from * args.q.token, size);
        copy_16_async(to.k + t * PART_LD + at, k + (int64_t) from * args.k.token, size);
    }
    commit_copies();
}

// The inputs of a thread's decays for a part of the key channels, loaded while the part before is computed.
struct gate_inputs {
    float f[TILE], dt;

    // Those of tokens after the chunk's last are any numbers: a selection would wait for them.
    __device__ void load(const tile_decays & decays, const block_chunk & chunk, int c0) {
        const float * from = chunk.row(chunk.args.f, 0) + c0 + decays.channel;
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
            const int t = decays.tile * TILE + i;
            f[i]        = from[(int64_t) (t < chunk.n_tokens() ? t : 0) * chunk.args.f.token];
        }
        dt = chunk.args.dt_bias[chunk.head() * chunk.args.head_size + c0 + decays.channel];
    }
};

// Decays from their inputs. Tokens after the chunk's last have no effect: e = 1.
template <int SETS>
static __device__ __forceinline__ void put_decays(prepare_memory<SETS> & mem,
                                                  const gate_inputs &    inputs,
                                                  const tile_decays &    decays,
                                                  const block_chunk &    chunk) {
    const int valid = chunk.n_tokens() - decays.tile * TILE;
    float     e[TILE];
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
        e[i] = i < valid ? inputs.f[i] + inputs.dt : 0.0f;
    }
    decays_of(e, chunk.args.a[chunk.head()], chunk.args.kind);

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
template <int SETS>
static __device__ __forceinline__ frag_a solved(const prepare_memory<SETS> & mem, int row, int column, int lane) {
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

// A lane's part of v, transposed: 16 value channels from 16*warp on, and all tokens.
struct lane_values {
    float x[CHUNK / DEPTH][4][2];  // as in frag_a

    // Numbers of tokens after the chunk's last are any: a selection would wait for them.
    __device__ void load(const block_chunk & chunk, int warp, int lane) {
        const float * v = chunk.row(chunk.args.v, 0) + warp * DEPTH + lane / 4;
#pragma unroll
        for (int i = 0; i < CHUNK / DEPTH * 8; ++i) {
            const int t                = token(i, lane) < chunk.n_tokens() ? token(i, lane) : 0;
            x[i / 8][i / 2 % 4][i % 2] = v[(int64_t) t * chunk.args.v.token + i / 2 % 2 * 8];
        }
    }

    __device__ frag_a factor(int deep, int n_tokens, int lane) const {
        frag_a a;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const int i = deep * 8 + m * 2;
            a.set(m, split(token(i, lane) < n_tokens ? x[deep][m][0] : 0.0f,
                           token(i + 1, lane) < n_tokens ? x[deep][m][1] : 0.0f));
        }
        return a;
    }

    static __device__ __forceinline__ int token(int i, int lane) {
        return i / 8 * DEPTH + i / 4 % 2 * 8 + lane % 4 * 2 + i % 2;
    }
};

// A for tokens j from 16*deep on and the tokens i of a tile.
template <int SETS>
static __device__ __forceinline__ frag_b
pairs_by_tokens(const prepare_memory<SETS> & mem, int deep, int tile, int lane) {
    const float * row = mem.a + (tile * TILE + lane / 4) * SQUARE_LD + deep * DEPTH + lane % 4 * 2;
    frag_b        b;
    b.set(0, split(row[0], row[1]));
    b.set(1, split(row[8], row[9]));
    return b;
}

// -w = -X beta (P k), key channels from 16*warp on.
template <typename layout, int SETS>
static __device__ __forceinline__ void solve_keys(const block_chunk &          chunk,
                                                  const prepare_memory<SETS> & mem,
                                                  const frag_b (&pk)[2][CHUNK / DEPTH],
                                                  int warp,
                                                  int lane) {
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
template <typename layout, int SETS>
static __device__ __forceinline__ void solve_values(
    const block_chunk & chunk, const prepare_memory<SETS> & mem, const lane_values & values, int warp, int lane) {
    frag_a v[CHUNK / DEPTH];
#pragma unroll
    for (int deep = 0; deep < CHUNK / DEPTH; ++deep) {
        v[deep] = values.factor(deep, chunk.n_tokens(), lane);
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

template <int D, int SETS>
static __global__ void __launch_bounds__(PREPARE_THREADS, 2) prepare_kernel(const scan_args args, const chunk_run run) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    using layout = chunk_layout<D>;
    extern __shared__ float4 kda_shared[];
    prepare_memory<SETS> &   mem = *reinterpret_cast<prepare_memory<SETS> *>(kda_shared);

    constexpr bool GATES_LATE = D == 64;  // else nvcc 13.0 spills registers from 10.0 on

    const int warp = threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;

    const block_chunk chunk = { args, run };
    tile_decays       decays;
    gate_inputs       gates;
    if ((int) threadIdx.x < chunk.n_tokens()) {
        copy_4_async(mem.beta + threadIdx.x, chunk.row(args.beta, threadIdx.x));  // before its sigmoid
    }
    load_rows(mem.rows[0], chunk, 0);
    gates.load(decays, chunk, 0);
    pair_sums sums;
    frag_b    pk[2][CHUNK / DEPTH];  // P k of key channels from 16*warp on
    for (int c0 = 0; c0 < D; c0 += PART) {
        const part_rows & rows = mem.rows[c0 / PART % SETS];
        if (GATES_LATE && c0 > 0) {
            gates.load(decays, chunk, c0);
        }
        put_decays(mem, gates, decays, chunk);
        if (c0 + PART < D) {
            if (!GATES_LATE) {
                gates.load(decays, chunk, c0 + PART);
            }
            if (SETS == 2) {
                load_rows(mem.rows[(c0 / PART + 1) % 2], chunk, c0 + PART);
            }
        }
        if (SETS == 2 && c0 + PART < D) {
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        near_pairs(sums, rows, mem.factor[0], warp, lane);
        decays.reload(mem.factor[0]);
        decays.level_to<8>(mem.factor[1], mem.totals);
        __syncthreads();
        far_pairs<8>(sums, rows, mem.factor[1], warp, lane);
        decays.level_to<16>(mem.factor[0], mem.totals);
        __syncthreads();
        far_pairs<16>(sums, rows, mem.factor[0], warp, lane);
        decays.level_to<32>(mem.factor[1], mem.totals);
        __syncthreads();
        far_pairs<32>(sums, rows, mem.factor[1], warp, lane);
        decays.rows_to<TILES - 1>(mem.factor[0], mem.totals, 0);
        __syncthreads();

        const float * prefix = mem.factor[0];
#pragma unroll
        for (int c = 0; c < PART; c += DEPTH) {
            store_frag(chunk.template to<layout>(layout::wq_offset(true, (c0 + c) / DEPTH, warp)), 0, lane,
                       channels_by_tokens(rows.q, prefix, c, warp * TILE, lane));
        }
        if (warp * DEPTH / PART == c0 / PART) {
#pragma unroll
            for (int x = 0; x < 2 * CHUNK / DEPTH; ++x) {
                const int c      = warp * DEPTH - c0 + x % 2 * TILE;
                pk[x % 2][x / 2] = tokens_by_channels(rows.k, prefix, x / 2 * DEPTH, c, lane);
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
                       tokens_by_channels(rows.k, mem.factor[1], deep * DEPTH, tile * TILE, lane));
        }
        __syncthreads();
        if (SETS == 1 && c0 + PART < D) {
            load_rows(mem.rows[0], chunk, c0 + PART);
        }
    }

    for (int x = threadIdx.x; x < SQUARE / 4; x += PREPARE_THREADS) {
        store4(mem.l + 4 * x, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        store4(mem.a + 4 * x, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
    if (threadIdx.x < CHUNK) {
        float & beta = mem.beta[threadIdx.x];
        beta         = (int) threadIdx.x < chunk.n_tokens() ? sigmoid(beta) : 0.0f;
    }
    __syncthreads();
    put_sums(sums, mem, warp, lane);
    __syncthreads();
    for (int deep = 0; deep <= warp / 2; ++deep) {
        store_frag(chunk.template to<layout>(layout::A), a_frag(warp, deep), lane,
                   pairs_by_tokens(mem, deep, warp, lane));
    }
    invert_diagonal(mem.l, warp, lane);
    lane_values values;
    if (warp < D / DEPTH) {
        values.load(chunk, warp, lane);
    }
    __syncthreads();
    merge_inverses<16>(mem.l, mem.scratch);
    merge_inverses<32>(mem.l, mem.scratch);

    if (warp < D / DEPTH) {
        solve_keys<layout>(chunk, mem, pk, warp, lane);
        solve_values<layout>(chunk, mem, values, warp, lane);
    }
#else
    __trap();  // chunks_refused rejects older devices
#endif
}

template <int D, int SETS>
static void launch_prepare(const scan_args & args, const chunk_run & run, cudaStream_t stream) {
    constexpr size_t shared = sizeof(prepare_memory<SETS>);
    cudaFuncSetAttribute(prepare_kernel<D, SETS>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    const dim3 grid(run.n_chunks(), args.n_heads, args.n_seqs);
    prepare_kernel<D, SETS><<<grid, PREPARE_THREADS, shared, stream>>>(args, run);
}

void prepare_chunks(const scan_args & args, const chunk_run & run, const device_limits & device, cudaStream_t stream) {
    with_head_size(chunked_sizes(), args.head_size, [&](auto D) {
        if (device.block_shared >= ROOMY) {
            launch_prepare<D, 2>(args, run, stream);
        } else {
            launch_prepare<D, 1>(args, run, stream);  // so that a block of `states` fits beside it
        }
    });
}

}  // namespace kda_cuda

#endif
