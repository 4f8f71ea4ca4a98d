// Latent attention on CUDA, decompressed: expands the latents of a run of keys to keys and values of each head.
//
// One matmul per head: [keys][N_LATENT] x [N_LATENT][128]. A block computes EXPAND_KEYS keys of it, a warp 32 keys by
// 64 values; both factors are double-buffered in shared memory by steps of the latent. The latent is the slow dimension
// of k_b and the fast one of v_b; the two differ only in how matrices are loaded from shared memory.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "latent-decompressed.cuh"

namespace latent_cuda {

namespace {

constexpr int STEP        = 32;  // latent values
constexpr int N_STEPS     = N_LATENT / STEP;
constexpr int N_OUT       = N_NOPE;                // also N_VALUE
constexpr int STRIDE      = STEP + 8;              // of the rows of a step; avoids bank conflicts between eight rows
constexpr int WIDE_STRIDE = N_OUT + 8;             // of the rows of outputs
constexpr int PLANE       = EXPAND_KEYS * STRIDE;  // of either factor; that of k_b is smaller
constexpr int WARP_OUT    = N_OUT / (BLOCK_WARPS / (EXPAND_KEYS / TILE));
constexpr int OUT_COLUMNS = WARP_OUT / 8;
constexpr int CHUNK       = 8;                                           // halves per asynchronous copy
constexpr int SHARE       = EXPAND_KEYS * STEP / CHUNK / BLOCK_THREADS;  // chunks of a plane per thread

static_assert(N_OUT == EXPAND_KEYS && STEP * WIDE_STRIDE <= PLANE, "both factors take the same copies and room");

template <typename MODE> constexpr int expand_bytes() {
    return 2 * (MODE::CACHE + MODE::WEIGHT) * PLANE * sizeof(__half);
}

template <typename MODE, bool VALUES>
__global__ void __launch_bounds__(BLOCK_THREADS, 2) expand_keys(const weights w, const run r) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    extern __shared__ __align__(16) char shared[];
    wait_for_previous();

    constexpr int CACHE  = MODE::CACHE;
    constexpr int WEIGHT = MODE::WEIGHT;
    constexpr int TERMS  = VALUES ? MODE::VALUE : MODE::KEY;
    constexpr int RING   = (CACHE + WEIGHT) * PLANE;

    const int lane   = threadIdx.x % WARP;
    const int warp   = threadIdx.x / WARP;
    const int head   = blockIdx.y;
    const int stream = blockIdx.z;
    const int tile0  = blockIdx.x * (EXPAND_KEYS / TILE);

    const uint32_t * seen    = r.seen + static_cast<int64_t>(stream) * r.room_tiles() + tile0;
    const auto       is_seen = [&](int i) { return tile0 + i < r.n_tiles() && seen[i] != 0; };
    if (!is_seen(0) && !is_seen(1) && !is_seen(2) && !is_seen(3)) {
        return;  // the whole block returns
    }

    __half *       ring = reinterpret_cast<__half *>(shared);
    const __half * latents =
        r.latents + (static_cast<int64_t>(stream) * CACHE * r.n_room + blockIdx.x * EXPAND_KEYS) * N_LATENT;
    const __half * factors = w.values + ((VALUES ? static_cast<int64_t>(gridDim.y) : 0) + head) * WEIGHT * N_WEIGHTS;

    const auto fetch = [&](int step) {
        __half * to = ring + step % 2 * RING;
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const int chunk = i * BLOCK_THREADS + threadIdx.x;
            const int row   = chunk / (STEP / CHUNK);
            const int at    = chunk % (STEP / CHUNK) * CHUNK;
#pragma unroll
            for (int p = 0; p < CACHE; ++p) {
                copy_16_async(to + p * PLANE + row * STRIDE + at,
                              latents + (static_cast<int64_t>(p) * r.n_room + row) * N_LATENT + step * STEP + at, 16);
            }
#pragma unroll
            for (int p = 0; p < WEIGHT; ++p) {
                __half * plane = to + (CACHE + p) * PLANE;
                if constexpr (VALUES) {
                    copy_16_async(plane + row * STRIDE + at,
                                  factors + p * N_WEIGHTS + row * N_LATENT + step * STEP + at, 16);
                } else {
                    const int wide = chunk / (N_OUT / CHUNK);
                    const int out  = chunk % (N_OUT / CHUNK) * CHUNK;
                    copy_16_async(plane + wide * WIDE_STRIDE + out,
                                  factors + p * N_WEIGHTS + (step * STEP + wide) * N_OUT + out, 16);
                }
            }
        }
    };

