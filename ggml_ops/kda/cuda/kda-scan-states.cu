// Second kernel of the chunked KDA scan: updates the state chunk by chunk and writes the output before its norm.
//
// One or two warps compute 16 value channels of a head. Rows of the transposed state are independent, so these groups
// share only what they read. The state S^T [16, D] stays in the accumulators of its matmuls; as left-hand factor of the next ones it is
// split into bf16 in registers, and so are the values U^T [16, 64]. The output of `prepare` streams through a ring in
// shared memory, in order of use and in stages of up to 16 KiB, with one barrier per stage.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kda-frags.cuh"
#include "kda-scan-chunk.cuh"

namespace kda_cuda {

// The stages of a run of chunks, in order, as read by the whole block.
template <int D, int THREADS, int RING> struct stage_ring {
    using layout = chunk_layout<D>;
    char *       ring;
    const char * from;    // the chunk that the next load reads
    int          n_left;  // chunks of which not all stages are loaded
    int          slot;    // next to load
    int          used;    // next to use

    // Starts to load a stage of a chunk. Stages are loaded in their order; their numbers are constants after unrolling.
    __device__ __forceinline__ void load(int stage) {
        if (n_left > 0) {
            const int    begin = layout::stage_begin(stage);
            const int    size  = layout::stage_end(stage) - begin;
            const int    all   = size / (THREADS * 16) * (THREADS * 16);  // copied by all threads
            char *       to    = ring + slot * STAGE + threadIdx.x * 16;
            const char * at    = from + begin + threadIdx.x * 16;
#pragma unroll
            for (int x = 0; x < all; x += THREADS * 16) {
                copy_16_async(to + x, at + x);
            }
            if ((int) threadIdx.x * 16 < size - all) {
                copy_16_async(to + all, at + all);
            }
            if (stage + 1 == layout::STAGES) {
                --n_left;
                from += layout::SIZE;
            }
            slot = slot + 1 == RING ? 0 : slot + 1;
        }
        commit_copies();
    }

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int i = 0; i < RING - 1; ++i) {
            load(i % layout::STAGES);
        }
    }

    // The next stage, which has this number in its chunk; valid until the next call.
    __device__ __forceinline__ const char * next(int stage) {
        wait_copies<RING - 2>();
        __syncthreads();
        load((stage + RING - 1) % layout::STAGES);
        const char * at = ring + used * STAGE;
        used            = used + 1 == RING ? 0 : used + 1;
        return at;
    }
};

// How SPLIT warps (one or two) share 16 value channels. `part` is the warp's number among them.
//
// A warp has every SPLIT-th group of 16 key channels of the state. Two warps compute partial sums of u and o for all
// tokens; each completes those of two of the four groups of 16 tokens, and both need all values U. A warp numbers the
// groups so that it completes 0 and 3: they need as many fragments of A as 1 and 2, which its neighbour completes.
template <int SPLIT> struct split_work {
    static_assert(SPLIT == 1 || SPLIT == 2);
    int part;

    static __host__ __device__ constexpr bool completes(int group) { return SPLIT == 1 || group == 0 || group == 3; }

    __device__ int group(int own) const { return SPLIT == 1 ? own : own % 2 == 0 ? own + part : own - part; }

    __device__ int token_tile(int own) const { return 2 * group(own / 2) + own % 2; }

    __device__ int key_tile(int own) const { return 2 * (own / 2 * SPLIT + part) + own % 2; }
};

// What two neighbouring warps exchange: each writes what the other one reads.
template <int WARPS> struct exchange {
    float4 sums[WARPS][CHUNK / DEPTH][2][WARP];  // of u and o; by 8 of the tokens that the reader completes
    frag_a values[WARPS][2][WARP];               // of the tokens that the writer completes
};

