// Latent attention on CUDA, decompressed: converts the sources to halves and finds the visible keys.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "latent-decompressed.cuh"

namespace latent_cuda {

constexpr int WARP_KEYS      = TILE / BLOCK_WARPS;
constexpr int LANE_VALUES    = N_CACHE / WARP;
constexpr int LANE_LATENTS   = N_LATENT / WARP;
constexpr int WEIGHT_THREADS = 512;

// Each warp checks some of the queries, each lane one key.
static __global__ void __launch_bounds__(BLOCK_THREADS)
    look_at(const uint16_t * mask, int64_t mask_stream, int64_t mask_query, int n_keys, int n_queries, sight * to) {
    constexpr int      QUERIES        = BLOCK_QUERIES / BLOCK_WARPS;
    constexpr uint16_t MINUS_INFINITY = 0xfc00;

    __shared__ sight of_warps[BLOCK_WARPS];

    wait_for_previous();
    let_next_begin();
    const int lane  = threadIdx.x % WARP;
    const int warp  = threadIdx.x / WARP;
    const int tile  = blockIdx.x;
    const int block = blockIdx.y;
    const int key   = tile * TILE + lane;

    bool sees  = false;
    bool plain = key < n_keys;
#pragma unroll
    for (int i = 0; i < QUERIES; ++i) {
        const int query = block * BLOCK_QUERIES + warp * QUERIES + i;
        if (query < n_queries && key < n_keys) {
            const uint16_t added = mask == nullptr ? 0 : mask[blockIdx.z * mask_stream + query * mask_query + key];
            sees                 = sees || added != MINUS_INFINITY;
            plain                = plain && (added & 0x7fff) == 0;
        }
    }
    const sight mine = { __ballot_sync(ALL_LANES, sees), __all_sync(ALL_LANES, plain) ? 1u : 0u };
    if (lane == 0) {
        of_warps[warp] = mine;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        sight all = { 0, 1 };
        for (const sight & each : of_warps) {
            all.visible |= each.visible;
            all.plain &= each.plain;
        }
        to[(static_cast<int64_t>(blockIdx.z) * gridDim.y + block) * gridDim.x + tile] = all;
    }
}

void look(const decompressed & args, const prefill & p, sight * to, cudaStream_t stream) {
    launch_early<look_at>(dim3(p.n_tiles, p.n_blocks, args.mask_streams), BLOCK_THREADS, 0, stream, args.mask,
                          args.mask_stream, args.mask_query, args.n_keys, args.n_queries, to);
}

// One head of k_b or v_b.
template <int TERMS>
static __global__ void __launch_bounds__(WEIGHT_THREADS)
    weigh_head(const float * k_b, const float * v_b, const weights to) {
    __shared__ float of_warps[WEIGHT_THREADS / WARP];

    wait_for_previous();
    let_next_begin();
    const int64_t which = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    const float * from  = (blockIdx.y == 0 ? k_b : v_b) + static_cast<int64_t>(blockIdx.x) * N_WEIGHTS;

    float largest = 0.0f;
#pragma unroll 8
    for (int i = threadIdx.x; i < N_WEIGHTS; i += WEIGHT_THREADS) {
        largest = fmaxf(largest, fabsf(from[i]));
    }
    largest = max_lanes(largest);
    if (threadIdx.x % WARP == 0) {
        of_warps[threadIdx.x / WARP] = largest;
    }
    __syncthreads();
    for (const float each : of_warps) {
        largest = fmaxf(largest, each);
    }
    const int   exponent = scaling_exponent(largest);
    const float inverse  = power_of_two(254 - exponent);
    if (threadIdx.x == 0) {
        to.units[which] = power_of_two(exponent);
    }
#pragma unroll 4
    for (int i = 2 * threadIdx.x; i < N_WEIGHTS; i += 2 * WEIGHT_THREADS) {
        const terms<TERMS> pair = split<__half, TERMS>(from[i] * inverse, from[i + 1] * inverse);
#pragma unroll
        for (int term = 0; term < TERMS; ++term) {
            *reinterpret_cast<uint32_t *>(to.values + (which * TERMS + term) * N_WEIGHTS + i) = pair.term[term];
        }
    }
}

void weigh(const decompressed & args, int n_terms, const weights & to, cudaStream_t stream) {
    const dim3 grid(args.n_heads, 2);
    if (n_terms == 1) {
        launch_early<weigh_head<1>>(grid, WEIGHT_THREADS, 0, stream, args.k_b, args.v_b, to);
    } else {
        launch_early<weigh_head<2>>(grid, WEIGHT_THREADS, 0, stream, args.k_b, args.v_b, to);
    }
}

// Value WARP * i + lane of a row.
template <cache_type TYPE> static __device__ __forceinline__ float read_value(const char * row, int i, int lane) {
    const int at = WARP * i + lane;
    if constexpr (TYPE == cache_type::f32) {
        return reinterpret_cast<const float *>(row)[at];
    } else if constexpr (TYPE == cache_type::f16) {
        return __half2float(reinterpret_cast<const __half *>(row)[at]);
    } else if constexpr (TYPE == cache_type::bf16) {
        return __uint_as_float(static_cast<uint32_t>(reinterpret_cast<const uint16_t *>(row)[at]) << 16);
    } else {  // blocks of 32 quants after a half that is their scale
        constexpr bool    BYTES  = TYPE == cache_type::q8_0;
        const char *      block  = row + i * (BYTES ? 34 : 18);
        const float       factor = __half2float(*reinterpret_cast<const __half *>(block));
        const signed char code   = block[2 + (BYTES ? lane : lane % 16)];
        return factor * (BYTES ? code : (code >> (lane < 16 ? 0 : 4) & 15) - 8);
    }
}

// Stores x as a sum of halves, in planes of `plane` values.
template <int TERMS> static __device__ __forceinline__ void store_terms(float x, __half * to, int64_t plane) {
    const __half high = __float2half_rn(x);
    to[0]             = high;
    if constexpr (TERMS == 2) {
        to[plane] = __float2half_rn(x - __half2float(high));
    }
}

// Magnitude for scaling: 0 for values that are not finite.
static __device__ __forceinline__ float magnitude(float x) {
    return exponent_of(x) == 255 ? 0.0f : fabsf(x);
}

// A tile of one stream; each warp converts WARP_KEYS of its keys.
template <cache_type TYPE, int TERMS>
static __global__ void __launch_bounds__(BLOCK_THREADS)
    collect_tile(const decompressed args, const prefill p, const run to) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    __shared__ float of_warps[BLOCK_WARPS];