    const int  my_tile = warp % (EXPAND_KEYS / TILE);
    const int  key0    = my_tile * TILE;
    const int  out0    = warp / (EXPAND_KEYS / TILE) * WARP_OUT;
    const bool needed  = is_seen(my_tile);

    float sums[2][OUT_COLUMNS][4] = {};
    fetch(0);
    for (int step = 0; step < N_STEPS; ++step) {
        wait_copies();
        __syncthreads();
        if (step + 1 < N_STEPS) {
            fetch(step + 1);
        }
        if (!needed) {
            continue;
        }
        const __half * from = ring + step % 2 * RING;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            uint32_t a[CACHE][2][4];
#pragma unroll
            for (int p = 0; p < CACHE; ++p) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    load_matrices(a[p][i], from + p * PLANE + (key0 + 16 * i + lane % 16) * STRIDE + k + lane / 16 * 8);
                }
            }
#pragma unroll
            for (int pair = 0; pair < OUT_COLUMNS / 2; ++pair) {
#pragma unroll
                for (int p = WEIGHT - 1; p >= 0; --p) {
                    const __half * plane = from + (CACHE + p) * PLANE;
                    const int      out   = out0 + 16 * pair + lane / 16 * 8;
                    uint32_t       b[4];
                    if constexpr (VALUES) {
                        load_matrices(b, plane + (out + lane % 8) * STRIDE + k + lane / 8 % 2 * 8);
                    } else {
                        load_matrices_transposed(b, plane + (k + lane % 16) * WIDE_STRIDE + out);
                    }
#pragma unroll
                    for (int term = CACHE - 1; term >= 0; --term) {
                        if (term + p < 2) {
#pragma unroll
                            for (int i = 0; i < 2; ++i) {
                                mma<__half>(sums[i][2 * pair], a[term][i], { b[0], b[1] });
                                mma<__half>(sums[i][2 * pair + 1], a[term][i], { b[2], b[3] });
                            }
                        }
                    }
                }
            }
        }
    }
    if (!needed) {
        return;
    }

    const float * row_factors = r.factors + static_cast<int64_t>(stream) * r.n_room + blockIdx.x * EXPAND_KEYS + key0;
    __half *      to =
        (VALUES ? r.values : r.keys) +
        ((static_cast<int64_t>(stream) * gridDim.y + head) * TERMS * r.n_room + blockIdx.x * EXPAND_KEYS + key0) *
            N_OUT +
        out0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int   row    = 8 * i + lane / 4;
        const float factor = row_factors[row];
#pragma unroll
        for (int column = 0; column < OUT_COLUMNS; ++column) {
            const float * x    = sums[i / 2][column] + i % 2 * 2;
            const auto    pair = split<__half, TERMS>(x[0] * factor, x[1] * factor);
#pragma unroll
            for (int term = 0; term < TERMS; ++term) {
                *reinterpret_cast<uint32_t *>(to + (static_cast<int64_t>(term) * r.n_room + row) * N_OUT + 8 * column +
                                              2 * (lane % 4)) = pair.term[term];
            }
        }
    }
#else
    __trap();  // the caller rejects older devices
#endif
}

template <typename MODE, bool VALUES> void launch(const weights & w, int n_heads, const run & r, cudaStream_t stream) {
    constexpr int BYTES = expand_bytes<MODE>();
    static_assert(BYTES <= MAX_SHARED_BYTES);
    // has to be set once per device of the process; setting it again is cheap
    cudaFuncSetAttribute(expand_keys<MODE, VALUES>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    const dim3 grid((r.end - r.begin + EXPAND_KEYS - 1) / EXPAND_KEYS, n_heads, r.n_streams);
    launch_early<expand_keys<MODE, VALUES>>(grid, BLOCK_THREADS, BYTES, stream, w, r);
}

}  // namespace

template <typename MODE> void expand(const weights & w, int n_heads, const run & r, cudaStream_t stream) {
    launch<MODE, false>(w, n_heads, r, stream);
    launch<MODE, true>(w, n_heads, r, stream);
}

template void expand<modes::f32>(const weights &, int, const run &, cudaStream_t);
template void expand<modes::f16>(const weights &, int, const run &, cudaStream_t);
template void expand<modes::halves>(const weights &, int, const run &, cudaStream_t);

}  // namespace latent_cuda

#endif
