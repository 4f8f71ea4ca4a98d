#pragma once

// Attention of one block of rows over one split of the keys.
//
// All heads of all queries see the same cache, so the rows of the matmuls are (query, head) pairs, head fastest, as in
// the result. A thread block processes BLOCK_ROWS of them and loops over tiles of keys. Each tile is loaded into shared
// memory once and serves as keys and values of all rows. A tile has three steps, each followed by a barrier:
//   scores   warp (m, slice): 16 rows, a quarter of the N_CACHE values of a row, all keys of the tile; q is in
//   registers
//   softmax  eight lanes per row: sum of the slices, online maximum, weights
//   values   warp w: all rows, values [64 w, 64 w + 64) of the result, which stays in registers
// Sums are float32. A factor that 16 bits cannot hold accurately enough is the sum of two terms (`precision`). Weights
// of quantized values are multiplied with the scales of the quants, then rounded.

#include "latent-cache.cuh"

namespace latent_cuda {

constexpr int BLOCK_ROWS    = 32;
constexpr int N_WARPS       = THREADS / WARP;
constexpr int ROW_TILES     = BLOCK_ROWS / 16;
constexpr int SLICES        = N_WARPS / ROW_TILES;
constexpr int KEY_STEPS     = TILE_KEYS / 16;
constexpr int SCORE_COLUMNS = TILE_KEYS / 8;
constexpr int WARP_VALUES   = N_LATENT / N_WARPS;
constexpr int VALUE_COLUMNS = WARP_VALUES / 8;
constexpr int SCORE_STRIDE  = TILE_KEYS + 8;  // floats; avoids bank conflicts between pairs of eight rows
constexpr int LANES_A_ROW   = WARP * N_WARPS / BLOCK_ROWS;

static_assert(TILE_KEYS == WARP && LANES_A_ROW * 4 == TILE_KEYS, "a lane a key, and four keys a lane of the softmax");

// Properties of a cache type, other than its tiles.
template <cache_type TYPE> struct precision {
    static constexpr bool QUANTISED = TYPE == cache_type::q8_0 || TYPE == cache_type::q4_0;
    static constexpr bool HALF      = TYPE == cache_type::f16 || QUANTISED;
    // Terms per value of q and per weight.
    static constexpr int Q_TERMS = QUANTISED ? 1 : 2;
    static constexpr int P_TERMS = HALF ? 1 : 2;
    // The largest weight is 2^this, so that a weight times a small scale is not yet a subnormal half.
    static constexpr int WEIGHT_EXPONENT = QUANTISED ? 14 : 0;
    // Steps of 16 values per slice. The 18 blocks of a quantized row are not split: a slice has 4 or 5 of them.
    static constexpr int MIN_STEPS = QUANTISED ? N_FACTORS / SLICES * 2 : N_CACHE / SLICES / 16;
    static constexpr int MAX_STEPS = QUANTISED ? MIN_STEPS + 2 : MIN_STEPS;

    static __device__ int first_step(int slice) {
        return QUANTISED ? slice * N_FACTORS / SLICES * 2 : slice * MAX_STEPS;
    }
};

// Partial results: one per split of the keys and row.
struct partials {
    float *  out;      // [splits][rows of all streams][N_LATENT]
    float2 * max_sum;  // [splits][rows of all streams]
};

struct plan {
    int n_rows;        // per stream
    int n_blocks;      // blocks of rows
    int n_pieces;      // splits of the keys
    int keys_a_piece;  // a multiple of TILE_KEYS
};

plan make_plan(const attention & args);

// Shared memory in addition to the tiles, in floats.
struct room {
    static constexpr int SCORES  = SLICES * BLOCK_ROWS * SCORE_STRIDE;
    static constexpr int WEIGHTS = BLOCK_ROWS * SCORE_STRIDE;
    static constexpr int ROWS    = BLOCK_ROWS;  // size of rescale and of row_scale
    static constexpr int BYTES   = (SCORES + WEIGHTS + 2 * ROWS) * sizeof(float);
};

template <cache_type TYPE> constexpr int shared_bytes() {
    return cache_tiles<TYPE>::SHARED + room::BYTES;
}

// Visibility of the keys of a split for the rows of a block.
struct sight {
    const uint16_t * mask;  // of the block's first query; nullptr: all keys are visible
    int64_t          mask_query;
    int              n_queries;
    int              end;  // end of the split

    // Whether any query of the block sees the key.
    __device__ bool sees(int key) const {
        constexpr uint16_t MINUS_INFINITY = 0xfc00;
        bool               any            = mask == nullptr && key < end;
        for (int i = 0; i < n_queries && mask != nullptr && key < end; ++i) {
            any = any || mask[i * mask_query + key] != MINUS_INFINITY;
        }
        return any;
    }

