// Second kernel of the chunked KDA scan: updates the state chunk by chunk and writes the output before its norm.
//
// A warp computes 16 value channels of a head. Rows of the transposed state are independent, so warps share only what
// they read. The state S^T [16, D] stays in the accumulators of its matmuls; as left-hand factor of the next ones it is
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
    int          n_left;  // stages not yet loaded
    int          stage;   // next to load, within its chunk
    int          slot;    // next to load
    int          used;    // next to use

    __device__ void load_next() {
        if (n_left > 0) {
            const int begin = layout::stage_begin(stage);
            const int size  = layout::stage_end(stage) - begin;
            for (int x = threadIdx.x * 16; x < size; x += THREADS * 16) {
                copy_16_async(ring + slot * STAGE + x, from + begin + x);
            }
            --n_left;
            if (++stage == layout::STAGES) {
                stage = 0;
                from += layout::SIZE;
            }
            slot = slot + 1 == RING ? 0 : slot + 1;
        }
        commit_copies();
    }

    __device__ void start() {
        for (int i = 0; i < RING - 1; ++i) {
            load_next();
        }
    }

    // The next stage, valid until the next call.
    __device__ const char * next() {
        wait_copies<RING - 2>();
        __syncthreads();
        load_next();
        const char * at = ring + used * STAGE;
        used            = used + 1 == RING ? 0 : used + 1;
        return at;
    }
};

// A warp's 16 rows of the transposed state: value channels from j0 on.
template <int D> struct warp_state {
    float m[D / TILE][4];

    // s: the head's state; nullptr: zeros
    __device__ void load(const float * s, int j0, int lane) {
#pragma unroll
        for (int n = 0; n < D / TILE; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float * at   = s + (j0 + lane / 4 + 8 * half) * D + n * TILE + lane % 4 * 2;
                const float2  x    = s ? *reinterpret_cast<const float2 *>(at) : make_float2(0.0f, 0.0f);
                m[n][2 * half]     = x.x;
                m[n][2 * half + 1] = x.y;
            }
        }
    }

    __device__ void store(float * s, int j0, int lane) const {
#pragma unroll
        for (int n = 0; n < D / TILE; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float * at                      = s + (j0 + lane / 4 + 8 * half) * D + n * TILE + lane % 4 * 2;
                *reinterpret_cast<float2 *>(at) = make_float2(m[n][2 * half], m[n][2 * half + 1]);
            }
        }
    }

    __device__ void decay(const float * last, int lane) {
#pragma unroll
        for (int n = 0; n < D / TILE; ++n) {
            const float2 e = *reinterpret_cast<const float2 *>(last + n * TILE + lane % 4 * 2);
            m[n][0] *= e.x;
            m[n][1] *= e.y;
            m[n][2] *= e.x;
            m[n][3] *= e.y;
        }
    }
};

// u of value channels from j0 on and all tokens of a chunk, as accumulators
static __device__ __forceinline__ void load_values(float (&u)[TILES][4], const char * from, int j0, int lane) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const int    index = (j0 / DEPTH * TILES + tile) * WARP + lane;
        const float4 x     = load4(reinterpret_cast<const float *>(from) + 4 * index);
        u[tile][0]         = x.x;
        u[tile][1]         = x.y;
        u[tile][2]         = x.z;
        u[tile][3]         = x.w;
    }
}

// o: rows value channels from j0 on, columns tokens, of which n are valid
static __device__ __forceinline__ void
store_output(const scan_args & args, const float (&o)[TILES][4], int h, int s, int t0, int n, int j0, int lane) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int t = tile * TILE + lane % 4 * 2 + i;
            if (t < n) {
                float * out = args.out_at(h, t0 + t, s) + j0 + lane / 4;
                out[0]      = o[tile][i];
                out[8]      = o[tile][2 + i];
            }
        }
    }
}

