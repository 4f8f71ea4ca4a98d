// Latent attention on CUDA, absorbed: partitioning, kernels and launches.
//
// The grid is blocks of rows x streams x splits of the keys. A second kernel combines the splits in order. The rounding
// of the result depends on the number of splits, and so on the shapes and on the device's number of multiprocessors.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kimi-launch.cuh"
#include "latent-attend.cuh"

namespace latent_cuda {

// A split of fewer tiles costs more for its rows of q and its partial result than it saves: with 32 rows and an F16 cache
// each is as large as two tiles.
constexpr int MIN_TILES     = 2;
constexpr int PIECE_TILES   = 2 * MIN_TILES;  // the work for both, in tiles
constexpr int MAX_WAVES     = 6;              // of blocks: with many blocks of rows one may leave multiprocessors idle
constexpr int WORTH_A_WAVE  = 32;             // more waves have to save one part in this many
constexpr int PARTIAL_BYTES = N_LATENT * sizeof(float) + sizeof(float2);  // of a row and a split
constexpr int MAX_PARTIAL   = 96 << 20;                                   // bytes, if there are several waves
constexpr int JOIN_THREADS  = 512;
constexpr int MAX_PIECES    = JOIN_THREADS;                // a thread per split finds its weight
constexpr int JOIN_PARTS    = 4;                           // blocks of a row, so that many multiprocessors read
constexpr int PART_CHUNKS   = N_LATENT / 4 / JOIN_PARTS;   // of four values, one per thread
constexpr int JOIN_GROUPS   = JOIN_THREADS / PART_CHUNKS;  // each sums every 16th split
constexpr int JOIN_WARPS    = JOIN_THREADS / WARP;

static bool is_wide(const attention & args) {
    return is_quantised(args.type) && args.n_queries * args.n_heads > NARROW;
}

// The time of a plan in tiles that a multiprocessor computes one after the other. It runs one block at a time, because
// of the registers.
static int64_t time_of(const plan & p, const attention & args) {
    const int64_t blocks = static_cast<int64_t>(p.n_blocks) * args.n_streams * p.n_pieces;
    return divide_up<int64_t>(blocks, args.n_multiprocessors) * (p.keys_a_piece / TILE_KEYS + PIECE_TILES);
}

static int64_t partial_rows(const plan & p, const attention & args) {
    return p.n_pieces == 1 ? 0 : static_cast<int64_t>(p.n_pieces) * args.n_streams * p.n_rows;
}

plan make_plan(const attention & args) {
    plan p            = {};
    p.n_rows          = args.n_queries * args.n_heads;
    p.block_rows      = is_wide(args) ? WIDE : NARROW;
    p.n_blocks        = divide_up(p.n_rows, p.block_rows);
    const int n_tiles = divide_up(args.n_keys, TILE_KEYS);
    plan      best    = {};
    for (int waves = 1; waves <= MAX_WAVES; ++waves) {
        const int fit    = waves * args.n_multiprocessors / (p.n_blocks * args.n_streams);
        const int target = fit < 1 ? 1 : fit > MAX_PIECES ? MAX_PIECES : fit;
        const int tiles  = divide_up(n_tiles, target);
        p.keys_a_piece   = (tiles < MIN_TILES ? MIN_TILES : tiles) * TILE_KEYS;
        p.n_pieces       = divide_up(args.n_keys, p.keys_a_piece);
        if (waves > 1 && partial_rows(p, args) * PARTIAL_BYTES > MAX_PARTIAL) {
            break;
        }
        if (waves == 1 || time_of(p, args) * WORTH_A_WAVE < time_of(best, args) * (WORTH_A_WAVE - 1)) {
            best = p;
        }
    }
    return best;
}

template <typename FORM>
static __global__ void __launch_bounds__(THREADS, 1)
    attend_pieces(const attention args, const plan plan, const partials partials) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    extern __shared__ __align__(16) char shared[];
    wait_for_previous();
    let_next_begin();
    attend_piece<FORM>(args, plan, partials, shared);
#else
    __trap();  // the caller rejects older devices
#endif
}

static __device__ __forceinline__ void add_weighted(float4 & to, float weight, const float4 & x) {
    to.x += weight * x.x;
    to.y += weight * x.y;
    to.z += weight * x.z;
    to.w += weight * x.w;
}

