// Upstream's attention in runs of keys: the launches of its kernel, and the kernel that adds its partial results.
//
// Upstream's blocks divide the work of a launch evenly: all steps of keys of the first output tile, then of the second
// (stream-k). The block that ends a tile writes to the result, every other block to memory of its own, with maximum and
// sum of the weights. Here there are more blocks than tiles, so no block computes a whole tile. For a whole tile, upstream's
// kernel would store the quotient without maximum and sum, which could not be added to the results of other runs.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "latent-runs.cuh"

#include "convert.cuh"
#include "kimi-launch.cuh"
#include "latent-cuda.cuh"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace latent_cuda {

constexpr int    TILE_ROWS   = 64;  // rows (queries x heads) of an output tile of upstream's kernel
constexpr int    GROUP_UNIT  = 16;  // queries: whole tiles
constexpr int    ADD_THREADS = N_LATENT / 4;
constexpr int    KEYS_UNIT   = FATTN_KQ_STRIDE;  // runs have multiples of so many keys, as upstream's kernel requires
constexpr size_t ALIGNED     = 128;

// The output tiles of a launch and how its blocks divide them.
struct division {
    int tile_queries, tile_heads;
    int n_heads;
    int tiles_of_queries;  // for each tile_heads heads
    int n_tiles;
    int n_blocks;
    int n_steps;  // of keys, for each tile

    // The block that computes this step of all steps of all tiles.
    __device__ int block_of(int64_t step) const {
        return ((step + 1) * n_blocks - 1) / (static_cast<int64_t>(n_tiles) * n_steps);
    }
};

// Without blocks and steps.
static division tiles_of(int n_queries, int n_heads, int tile_queries, int tile_heads) {
    division parts         = {};
    parts.tile_queries     = tile_queries;
    parts.tile_heads       = tile_heads;
    parts.n_heads          = n_heads;
    parts.tiles_of_queries = divide_up(n_queries, tile_queries);
    parts.n_tiles          = parts.tiles_of_queries * divide_up(n_heads, tile_heads);
    return parts;
}

// The number of queries of each group. All groups of a node have about the same size.
static int group_of(const ggml_tensor * dst, const run_limits & limits) {
    const int n_queries = dst->ne[2];
    const int most      = std::max<int>(limits.rows / dst->ne[1] / GROUP_UNIT, 1) * GROUP_UNIT;
    return divide_up(divide_up(n_queries, divide_up(n_queries, most)), GROUP_UNIT) * GROUP_UNIT;
}

// What the blocks of a launch leave: weighted values, and for each the maximum of the scores and the sum of the weights.
struct left_by_upstream {
    const float *  ended;        // [queries][heads][N_LATENT]: of the blocks that end a tile
    const float2 * ended_sums;   // [blocks][TILE_ROWS]
    const float2 * others_sums;  // [blocks][TILE_ROWS]: of the other blocks
    const float *  others;       // [blocks][TILE_ROWS][N_LATENT]
};