// A warp's part of 16 rows of the transposed state: value channels from j0 on.
template <int D, int SPLIT> struct warp_state {
    static constexpr int COUNT = D / TILE / SPLIT;
    float                m[COUNT][4];

    // s: the head's state; nullptr: zeros
    __device__ void load(const float * s, split_work<SPLIT> work, int j0, int lane) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float * at   = s + offset(work.key_tile(n), half, j0, lane);
                const float2  x    = s ? *reinterpret_cast<const float2 *>(at) : make_float2(0.0f, 0.0f);
                m[n][2 * half]     = x.x;
                m[n][2 * half + 1] = x.y;
            }
        }
    }

    __device__ void store(float * s, split_work<SPLIT> work, int j0, int lane) const {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float * at                      = s + offset(work.key_tile(n), half, j0, lane);
                *reinterpret_cast<float2 *>(at) = make_float2(m[n][2 * half], m[n][2 * half + 1]);
            }
        }
    }

    __device__ void decay(const float * last, split_work<SPLIT> work, int lane) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            const float2 e = *reinterpret_cast<const float2 *>(last + work.key_tile(n) * TILE + lane % 4 * 2);
            m[n][0] *= e.x;
            m[n][1] *= e.y;
            m[n][2] *= e.x;
            m[n][3] *= e.y;
        }
    }

    static __device__ __forceinline__ int offset(int tile, int half, int j0, int lane) {
        return (j0 + lane / 4 + 8 * half) * D + tile * TILE + lane % 4 * 2;
    }
};

// u of value channels from j0 on and the tokens that the warp completes, as accumulators; zeros for the others
template <int SPLIT>
static __device__ __forceinline__ void
load_values(float (&u)[TILES][4], const char * from, split_work<SPLIT> work, int j0, int lane) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const int    index = (j0 / DEPTH * TILES + work.token_tile(tile)) * WARP + lane;
        const float4 zero  = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float4 x     = work.completes(tile / 2) ? load4(reinterpret_cast<const float *>(from) + 4 * index) : zero;
        u[tile][0]         = x.x;
        u[tile][1]         = x.y;
        u[tile][2]         = x.z;
        u[tile][3]         = x.w;
    }
}

// o: rows value channels from j0 on, columns tokens, of which n are valid; WHOLE: all
template <bool WHOLE, int SPLIT>
static __device__ __forceinline__ void store_output(const scan_args & args,
                                                    const float (&o)[TILES][4],
                                                    split_work<SPLIT> work,
                                                    int               h,
                                                    int               s,
                                                    int               t0,
                                                    int               n,
                                                    int               j0,
                                                    int               lane) {
    float *   first  = args.out_at(h, t0, s) + j0 + lane / 4;
    const int stride = args.n_heads * args.head_size;  // of tokens
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        if (!work.completes(tile / 2)) {
            continue;
        }
        const int t   = work.token_tile(tile) * TILE + lane % 4 * 2;
        float *   out = first + (int64_t) t * stride;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (WHOLE || t + i < n) {
                out[i * stride]     = o[tile][i];
                out[i * stride + 8] = o[tile][2 + i];
            }
        }
    }
}

// Gives the neighbour this warp's sums of the tokens that the neighbour completes.
template <int WARPS>
static __device__ __forceinline__ void
give_sums(exchange<WARPS> & shared, int which, const float (&x)[TILES][4], int warp, int lane) {
#pragma unroll
    for (int tile = 2; tile < 6; ++tile) {  // groups 1 and 2: the neighbour's 0 and 3
        shared.sums[warp ^ 1][tile - 2][which][lane] = make_float4(x[tile][0], x[tile][1], x[tile][2], x[tile][3]);
    }
}

template <int WARPS>
static __device__ __forceinline__ void
add_sums(const exchange<WARPS> & shared, int which, float (&x)[TILES][4], int warp, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 y    = shared.sums[warp][i][which][lane];
        const int    tile = i < 2 ? i : i + 4;
        x[tile][0] += y.x;
        x[tile][1] += y.y;
        x[tile][2] += y.z;
        x[tile][3] += y.w;
    }
}