// Combines the partial results of a quarter of one row. Splits that saw no key have weight 0.
static __global__ void __launch_bounds__(JOIN_THREADS) join_pieces(const partials partials, int n_pieces, float * out) {
    __shared__ float  weights[MAX_PIECES];
    __shared__ float  of_warps[2][JOIN_WARPS];
    __shared__ float4 of_groups[JOIN_GROUPS][PART_CHUNKS];

    wait_for_previous();
    let_next_begin();
    const int     i        = threadIdx.x;
    const int64_t row      = blockIdx.x;
    const int64_t all_rows = gridDim.x;
    const float2  mine     = i < n_pieces ? partials.max_sum[i * all_rows + row] : make_float2(-INFINITY, 0.0f);

    float maximum = max_lanes(mine.x);
    if (i % WARP == 0) {
        of_warps[0][i / WARP] = maximum;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < JOIN_WARPS; ++w) {
        maximum = fmaxf(maximum, of_warps[0][w]);
    }
    const float weight = mine.x == -INFINITY ? 0.0f : exp2f(mine.x - maximum);
    float       sum    = sum_lanes(weight * mine.y);
    if (i % WARP == 0) {
        of_warps[1][i / WARP] = sum;
    }
    weights[i] = weight;
    __syncthreads();

    const int group = i / PART_CHUNKS;
    const int chunk = i % PART_CHUNKS;
    const int first = blockIdx.y * PART_CHUNKS;
    float4    total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int piece = group; piece < n_pieces; piece += JOIN_GROUPS) {
        const float * of_row = partials.out + (piece * all_rows + row) * N_LATENT;
        add_weighted(total, weights[piece], reinterpret_cast<const float4 *>(of_row)[first + chunk]);
    }
    of_groups[group][chunk] = total;
    __syncthreads();
    if (group > 0) {
        return;
    }
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < JOIN_WARPS; ++w) {
        sum += of_warps[1][w];
    }
#pragma unroll
    for (int other = 1; other < JOIN_GROUPS; ++other) {
        add_weighted(total, 1.0f, of_groups[other][chunk]);
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    reinterpret_cast<float4 *>(out + row * N_LATENT)[first + chunk] =
        make_float4(total.x * inverse, total.y * inverse, total.z * inverse, total.w * inverse);
}

const char * refused(const attention & args) {
    const auto aligned = [](const void * data, int64_t stride, int64_t stream, int bytes) {
        return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride % bytes == 0 && stream % bytes == 0;
    };
    if (args.q_stream % 2 != 0 || args.q_query % 2 != 0 || !aligned(args.q, args.q_head * 4, 0, 8)) {
        return "rows of q that do not begin at multiples of 8 bytes";
    }
    if (is_quantised(args.type)) {
        const int row = args.type == cache_type::q8_0 ? quantised_tiles<cache_type::q8_0>::ROW_BYTES
                                                      : quantised_tiles<cache_type::q4_0>::ROW_BYTES;
        if (args.cache_row != row) {
            return "rows of a quantised cache that lie apart";
        }
        return aligned(args.cache, row, args.cache_stream, 4)
                   ? nullptr
                   : "rows of the cache that do not begin at multiples of 4 bytes";
    }
    return aligned(args.cache, args.cache_row, args.cache_stream, 16)
               ? nullptr
               : "rows of the cache that do not begin at multiples of 16 bytes";
}

size_t workspace(const attention & args) {
    return partial_rows(make_plan(args), args) * PARTIAL_BYTES;
}

template <typename FORM>
static void launch(const attention & args, const plan & p, const partials & partials, cudaStream_t stream) {
    constexpr int BYTES = shared_bytes<FORM>();
    static_assert(BYTES <= MAX_SHARED_BYTES);
    // has to be set once per device of the process; setting it again is cheap
    cudaFuncSetAttribute(attend_pieces<FORM>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    const dim3 grid(p.n_pieces, p.n_blocks, args.n_streams);
    launch_early<attend_pieces<FORM>>(grid, THREADS, BYTES, stream, args, p, partials);
}

void attend(const attention & args, void * work, cudaStream_t stream) {
    const plan     p     = make_plan(args);
    const int64_t  rows  = partial_rows(p, args);
    const partials parts = { static_cast<float *>(work),
                             reinterpret_cast<float2 *>(static_cast<float *>(work) + rows * N_LATENT) };
    with_cache_type(args.type, [&](auto type) {
        if constexpr (is_quantised(type)) {
            if (p.block_rows == WIDE) {
                return args.half_sums ? launch<form<type, WIDE, true>>(args, p, parts, stream)
                                      : launch<form<type, WIDE, false>>(args, p, parts, stream);
            }
        }
        launch<form<type, NARROW>>(args, p, parts, stream);
    });
    if (p.n_pieces > 1) {
        launch_early<join_pieces>(dim3(args.n_streams * p.n_rows, JOIN_PARTS), JOIN_THREADS, 0, stream, parts,
                                  p.n_pieces, args.out);
    }
}

}  // namespace latent_cuda

#endif