    // The next tile at or after `key` with a visible key, the same in all warps. `first`: sees() for this lane's key of
    // the first tile.
    __device__ key_tile next(int key, bool first) const {
        for (; key < end; key += TILE_KEYS) {
            const uint32_t visible = __ballot_sync(ALL_LANES, first);
            if (visible != 0) {
                return { key, visible };
            }
            first = sees(key + TILE_KEYS + threadIdx.x % WARP);
        }
        return { end, 0 };
    }
};

// A power of two that scales the row's largest magnitude to about 2^8, where two halves represent it most accurately.
static __device__ __forceinline__ float half_range(const float * row) {
    float largest = 0.0f;
    for (int d = threadIdx.x % WARP; d < N_CACHE; d += WARP) {
        largest = fmaxf(largest, fabsf(row[d]));
    }
    return power_of_two(min(127 + 8 + 127 - exponent_of(max_lanes(largest)), 253));
}

template <cache_type TYPE>
static __device__ __forceinline__ void
attend_piece(const attention & args, const plan & plan, const partials & partials, char * shared) {
    using tiles   = cache_tiles<TYPE>;
    using element = typename tiles::element;
    using fixed   = precision<TYPE>;

    const int lane  = threadIdx.x % WARP;
    const int warp  = threadIdx.x / WARP;
    const int g     = lane / 4;
    const int t     = lane % 4;
    const int piece = blockIdx.x;
    const int block = blockIdx.y;
    const int s     = blockIdx.z;

    float * scores    = reinterpret_cast<float *>(shared + tiles::SHARED);
    float * weights   = scores + room::SCORES;
    float * rescale   = weights + room::WEIGHTS;
    float * row_scale = rescale + room::ROWS;

    const int row0   = block * BLOCK_ROWS;
    const int n_rows = min(BLOCK_ROWS, plan.n_rows - row0);
    const int query0 = row0 / args.n_heads;
    const int query1 = (row0 + n_rows - 1) / args.n_heads + 1;
    const int end    = min(args.n_keys, (piece + 1) * plan.keys_a_piece);

    const auto query_row = [&](int i) {
        const int row = row0 + i;
        return args.q + s * args.q_stream + row / args.n_heads * args.q_query + row % args.n_heads * args.q_head;
    };
    const uint16_t * mask = args.mask == nullptr ? nullptr : args.mask + s % args.mask_streams * args.mask_stream;
    const sight sight = { mask == nullptr ? nullptr : mask + query0 * args.mask_query, args.mask_query, query1 - query0,
                          end };

    tiles cache(shared, { static_cast<const char *>(args.cache) + s * args.cache_stream, args.cache_row, args.n_keys });
    const int first_key = piece * plan.keys_a_piece;
    key_tile  tile      = sight.next(first_key, sight.sees(first_key + lane));
    key_tile  next      = sight.next(tile.key + TILE_KEYS, sight.sees(tile.key + TILE_KEYS + lane));
    cache.fetch(tile);

    // The scale of each row's scores, for exp2.
#pragma unroll
    for (int i = warp * BLOCK_ROWS / N_WARPS; i < (warp + 1) * BLOCK_ROWS / N_WARPS; ++i) {
        const float range = fixed::HALF && i < n_rows ? half_range(query_row(i)) : 1.0f;
        if (lane == 0) {
            row_scale[i] = args.scale * LOG2_E * power_of_two(254 - exponent_of(range));
            rescale[i]   = range;
        }
    }
    __syncthreads();

    // q of this warp's rows and slice.
    const int           m          = warp % ROW_TILES;
    const int           slice      = warp / ROW_TILES;
    const int           step0      = fixed::first_step(slice);
    const int           n_steps    = fixed::first_step(slice + 1) - step0;
    const int           my_rows[2] = { 16 * m + g, 16 * m + g + 8 };
    const float * const my_q[2]    = { query_row(min(my_rows[0], n_rows - 1)), query_row(min(my_rows[1], n_rows - 1)) };
    uint32_t            q[fixed::MAX_STEPS][fixed::Q_TERMS][4];
#pragma unroll
    for (int step = 0; step < fixed::MAX_STEPS; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 x = make_float2(0.0f, 0.0f);
            if (my_rows[i % 2] < n_rows && (step < fixed::MIN_STEPS || step < n_steps)) {
                x = *reinterpret_cast<const float2 *>(my_q[i % 2] + (step0 + step) * 16 + 2 * t + i / 2 * 8);
            }
            const float                 range = rescale[my_rows[i % 2]];
            const terms<fixed::Q_TERMS> pair  = split<element, fixed::Q_TERMS>(x.x * range, x.y * range);
#pragma unroll
            for (int term = 0; term < fixed::Q_TERMS; ++term) {
                q[step][term][i] = pair.term[term];
            }
        }
    }