// o += A U for the values of one of the warp's groups of tokens.
template <int SPLIT>
static __device__ __forceinline__ void
add_pairs(float (&o)[TILES][4], const frag_a & values, const char * a, split_work<SPLIT> work, int from, int lane) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const int to = tile / 2;
        if (!work.completes(to) || from > (SPLIT == 1 ? to : to | 1) || work.group(from) > work.group(to)) {
            continue;
        }
        mma_split(o[tile], values, load_frag(a, a_frag(work.token_tile(tile), work.group(from)), lane));
    }
}

template <int D, int WARPS, int RING, int SPLIT>
static __global__ void __launch_bounds__(WARPS * WARP, 1) states_kernel(const scan_args args, const chunk_run run) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    using layout = chunk_layout<D>;
    extern __shared__ float4 kda_shared[];
    exchange<WARPS> &        shared = *reinterpret_cast<exchange<WARPS> *>(kda_shared + RING * STAGE / sizeof(float4));

    const int               warp     = threadIdx.x / WARP;
    const int               lane     = threadIdx.x % WARP;
    const int               h        = blockIdx.y;
    const int               s        = blockIdx.z;
    const int               j0       = (blockIdx.x * WARPS + warp) / SPLIT * DEPTH;
    const split_work<SPLIT> work     = { warp % SPLIT };
    const int               n_chunks = run.n_chunks();
    const char *            chunk    = run.at(layout::SIZE, 0, h, s, args.n_heads);
    const state_dest        dest     = dest_of(args.st, rows_conflict(args.st));

    stage_ring<D, WARPS * WARP, RING> stages = { reinterpret_cast<char *>(kda_shared), chunk, n_chunks, 0, 0 };
    stages.start();

    float *       kept  = dest.at(s, args.st.n_slots - 1) + (int64_t) h * D * D;
    const float * found = run.begin > 0 ? kept : state_found(args.st, s);
    if (run.begin == 0 && found) {
        found += (int64_t) h * D * D;
    }
    warp_state<D, SPLIT> state;
    state.load(found, work, j0, lane);

    float u[TILES][4];
    load_values(u, chunk + layout::U, work, j0, lane);

    for (int t0 = run.begin; t0 < run.end; t0 += CHUNK) {
        float o[TILES][4] = {};
#pragma unroll
        for (int stage = 0; stage < layout::WQ_STAGES; ++stage) {
            const char * wq = stages.next(stage);
#pragma unroll
            for (int x = 0; x < 2 / SPLIT; ++x) {
                const int    deep = x + work.part;
                const int    n    = (stage * 2 / SPLIT + x) * 2;
                const frag_a m    = as_factor(state.m[n], state.m[n + 1]);
#pragma unroll
                for (int tile = 0; tile < TILES; tile += MMA_TOGETHER) {
                    const auto at = [&](int i) { return deep * TILES + work.token_tile(tile + i); };
                    frag_b     b[MMA_TOGETHER];
                    load_frags(b, wq, at, lane);
                    mma_split(u + tile, m, b);
                    load_frags(b, wq + 2 * TILES * FRAG_SIZE, at, lane);
                    mma_split(o + tile, m, b);
                }
            }
        }
        if constexpr (SPLIT == 2) {
            give_sums(shared, 0, u, warp, lane);
            give_sums(shared, 1, o, warp, lane);
        }

        const char * a = stages.next(layout::WQ_STAGES);
        state.decay(reinterpret_cast<const float *>(a + layout::LAST - layout::A), work, lane);
        frag_a values[CHUNK / DEPTH];
        if constexpr (SPLIT == 2) {
            add_sums(shared, 0, u, warp, lane);
            add_sums(shared, 1, o, warp, lane);
        }
#pragma unroll
        for (int from = 0; from < CHUNK / DEPTH; ++from) {
            if (work.completes(from)) {
                values[from] = as_factor(u[2 * from], u[2 * from + 1]);
                if constexpr (SPLIT == 2) {
                    shared.values[warp ^ 1][from / 2][lane] = values[from];
                }
                add_pairs(o, values[from], a, work, from, lane);
            }
        }
        if constexpr (SPLIT == 2) {
            __syncthreads();
#pragma unroll
            for (int from = 1; from <= 2; ++from) {
                values[from] = shared.values[warp][from / 2][lane];
                add_pairs(o, values[from], a, work, from, lane);
            }
        }
        if (run.end - t0 >= CHUNK) {
            store_output<true>(args, o, work, h, s, t0, CHUNK, j0, lane);
        } else {
            store_output<false>(args, o, work, h, s, t0, run.end - t0, j0, lane);
        }

        // prefetches those of the next chunk
        chunk += layout::SIZE;
        if (t0 + CHUNK < run.end) {
            load_values(u, chunk + layout::U, work, j0, lane);
        }

        constexpr int PER_STAGE = STAGE / FRAG_SIZE / (CHUNK / DEPTH);  // tiles of key channels
        const char *  rk        = nullptr;
#pragma unroll
        for (int n = 0; n < state.COUNT; n += MMA_TOGETHER) {
            if (n % (PER_STAGE / SPLIT) == 0) {
                rk = stages.next(layout::WQ_STAGES + 1 + n / (PER_STAGE / SPLIT));
            }
#pragma unroll
            for (int from = 0; from < CHUNK / DEPTH; ++from) {
                const int deep = work.group(from);
                frag_b    b[MMA_TOGETHER];
                load_frags(
                    b, rk, [&](int i) { return work.key_tile(n + i) % PER_STAGE * (CHUNK / DEPTH) + deep; }, lane);
                mma_split(state.m + n, values[from], b);
            }
        }
    }
    state.store(kept, work, j0, lane);