template <int D, int WARPS, int RING>
static __global__ void __launch_bounds__(WARPS * WARP) states_kernel(const scan_args args, const chunk_run run) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    using layout = chunk_layout<D>;
    extern __shared__ float4 kda_shared[];

    const int        warp     = threadIdx.x / WARP;
    const int        lane     = threadIdx.x % WARP;
    const int        h        = blockIdx.y;
    const int        s        = blockIdx.z;
    const int        j0       = (blockIdx.x * WARPS + warp) * DEPTH;
    const int        n_chunks = run.n_chunks();
    const char *     chunk    = run.at(layout::SIZE, 0, h, s, args.n_heads);
    const state_dest dest     = dest_of(args.st, rows_conflict(args.st));

    stage_ring<D, WARPS * WARP, RING> stages = {
        reinterpret_cast<char *>(kda_shared), chunk, n_chunks * layout::STAGES, 0, 0, 0
    };
    stages.start();

    float *       kept  = dest.at(s, args.st.n_slots - 1) + (int64_t) h * D * D;
    const float * found = run.begin > 0 ? kept : state_found(args.st, s);
    if (run.begin == 0 && found) {
        found += (int64_t) h * D * D;
    }
    warp_state<D> state;
    state.load(found, j0, lane);

    float u[TILES][4];
    load_values(u, chunk + layout::U, j0, lane);

    for (int t0 = run.begin; t0 < run.end; t0 += CHUNK) {
        float o[TILES][4] = {};
#pragma unroll
        for (int stage = 0; stage < layout::WQ_STAGES; ++stage) {
            const char * wq = stages.next();
#pragma unroll
            for (int deep = 0; deep < 2; ++deep) {
                const int    n = (2 * stage + deep) * 2;
                const frag_a m = as_factor(state.m[n], state.m[n + 1]);
#pragma unroll
                for (int tile = 0; tile < TILES; tile += MMA_TOGETHER) {
                    frag_b b[MMA_TOGETHER];
                    load_frags(b, wq, deep * TILES + tile, 1, lane);
                    mma_split(u + tile, m, b);
                    load_frags(b, wq, (2 + deep) * TILES + tile, 1, lane);
                    mma_split(o + tile, m, b);
                }
            }
        }

        const char * a = stages.next();
        state.decay(reinterpret_cast<const float *>(a + layout::LAST - layout::A), lane);
        frag_a values[CHUNK / DEPTH];
#pragma unroll
        for (int deep = 0; deep < CHUNK / DEPTH; ++deep) {
            values[deep] = as_factor(u[2 * deep], u[2 * deep + 1]);
#pragma unroll
            for (int tile = 2 * deep; tile < TILES; ++tile) {
                mma_split(o[tile], values[deep], load_frag(a, a_frag(tile, deep), lane));
            }
        }
        store_output(args, o, h, s, t0, run.end - t0, j0, lane);

        // prefetches those of the next chunk
        chunk += layout::SIZE;
        if (t0 + CHUNK < run.end) {
            load_values(u, chunk + layout::U, j0, lane);
        }

        constexpr int PER_STAGE = STAGE / FRAG_SIZE / (CHUNK / DEPTH);  // tiles of key channels
        const char *  rk        = nullptr;
#pragma unroll
        for (int n = 0; n < D / TILE; n += MMA_TOGETHER) {
            if (n % PER_STAGE == 0) {
                rk = stages.next();
            }
#pragma unroll
            for (int deep = 0; deep < CHUNK / DEPTH; ++deep) {
                frag_b b[MMA_TOGETHER];
                load_frags(b, rk, n % PER_STAGE * (CHUNK / DEPTH) + deep, CHUNK / DEPTH, lane);
                mma_split(state.m + n, values[deep], b);
            }
        }
    }
    state.store(kept, j0, lane);
#else
    __trap();  // chunks_refused rejects older devices
#endif
}

// Stages in shared memory. Five are 80 KiB, which every device from 8.0 on can give to one block. A multiprocessor of
// 8.6, 8.9 and 12.0 has 100 KiB: there, two blocks with three stages each fit, or one and a block of `prepare`.
constexpr int    DEEP_RING = 5, SHORT_RING = 3;
constexpr size_t DEEP_RING_FROM = 160 << 10;  // shared memory per block: 99 KiB on those, 163 and more on 8.0 and 9.0

template <int D, int WARPS, int RING>
static void launch_blocks(const scan_args & args, const chunk_run & run, cudaStream_t stream) {
    constexpr size_t shared = RING * STAGE;
    cudaFuncSetAttribute(states_kernel<D, WARPS, RING>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    const dim3 grid(D / (DEPTH * WARPS), args.n_heads, args.n_seqs);
    states_kernel<D, WARPS, RING><<<grid, WARPS * WARP, shared, stream>>>(args, run);
}

// Blocks of two warps occupy more multiprocessors; a block with a whole head reads the head's inputs once. It is used if
// there is one for three quarters of the multiprocessors. Its registers leave no room for a second block.
template <int D>
static void
launch_states(const scan_args & args, const chunk_run & run, const device_limits & device, cudaStream_t stream) {
    if (4 * (int64_t) args.n_heads * args.n_seqs >= 3 * device.n_sms) {
        launch_blocks<D, D / DEPTH, DEEP_RING>(args, run, stream);
    } else if (device.block_shared >= DEEP_RING_FROM) {
        launch_blocks<D, 2, DEEP_RING>(args, run, stream);
    } else {
        launch_blocks<D, 2, SHORT_RING>(args, run, stream);
    }
}

void carry_states(const scan_args & args, const chunk_run & run, const device_limits & device, cudaStream_t stream) {
    with_head_size(chunked_sizes(), args.head_size, [&](auto D) { launch_states<D>(args, run, device, stream); });
}

}  // namespace kda_cuda

#endif