// For a run (blockIdx.y) of a stream (blockIdx.z) and a tile of queries, the end of the last KEYS_UNIT keys that one of its
// queries sees; 0: they see none. Upstream's kernel stops there, or after one step where a block begins later.
static __global__ void __launch_bounds__(KEYS_UNIT) find_ends(const uint16_t * mask,
                                                              int64_t          mask_query,
                                                              int64_t          mask_stream,
                                                              int              mask_streams,
                                                              int              n_queries,
                                                              int              tile_queries,
                                                              int              n_keys,
                                                              int              run_keys,
                                                              int *            ends) {
    constexpr uint16_t HIDDEN = 0xFC00;  // -inf
    kimi_cuda::wait_for_previous();
    kimi_cuda::let_next_begin();
    const int first_query = blockIdx.x * tile_queries;
    const int n_rows      = min(tile_queries, n_queries - first_query);
    const int first_key   = blockIdx.y * run_keys;
    mask += blockIdx.z % mask_streams * mask_stream + first_query * mask_query + first_key;
    int end = min(run_keys, n_keys - first_key);
    for (; end > 0; end -= KEYS_UNIT) {
        int seen = 0;
        for (int row = 0; row < n_rows; ++row) {
            seen |= mask[row * mask_query + end - KEYS_UNIT + threadIdx.x] != HIDDEN;
        }
        if (__syncthreads_or(seen)) {
            break;
        }
    }
    if (threadIdx.x == 0) {
        ends[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = end;
    }
}

static __device__ __forceinline__ float factor(float maximum, float largest) {
    return maximum == -INFINITY ? 0.0f : expf(maximum - largest);
}

// Adds one row of a run to the result of the previous ones. `so_far`: their maximum and sum.
static __global__ void __launch_bounds__(ADD_THREADS) add_run(
    const division parts, const left_by_upstream run, bool is_first, bool is_last, float2 * so_far, float * out) {
    kimi_cuda::wait_for_previous();
    kimi_cuda::let_next_begin();
    const int     query  = blockIdx.x / parts.n_heads;
    const int     head   = blockIdx.x % parts.n_heads;
    const int     column = query % parts.tile_queries * parts.tile_heads + head % parts.tile_heads;
    const int64_t tile   = head / parts.tile_heads * parts.tiles_of_queries + query / parts.tile_queries;
    const int     first  = parts.block_of(tile * parts.n_steps);
    const int     last   = parts.block_of((tile + 1) * parts.n_steps - 1);
    const int64_t row    = blockIdx.x;
    float4 *      to     = reinterpret_cast<float4 *>(out + row * N_LATENT) + threadIdx.x;

    float2 total = is_first ? make_float2(-INFINITY, 0.0f) : so_far[row];
    float4 value = is_first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *to;
    for (int block = first; block <= last; ++block) {
        const int64_t at     = static_cast<int64_t>(block) * TILE_ROWS + column;
        const float2  sums   = block == last ? run.ended_sums[at] : run.others_sums[at];
        const float * values = block == last ? run.ended + row * N_LATENT : run.others + at * N_LATENT;
        const float4  x      = reinterpret_cast<const float4 *>(values)[threadIdx.x];

        const float largest = fmaxf(total.x, sums.x);
        const float before  = factor(total.x, largest);
        const float added   = factor(sums.x, largest);
        value               = make_float4(before * value.x + added * x.x, before * value.y + added * x.y,
                                          before * value.z + added * x.z, before * value.w + added * x.w);
        total               = make_float2(largest, before * total.y + added * sums.y);
    }
    if (is_last) {
        const float inverse = total.y == 0.0f ? 0.0f : 1.0f / total.y;
        value               = make_float4(value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse);
    }
    __syncthreads();  // all threads have read so_far
    *to = value;
    if (threadIdx.x == 0) {
        so_far[row] = total;
    }
}

// Whole waves of one block for each multiprocessor; at least 5/4 of the tiles, so that no block computes a whole tile, which
// has eight steps or more.
static int blocks_for(int n_tiles, int n_multiprocessors) {
    return ((n_tiles + n_tiles / 4) / n_multiprocessors + 1) * n_multiprocessors;
}

// Keys of each run but the last: about as many as that has.
static int length_of(const ggml_tensor * dst, const run_limits & limits) {
    const int64_t n_keys = dst->src[1]->ne[1];
    return divide_up<int64_t>(divide_up(n_keys, divide_up(n_keys, limits.keys)), KEYS_UNIT) * KEYS_UNIT;
}

// Where everything is in `work`, in bytes.
struct places {
    size_t ended, sums, so_far, ends, end;  // the copy is at 0

    places(const ggml_tensor * dst, int n_blocks, const run_limits & limits) {
        const size_t n_heads = dst->ne[1];
        ended                = GGML_PAD(limits.keys * N_CACHE * sizeof(half), ALIGNED);
        sums                 = ended + group_of(dst, limits) * n_heads * N_LATENT * sizeof(float);
        so_far               = sums + n_blocks * TILE_ROWS * (2 * sizeof(float2) + N_LATENT * sizeof(float));
        ends                 = so_far + dst->ne[2] * n_heads * sizeof(float2);
        end = ends +
              dst->ne[2] * dst->ne[3] * divide_up<int64_t>(dst->src[1]->ne[1], length_of(dst, limits)) * sizeof(int);
    }
};

// Of the tiles of upstream's kernel for so many heads (fattn.cu).
static int heads_of_tile(int64_t n_heads) {
    return n_heads % 16 == 0 ? 16 : 4;
}

size_t runs_workspace(const ggml_tensor * dst, int n_multiprocessors, const run_limits & limits) {
    const int      heads = heads_of_tile(dst->ne[1]);
    const division tiles = tiles_of(group_of(dst, limits), dst->ne[1], TILE_ROWS / heads, heads);
    return places(dst, blocks_for(tiles.n_tiles, n_multiprocessors), limits).end;
}

namespace {

// A run of keys of one stream, whose F16 copy is at `work`. ends: of each tile of queries.
struct key_run {
    int64_t     stream, first;
    int         n_keys;
    const int * ends;
    char *      work;
};

}  // namespace

// Queries from `first` on over a run of keys.
static void attend_group(ggml_backend_cuda_context & ctx,
                         const ggml_tensor *         dst,
                         const upstream_kernel &     upstream,
                         const key_run &             run,
                         int                         first,
                         int                         n_queries,
                         const run_limits &          limits) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * mask = dst->src[3];
    const auto   tiles       = [&](int n) { return tiles_of(n, q->ne[2], upstream.tile_queries, upstream.tile_heads); };
    const int    nsm         = ggml_cuda_info().devices[ctx.device].nsm;
    const places at(dst, blocks_for(tiles(group_of(dst, limits)).n_tiles, nsm), limits);
    division     parts = tiles(n_queries);
    parts.n_steps      = divide_up(run.n_keys, upstream.step_keys);
    parts.n_blocks     = std::min(blocks_for(parts.n_tiles, nsm), parts.n_tiles * parts.n_steps);
    GGML_ASSERT(divide_up(parts.n_tiles * parts.n_steps, parts.n_blocks) < parts.n_steps);

    float *                ended  = reinterpret_cast<float *>(run.work + at.ended);
    float2 *               sums   = reinterpret_cast<float2 *>(run.work + at.sums);
    const int64_t          n_sums = static_cast<int64_t>(parts.n_blocks) * TILE_ROWS;
    const left_by_upstream left   = { ended, sums, sums + n_sums, reinterpret_cast<float *>(sums + 2 * n_sums) };

    constexpr int ROW     = N_CACHE * sizeof(half);
    const int32_t all     = run.n_keys * ROW;
    const char *  queries = static_cast<const char *>(q->data) + run.stream * q->nb[3] + first * q->nb[1];
    const char *  visible = static_cast<const char *>(mask->data) + run.stream % mask->ne[3] * mask->nb[3] +
                            first * mask->nb[1] + run.first * sizeof(half);
    float         scale   = 1.0f;
    memcpy(&scale, dst->op_params, sizeof(scale));

    // as launch_fattn in fattn-common.cuh
    const ggml_cuda_kernel_launch_params launch(dim3(parts.n_blocks), upstream.block, upstream.shared, ctx.stream());
    ggml_cuda_kernel_launch(upstream.kernel, launch, queries, run.work, run.work, visible, nullptr,
                            run.ends + first / upstream.tile_queries, ended, sums, scale, 0.0f, 1.0f, 1.0f, 1u, 0.0f,
                            q->ne[0], init_fastdiv_values(n_queries), q->ne[2], 1, q->nb[1], q->nb[2], q->nb[3],
                            k->ne[0], run.n_keys, 1, 1, ROW, all, all, ROW, all, all, mask->ne[1], 1, 1, mask->nb[1],
                            mask->nb[2], mask->nb[3]);
    const int64_t row    = (run.stream * dst->ne[2] + first) * dst->ne[1];
    float2 *      so_far = reinterpret_cast<float2 *>(run.work + at.so_far) + first * dst->ne[1];
    kimi_cuda::launch_early<add_run>(dim3(n_queries * dst->ne[1]), ADD_THREADS, 0, ctx.stream(), parts, left,
                                     run.first == 0, run.first + run.n_keys == k->ne[1], so_far,
                                     static_cast<float *>(dst->data) + row * N_LATENT);
}