    wait_for_previous();
    const int     lane   = threadIdx.x % WARP;
    const int     warp   = threadIdx.x / WARP;
    const int     tile   = blockIdx.x;
    const int     stream = to.stream0 + blockIdx.y;
    const int64_t mine   = static_cast<int64_t>(blockIdx.y) * to.room_tiles() + tile;

    uint32_t seen = 0;
    for (int block = lane; block < p.n_blocks; block += WARP) {
        seen |= p.sights_of(stream % args.mask_streams, block)[to.begin / TILE + tile].visible;
    }
    seen = __reduce_or_sync(ALL_LANES, seen);
    if (threadIdx.x == 0) {
        to.seen[mine] = seen;
    }
    if (seen == 0) {
        return;  // the whole block returns
    }

    float x[WARP_KEYS][LANE_VALUES];
    float of_row[WARP_KEYS];  // the largest latent value of each row
    float largest = 0.0f;
#pragma unroll
    for (int k = 0; k < WARP_KEYS; ++k) {
        const int    key = warp * WARP_KEYS + k;
        const char * row = static_cast<const char *>(args.cache) + stream * args.cache_stream +
                           (to.begin + tile * TILE + key) * args.cache_row;
        of_row[k]        = 0.0f;
#pragma unroll
        for (int i = 0; i < LANE_VALUES; ++i) {
            x[k][i] = seen >> key & 1 ? read_value<TYPE>(row, i, lane) : 0.0f;
            largest = fmaxf(largest, magnitude(x[k][i]));
            if (i < LANE_LATENTS) {
                of_row[k] = fmaxf(of_row[k], magnitude(x[k][i]));
            }
        }
        of_row[k] = max_lanes(of_row[k]);
    }
    largest = max_lanes(largest);
    if (lane == 0) {
        of_warps[warp] = largest;
    }
    __syncthreads();
    for (const float each : of_warps) {
        largest = fmaxf(largest, each);
    }
    const int   shift   = scaling_exponent(largest);
    const float in_unit = power_of_two(127 + UNIT_SHIFT - shift);
    if (threadIdx.x == 0) {
        to.shifts[mine] = shift;
    }

#pragma unroll
    for (int k = 0; k < WARP_KEYS; ++k) {
        const int64_t at = static_cast<int64_t>(tile) * TILE + warp * WARP_KEYS + k;
        // halves are not scaled
        const int exponent = TYPE == cache_type::f16 ? 127 : scaling_exponent(of_row[k]);
        if (lane == 0) {
            to.factors[static_cast<int64_t>(blockIdx.y) * to.n_room + at] = power_of_two(exponent) * in_unit;
        }
        const float   inverse = power_of_two(254 - exponent);
        const int64_t from    = static_cast<int64_t>(blockIdx.y) * TERMS * to.n_room + at;
#pragma unroll
        for (int i = 0; i < LANE_VALUES; ++i) {
            const int value = WARP * i + lane;
            if (i < LANE_LATENTS) {
                store_terms<TERMS>(x[k][i] * inverse, to.latents + from * N_LATENT + value,
                                   static_cast<int64_t>(to.n_room) * N_LATENT);
            } else {
                store_terms<TERMS>(x[k][i] * in_unit, to.ropes + from * N_ROPE + value - N_LATENT,
                                   static_cast<int64_t>(to.n_room) * N_ROPE);
            }
        }
    }
#else
    __trap();  // the caller rejects older devices
#endif
}

void collect(const decompressed & args, const prefill & p, const run & to, cudaStream_t stream) {
    const dim3 grid(to.n_tiles(), to.n_streams);
    with_cache_type(args.type, [&](auto type) {
        constexpr int TERMS = type == cache_type::f32 ? 2 : 1;
        launch_early<collect_tile<type, TERMS>>(grid, BLOCK_THREADS, 0, stream, args, p, to);
    });
}

}  // namespace latent_cuda

#endif