    // Softmax: this lane's row and keys.
    const int        my_row   = warp * (WARP / LANES_A_ROW) + lane / LANES_A_ROW;
    const int        my_key   = lane % LANES_A_ROW * 4;
    const int        my_query = (row0 + min(my_row, n_rows - 1)) / args.n_heads;
    const uint16_t * my_mask  = mask == nullptr ? nullptr : mask + my_query * args.mask_query;
    float            maximum  = -INFINITY;
    float            sum      = 0.0f;  // of this lane's keys

    float out[ROW_TILES][VALUE_COLUMNS][4] = {};

    while (tile.visible != 0) {
        cache.arrive(tile);
        cache.fetch(next);
        // prefetched
        const bool ahead = sight.sees(next.key + TILE_KEYS + lane);
        uint16_t   added[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            added[i] = my_mask != nullptr && tile.sees(my_key + i) ? my_mask[tile.key + my_key + i] : 0;
        }

        {
            float sums[SCORE_COLUMNS][4] = {};
            float part[SCORE_COLUMNS][4] = {};
#pragma unroll
            for (int step = 0; step < fixed::MAX_STEPS; ++step) {
                if (step < fixed::MIN_STEPS || step < n_steps) {
                    float (&to)[SCORE_COLUMNS][4] = tiles::FACTORS ? part : sums;
#pragma unroll
                    for (int pair = 0; pair < SCORE_COLUMNS / 2; ++pair) {
#pragma unroll
                        for (int p = 0; p < tiles::PLANES; ++p) {
                            uint32_t b[4];
                            load_matrices(b, cache.plane(p) + (16 * pair + lane / 16 * 8 + lane % 8) * TILE_STRIDE +
                                                 (step0 + step) * 16 + lane / 8 % 2 * 8);
#pragma unroll
                            for (int term = fixed::Q_TERMS - 1 - p; term >= 0; --term) {
                                mma<element>(to[2 * pair], q[step][term], { b[0], b[1] });
                                mma<element>(to[2 * pair + 1], q[step][term], { b[2], b[3] });
                            }
                        }
                    }
                    if (tiles::FACTORS && step % 2 == 1) {
#pragma unroll
                        for (int column = 0; column < SCORE_COLUMNS; ++column) {
                            const float2 factor = cache.factors((step0 + step) / 2, 8 * column + 2 * t);
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                sums[column][i] += part[column][i] * (i % 2 == 0 ? factor.x : factor.y);
                                part[column][i] = 0.0f;
                            }
                        }
                    }
                }
            }
#pragma unroll
            for (int column = 0; column < SCORE_COLUMNS; ++column) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int row                      = 16 * m + g + 8 * i;
                    *reinterpret_cast<float2 *>(scores + (slice * BLOCK_ROWS + row) * SCORE_STRIDE + 8 * column +
                                                2 * t) = make_float2(sums[column][2 * i], sums[column][2 * i + 1]);
                }
            }
        }
        __syncthreads();

        {
            float x[4] = {};
#pragma unroll
            for (int i = 0; i < SLICES; ++i) {
                const float4 part =
                    *reinterpret_cast<const float4 *>(scores + (i * BLOCK_ROWS + my_row) * SCORE_STRIDE + my_key);
                x[0] += part.x;
                x[1] += part.y;
                x[2] += part.z;
                x[3] += part.w;
            }
            float largest = maximum;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i]    = x[i] * row_scale[my_row] + LOG2_E * __half2float(__ushort_as_half(added[i]));
                x[i]    = tile.sees(my_key + i) ? x[i] : -INFINITY;
                largest = fmaxf(largest, x[i]);
            }
            largest            = max_lanes<LANES_A_ROW>(largest);
            const float factor = largest == maximum ? 1.0f : exp2f(maximum - largest);
            const float offset = largest == -INFINITY ? 0.0f : largest - fixed::WEIGHT_EXPONENT;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i] = exp2f(x[i] - offset);
            }
            maximum = largest;
            sum     = sum * factor + ((x[0] + x[1]) + (x[2] + x[3]));
            *reinterpret_cast<float4 *>(weights + my_row * SCORE_STRIDE + my_key) = make_float4(x[0], x[1], x[2], x[3]);
            if (lane % LANES_A_ROW == 0) {
                rescale[my_row] = factor * cache.unit_change();
            }
        }
        __syncthreads();

        {
            const float unit = cache.factor_unit();
            float       factor[ROW_TILES][2];
            bool        same = true;
#pragma unroll
            for (int i = 0; i < ROW_TILES * 2; ++i) {
                factor[i / 2][i % 2] = rescale[8 * i + g];
                same                 = same && factor[i / 2][i % 2] == 1.0f;
            }
            if (!__all_sync(ALL_LANES, same)) {
#pragma unroll
                for (int i = 0; i < ROW_TILES * VALUE_COLUMNS * 4; ++i) {
                    out[i / 4 / VALUE_COLUMNS][i / 4 % VALUE_COLUMNS][i % 4] *=
                        factor[i / 4 / VALUE_COLUMNS][i / 2 % 2];
                }
            }
#pragma unroll
            for (int step = 0; step < KEY_STEPS; ++step) {
#pragma unroll
                for (int span = 0; span < WARP_VALUES / FACTOR_SPAN; ++span) {
                    const int value0 = warp * WARP_VALUES + span * FACTOR_SPAN;
                    float2    low    = cache.factors(value0 / FACTOR_SPAN, 16 * step + 2 * t);
                    float2    high   = cache.factors(value0 / FACTOR_SPAN, 16 * step + 2 * t + 8);
                    low              = make_float2(low.x * unit, low.y * unit);
                    high             = make_float2(high.x * unit, high.y * unit);
                    uint32_t a[ROW_TILES][fixed::P_TERMS][4];
#pragma unroll
                    for (int i = 0; i < ROW_TILES * 4; ++i) {
                        const int    row  = i / 4 * 16 + g + i % 2 * 8;
                        const int    key  = 16 * step + 2 * t + i / 2 % 2 * 8;
                        const float2 f    = i / 2 % 2 == 0 ? low : high;
                        const float2 x    = *reinterpret_cast<const float2 *>(weights + row * SCORE_STRIDE + key);
                        const auto   pair = split<element, fixed::P_TERMS>(x.x * f.x, x.y * f.y);
#pragma unroll
                        for (int term = 0; term < fixed::P_TERMS; ++term) {
                            a[i / 4][term][i % 4] = pair.term[term];
                        }
                    }
#pragma unroll
                    for (int pair = 0; pair < FACTOR_SPAN / 16; ++pair) {
#pragma unroll
                        for (int p = 0; p < tiles::PLANES; ++p) {
                            uint32_t b[4];
                            load_matrices_transposed(b, cache.plane(p) + (16 * step + lane % 16) * TILE_STRIDE +
                                                            value0 + 16 * pair + lane / 16 * 8);
                            const int column = span * FACTOR_SPAN / 8 + 2 * pair;
#pragma unroll
                            for (int term = fixed::P_TERMS - 1 - p; term >= 0; --term) {
#pragma unroll
                                for (int i = 0; i < ROW_TILES; ++i) {
                                    mma<element>(out[i][column], a[i][term], { b[0], b[1] });
                                    mma<element>(out[i][column + 1], a[i][term], { b[2], b[3] });
                                }
                            }
                        }
                    }
                }
            }
        }
        tile = next;
        next = sight.next(next.key + TILE_KEYS, ahead);
    }

    sum = sum_lanes<LANES_A_ROW>(sum);

    const int64_t first_row = static_cast<int64_t>(s) * plan.n_rows + row0;
    const int64_t all_rows  = static_cast<int64_t>(args.n_streams) * plan.n_rows;
    const bool    whole     = plan.n_pieces == 1;
    __syncthreads();
    if (lane % LANES_A_ROW == 0) {
        rescale[my_row] = (!whole ? 1.0f : sum == 0.0f ? 0.0f : 1.0f / sum) * cache.inverse_unit();
        if (!whole && my_row < n_rows) {
            partials.max_sum[piece * all_rows + first_row + my_row] = make_float2(maximum, sum);
        }
    }
    __syncthreads();
    float * to = whole ? args.out : partials.out + piece * all_rows * N_LATENT;
#pragma unroll
    for (int i = 0; i < ROW_TILES * 2; ++i) {
        const int row = 8 * i + g;
        if (row < n_rows) {
            const float factor = rescale[row];
#pragma unroll
            for (int column = 0; column < VALUE_COLUMNS; ++column) {
                const float * x                    = out[i / 2][column] + i % 2 * 2;
                *reinterpret_cast<float2 *>(to + (first_row + row) * N_LATENT + warp * WARP_VALUES + 8 * column +
                                            2 * t) = make_float2(x[0] * factor, x[1] * factor);
            }
        }
    }
}

}  // namespace latent_cuda