void attend_in_runs(ggml_backend_cuda_context & ctx,
                    ggml_tensor *               dst,
                    const upstream_kernel &     upstream,
                    char *                      work,
                    const run_limits &          limits) {
    const ggml_tensor * k         = dst->src[1];
    const ggml_tensor * mask      = dst->src[3];
    const int           n_keys    = k->ne[1];
    const int           n_queries = dst->ne[2];
    const int           length    = length_of(dst, limits);
    const int           group     = group_of(dst, limits);
    GGML_ASSERT(upstream.tile_heads == heads_of_tile(dst->ne[1]));
    GGML_ASSERT(upstream.tile_queries * upstream.tile_heads == TILE_ROWS);
    GGML_ASSERT(n_keys % KEYS_UNIT == 0 && limits.keys % KEYS_UNIT == 0);

    const division tiles = tiles_of(group, dst->ne[1], upstream.tile_queries, upstream.tile_heads);
    const places   at(dst, blocks_for(tiles.n_tiles, ggml_cuda_info().devices[ctx.device].nsm), limits);
    int *          ends = reinterpret_cast<int *>(work + at.ends);
    const dim3     of_ends(divide_up(n_queries, upstream.tile_queries), divide_up(n_keys, length), dst->ne[3]);
    kimi_cuda::launch_early<find_ends>(
        of_ends, KEYS_UNIT, 0, ctx.stream(), static_cast<const uint16_t *>(mask->data),
        static_cast<int64_t>(mask->nb[1] / sizeof(uint16_t)), static_cast<int64_t>(mask->nb[3] / sizeof(uint16_t)),
        static_cast<int>(mask->ne[3]), n_queries, upstream.tile_queries, n_keys, length, ends);
    for (int64_t stream = 0; stream < dst->ne[3]; ++stream) {
        for (int first = 0; first < n_keys; first += length) {
            const key_run run  = { stream, first, std::min(length, n_keys - first), ends, work };
            const char *  rows = static_cast<const char *>(k->data) + stream * k->nb[3] + first * k->nb[1];
            ggml_get_to_fp16_cuda(k->type)(rows, reinterpret_cast<half *>(work),
                                           static_cast<int64_t>(run.n_keys) * N_CACHE, ctx.stream());
            for (int query = 0; query < n_queries; query += group) {
                attend_group(ctx, dst, upstream, run, query, std::min(group, n_queries - query), limits);
            }
            ends += of_ends.x;
        }
    }
    CUDA_CHECK(cudaGetLastError());
}

}  // namespace latent_cuda

#endif