#else
    __trap();  // chunks_refused rejects older devices
#endif
}

// Stages in shared memory. Five are 80 KiB, which every device from 8.0 on can give to one block. A multiprocessor of
// 8.6, 8.9 and 12.0 has 100 KiB: there, two blocks with three stages each fit, or one and a block of `prepare`; of blocks
// with two warps per group, one.
constexpr int DEEP_RING = 5, SHORT_RING = 3;

template <int D, int WARPS, int RING, int SPLIT = 1>
static void launch_blocks(const scan_args & args, const chunk_run & run, cudaStream_t stream) {
    constexpr size_t shared = RING * STAGE + (SPLIT == 2 ? sizeof(exchange<WARPS>) : 0);
    cudaFuncSetAttribute(states_kernel<D, WARPS, RING, SPLIT>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    const dim3 grid(D * SPLIT / (DEPTH * WARPS), args.n_heads, args.n_seqs);
    states_kernel<D, WARPS, RING, SPLIT><<<grid, WARPS * WARP, shared, stream>>>(args, run);
}

// Blocks of 32 value channels occupy more multiprocessors; a block with a whole head reads the head's inputs once. It is
// used if there is one for three quarters of the multiprocessors. Its registers leave no room for a second block.
// Two warps share 16 value channels if each has a scheduler of its own: a warp waits for its own products in half of
// its cycles. (H200, 32 heads of 128, 8192 tokens: 1.04 ms instead of 1.08.)
template <int D>
static void
launch_states(const scan_args & args, const chunk_run & run, const device_limits & device, cudaStream_t stream) {
    const bool scarce = device.block_shared < ROOMY;
    if (4 * (int64_t) args.n_heads * args.n_seqs >= 3 * device.n_sms) {
        launch_blocks<D, D / DEPTH, DEEP_RING>(args, run, stream);
        return;
    }
    if constexpr (D % 64 == 0) {
        if (2 * (int64_t) D / DEPTH * args.n_heads * args.n_seqs <= SCHEDULERS * device.n_sms) {
            scarce ? launch_blocks<D, 4, SHORT_RING, 2>(args, run, stream)
                   : launch_blocks<D, 4, DEEP_RING, 2>(args, run, stream);
            return;
        }
    }
    scarce ? launch_blocks<D, 2, SHORT_RING>(args, run, stream) : launch_blocks<D, 2, DEEP_RING>(args, run, stream);
}

void carry_states(const scan_args & args, const chunk_run & run, const device_limits & device, cudaStream_t stream) {
    with_head_size(chunked_sizes(), args.head_size, [&](auto D) { launch_states<D>(args, run, device, stream); });
}

}  // namespace kda_cuda

#endif
