#pragma once

// Attention of one block of rows over one split of the keys.
//
// All heads of all queries see the same cache, so the rows of the matmuls are (query, head) pairs, head fastest, as in
// the result. A thread block processes FORM::ROWS of them and loops over tiles of keys. Each tile is loaded into shared
// memory once and serves as keys and values of all rows. A tile has three steps, each followed by a barrier:
//   scores   warp (m, slice): 16 rows, a part of the N_CACHE values of a row, all keys of the tile; q is in registers
//   softmax  a few lanes per row: sum of the slices, online maximum, weights
//   values   warp w: 32 rows, a part of the values of the result, which stays in registers
// Sums are float32. A factor that 16 bits cannot hold accurately enough is the sum of two terms (`form`).
//
// Blocks of 32 rows multiply quants as they are: the partial scores and the weights of each 32 values are multiplied
// with the scales of the quants. Blocks of 64 rows multiply the values of quantized rows, rounded to halves. That leaves
// one factor for each key, and a tile is unpacked half as often. GeForce cards multiply halves twice as fast if the sums
// are halves too. There these blocks sum 32 products in halves, and add the sums in float32.

#include "latent-cache.cuh"

namespace latent_cuda {

constexpr int N_WARPS       = THREADS / WARP;
constexpr int KEY_STEPS     = TILE_KEYS / 16;
constexpr int SCORE_COLUMNS = TILE_KEYS / 8;
constexpr int SCORE_STRIDE  = TILE_KEYS + 8;  // avoids bank conflicts between pairs of eight rows
constexpr int GROUP_ROWS    = 32;             // rows of a warp when it multiplies with the values

static_assert(TILE_KEYS == WARP, "a lane a key");

// Rows of a block: NARROW for all types; WIDE for quantized caches, whose tiles are unpacked once for twice the rows.
constexpr int NARROW = 32;
constexpr int WIDE   = 64;

constexpr bool is_quantised(cache_type type) {
    return type == cache_type::q8_0 || type == cache_type::q4_0;
}

// Passes of a tile's scores (PASS_COLUMNS) that the compiler interleaves: two need too many registers on Blackwell.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int PASSES_AT_ONCE = 1;
#else
constexpr int PASSES_AT_ONCE = 2;
#endif

// How a kernel computes: properties of a type of cache and of the number of rows.
template <cache_type TYPE, int ROWS_, bool HALF_SUMS_ = false> struct form {
    static constexpr int  ROWS      = ROWS_;
    static constexpr bool SCALED    = ROWS == WIDE;  // quants are multiplied with their scales when they are unpacked
    static constexpr bool HALF_SUMS = HALF_SUMS_;    // of 32 products; these sums are added in float32

    using tiles   = std::conditional_t<SCALED, scaled_tiles<TYPE>, cache_tiles<TYPE>>;
    using element = typename tiles::element;

    static constexpr bool HALF = std::is_same_v<element, __half>;
    // Terms per value of q and per weight.
    static constexpr int Q_TERMS = is_quantised(TYPE) ? 1 : 2;
    static constexpr int P_TERMS = HALF ? 1 : 2;
    // Magnitudes of q are below 2^(this + 1). Two halves represent 2^8 most accurately.
    static constexpr int Q_EXPONENT = SCALED ? 5 : 8;
    // The largest weight is 2^this, so that a weight times a small factor is not yet a subnormal half.
    static constexpr int WEIGHT_EXPONENT = SCALED ? 6 : is_quantised(TYPE) ? 14 : 0;

    // Scores: a warp has 16 rows and a slice of the values of a row. Blocks of a quantized row with factors are not
    // split: a slice has 4 or 5 of the 18.
    static constexpr int ROW_TILES = ROWS / 16;
    static constexpr int SLICES    = N_WARPS / ROW_TILES;
    static constexpr int MIN_STEPS = tiles::FACTORS ? N_FACTORS / SLICES * 2 : N_CACHE / SLICES / 16;
    static constexpr int MAX_STEPS = tiles::FACTORS ? MIN_STEPS + 2 : MIN_STEPS;

    // Because the registers would not suffice otherwise: half of the keys at a time, and steps of q in shared memory.
    static constexpr int PASS_COLUMNS = HALF_SUMS ? SCORE_COLUMNS / 2 : SCORE_COLUMNS;
    static constexpr int LENT_STEPS   = SCALED ? 4 : 0;

    static __device__ int first_step(int slice) {
        return tiles::FACTORS ? slice * N_FACTORS / SLICES * 2 : slice * MAX_STEPS;
    }

    // Softmax: a warp has as many lanes for each row.
    static constexpr int LANES_A_ROW = THREADS / ROWS;
    static constexpr int LANE_KEYS   = TILE_KEYS / LANES_A_ROW;
    // Weights are floats, because each block of quants has other factors; or halves that include the key's factor.
    static constexpr int WEIGHT_BYTES = SCALED ? sizeof(__half) : sizeof(float);

    // Values: a warp has GROUP_ROWS rows and a part of the result's values.
    static constexpr int ROW_GROUPS    = ROWS / GROUP_ROWS;
    static constexpr int WARP_VALUES   = N_LATENT / (N_WARPS / ROW_GROUPS);
    static constexpr int VALUE_COLUMNS = WARP_VALUES / 8;

    // Sums of 32 products of halves are at most 2^15: they cannot overflow. (q is rounded up to 2^(Q_EXPONENT + 1) at
    // most, values to 2^VALUE_BITS, weights to 2^WEIGHT_EXPONENT, as their factor is at most the unit.)
    static_assert(!HALF_SUMS || (MAX_STEPS % 2 == 0 && KEY_STEPS == 2), "sums of two steps");
};

// Partial results: one per split of the keys and row.
struct partials {
    float *  out;      // [splits][rows of all streams][N_LATENT]
    float2 * max_sum;  // [splits][rows of all streams]
};

struct plan {
    int n_rows;        // per stream
    int block_rows;    // NARROW or WIDE
    int n_blocks;      // blocks of rows
    int n_pieces;      // splits of the keys
    int keys_a_piece;  // a multiple of TILE_KEYS
};

plan make_plan(const attention & args);

// Shared memory in addition to the tiles.
template <typename FORM> struct room {
    static constexpr int SCORES  = FORM::SLICES * FORM::ROWS * SCORE_STRIDE;                          // floats
    static constexpr int WEIGHTS = FORM::ROWS * SCORE_STRIDE / (sizeof(float) / FORM::WEIGHT_BYTES);  // floats
    static constexpr int ROWS    = FORM::ROWS;  // size of rescale and of row_scale
    static constexpr int LENT    = FORM::LENT_STEPS * THREADS * 4;
    static constexpr int BYTES   = (SCORES + WEIGHTS + 2 * ROWS + LENT) * sizeof(float);
};

template <typename FORM> constexpr int shared_bytes() {
    return FORM::tiles::SHARED + room<FORM>::BYTES;
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

// A power of two that scales the row's largest magnitude to [2^exponent, 2^(exponent + 1)).
static __device__ __forceinline__ float half_range(const float * row, int exponent) {
    float largest = 0.0f;
    for (int d = threadIdx.x % WARP; d < N_CACHE; d += WARP) {
        largest = fmaxf(largest, fabsf(row[d]));
    }
    return power_of_two(min(127 + exponent + 127 - exponent_of(max_lanes(largest)), 253));
}

// Adds 16 x 8 sums of products to c, or with sums in halves to `halves`, which add_halves adds to c.
template <typename FORM>
static __device__ __forceinline__ void
multiply(float (&c)[4], uint32_t (&halves)[2], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (FORM::HALF_SUMS) {
        mma(halves, a, b);
    } else {
        mma<typename FORM::element>(c, a, b);
    }
}

template <typename FORM> static __device__ __forceinline__ void add_halves(float (&c)[4], uint32_t (&halves)[2]) {
    if constexpr (FORM::HALF_SUMS) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            c[2 * i] += first_of<__half>(halves[i]);
            c[2 * i + 1] += second_of<__half>(halves[i]);
            halves[i] = 0;
        }
    }
}

// out += weights of this warp's rows x its values, where weights are halves.
template <typename FORM>
static __device__ __forceinline__ void add_values(float (&out)[GROUP_ROWS / 16][FORM::VALUE_COLUMNS][4],
                                                  const __half * weights,  // of the warp's first row
                                                  const __half * values) {
    const int lane = threadIdx.x % WARP;

    uint32_t a[KEY_STEPS][GROUP_ROWS / 16][4];
#pragma unroll
    for (int step = 0; step < KEY_STEPS; ++step) {
#pragma unroll
        for (int i = 0; i < GROUP_ROWS / 16; ++i) {
            load_matrices(a[step][i], weights + (16 * i + lane % 16) * SCORE_STRIDE + 16 * step + lane / 16 * 8);
        }
    }
#pragma unroll
    for (int column = 0; column < FORM::VALUE_COLUMNS; column += 2) {
        uint32_t halves[GROUP_ROWS / 16][2][2] = {};
#pragma unroll
        for (int step = 0; step < KEY_STEPS; ++step) {
            uint32_t b[4];
            load_matrices_transposed(b, values + (16 * step + lane % 16) * TILE_STRIDE + 8 * column + lane / 16 * 8);
#pragma unroll
            for (int i = 0; i < GROUP_ROWS / 16; ++i) {
                multiply<FORM>(out[i][column], halves[i][0], a[step][i], { b[0], b[1] });
                multiply<FORM>(out[i][column + 1], halves[i][1], a[step][i], { b[2], b[3] });
            }
        }
#pragma unroll
        for (int i = 0; i < GROUP_ROWS / 16; ++i) {
            add_halves<FORM>(out[i][column], halves[i][0]);
            add_halves<FORM>(out[i][column + 1], halves[i][1]);
        }
    }
}

// The same where weights are floats, of all rows of a block, and have the factors of their blocks of quants.
template <typename FORM>
static __device__ __forceinline__ void add_values(float (&out)[GROUP_ROWS / 16][FORM::VALUE_COLUMNS][4],
                                                  const float *                weights,
                                                  const typename FORM::tiles & cache,
                                                  int                          value0) {
    using element  = typename FORM::element;
    const int lane = threadIdx.x % WARP;
    const int g    = lane / 4;
    const int t    = lane % 4;

    const float unit = cache.factor_unit();
#pragma unroll
    for (int step = 0; step < KEY_STEPS; ++step) {
#pragma unroll
        for (int span = 0; span < FORM::WARP_VALUES / FACTOR_SPAN; ++span) {
            const int block = value0 / FACTOR_SPAN + span;
            float2    low   = cache.factors(block, 16 * step + 2 * t);
            float2    high  = cache.factors(block, 16 * step + 2 * t + 8);
            low             = make_float2(low.x * unit, low.y * unit);
            high            = make_float2(high.x * unit, high.y * unit);
            uint32_t a[GROUP_ROWS / 16][FORM::P_TERMS][4];
#pragma unroll
            for (int i = 0; i < GROUP_ROWS / 16 * 4; ++i) {
                const int    row  = i / 4 * 16 + g + i % 2 * 8;
                const int    key  = 16 * step + 2 * t + i / 2 % 2 * 8;
                const float2 f    = i / 2 % 2 == 0 ? low : high;
                const float2 x    = *reinterpret_cast<const float2 *>(weights + row * SCORE_STRIDE + key);
                const auto   pair = split<element, FORM::P_TERMS>(x.x * f.x, x.y * f.y);
#pragma unroll
                for (int term = 0; term < FORM::P_TERMS; ++term) {
                    a[i / 4][term][i % 4] = pair.term[term];
                }
            }
#pragma unroll
            for (int pair = 0; pair < FACTOR_SPAN / 16; ++pair) {
#pragma unroll
                for (int p = 0; p < FORM::tiles::PLANES; ++p) {
                    uint32_t b[4];
                    load_matrices_transposed(b, cache.plane(p) + (16 * step + lane % 16) * TILE_STRIDE +
                                                    block * FACTOR_SPAN + 16 * pair + lane / 16 * 8);
                    const int column = span * FACTOR_SPAN / 8 + 2 * pair;
#pragma unroll
                    for (int term = FORM::P_TERMS - 1 - p; term >= 0; --term) {
#pragma unroll
                        for (int i = 0; i < GROUP_ROWS / 16; ++i) {
                            mma<element>(out[i][column], a[i][term], { b[0], b[1] });
                            mma<element>(out[i][column + 1], a[i][term], { b[2], b[3] });
                        }
                    }
                }
            }
        }
    }
}

template <typename FORM>
static __device__ __forceinline__ void
attend_piece(const attention & args, const plan & plan, const partials & partials, char * shared) {
    using tiles   = typename FORM::tiles;
    using element = typename FORM::element;

    const int lane  = threadIdx.x % WARP;
    const int warp  = threadIdx.x / WARP;
    const int g     = lane / 4;
    const int t     = lane % 4;
    const int piece = blockIdx.x;
    const int block = blockIdx.y;
    const int s     = blockIdx.z;

    float * scores    = reinterpret_cast<float *>(shared + tiles::SHARED);
    float * weights   = scores + room<FORM>::SCORES;
    float * rescale   = weights + room<FORM>::WEIGHTS;
    float * row_scale = rescale + room<FORM>::ROWS;
    uint4 * lent      = reinterpret_cast<uint4 *>(row_scale + room<FORM>::ROWS);

    const int row0   = block * FORM::ROWS;
    const int n_rows = min(FORM::ROWS, plan.n_rows - row0);
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
    for (int i = warp * FORM::ROWS / N_WARPS; i < (warp + 1) * FORM::ROWS / N_WARPS; ++i) {
        const float range = FORM::HALF && i < n_rows ? half_range(query_row(i), FORM::Q_EXPONENT) : 1.0f;
        if (lane == 0) {
            row_scale[i] = args.scale * LOG2_E * power_of_two(254 - exponent_of(range));
            rescale[i]   = range;
        }
    }
    __syncthreads();

    // q of this warp's rows and slice.
    const int           m          = warp % FORM::ROW_TILES;
    const int           slice      = warp / FORM::ROW_TILES;
    const int           step0      = FORM::first_step(slice);
    const int           n_steps    = FORM::first_step(slice + 1) - step0;
    const int           my_rows[2] = { 16 * m + g, 16 * m + g + 8 };
    const float * const my_q[2]    = { query_row(min(my_rows[0], n_rows - 1)), query_row(min(my_rows[1], n_rows - 1)) };
    uint32_t            q[FORM::MAX_STEPS][FORM::Q_TERMS][4];
#pragma unroll
    for (int step = 0; step < FORM::MAX_STEPS; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 x = make_float2(0.0f, 0.0f);
            if (my_rows[i % 2] < n_rows && (step < FORM::MIN_STEPS || step < n_steps)) {
                x = *reinterpret_cast<const float2 *>(my_q[i % 2] + (step0 + step) * 16 + 2 * t + i / 2 * 8);
            }
            const float                range = rescale[my_rows[i % 2]];
            const terms<FORM::Q_TERMS> pair  = split<element, FORM::Q_TERMS>(x.x * range, x.y * range);
#pragma unroll
            for (int term = 0; term < FORM::Q_TERMS; ++term) {
                q[step][term][i] = pair.term[term];
            }
        }
        if (step < FORM::LENT_STEPS) {
            const uint32_t (&x)[4]             = q[step][0];
            lent[step * THREADS + threadIdx.x] = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }

    // Softmax: this lane's row and keys.
    const int my_row   = warp * (WARP / FORM::LANES_A_ROW) + lane / FORM::LANES_A_ROW;
    const int my_key   = lane % FORM::LANES_A_ROW * FORM::LANE_KEYS;
    const int my_query = (row0 + min(my_row, n_rows - 1)) / args.n_heads;
    const int my_mask  = static_cast<int>((my_query - query0) * args.mask_query);  // from the block's first one
    float     maximum  = -INFINITY;
    float     sum      = 0.0f;  // of this lane's keys

    // Values: this warp's rows and values.
    const int group  = warp % FORM::ROW_GROUPS;
    const int value0 = warp / FORM::ROW_GROUPS * FORM::WARP_VALUES;

    float out[GROUP_ROWS / 16][FORM::VALUE_COLUMNS][4] = {};

    while (tile.visible != 0) {
        cache.arrive(tile);
        cache.fetch(next);
        const bool ahead = sight.sees(next.key + TILE_KEYS + lane);  // prefetched
        uint16_t   added[FORM::LANE_KEYS];
        const auto load_mask = [&] {
#pragma unroll
            for (int i = 0; i < FORM::LANE_KEYS; ++i) {
                added[i] = mask != nullptr && tile.sees(my_key + i) ? sight.mask[my_mask + tile.key + my_key + i] : 0;
            }
        };
        if (!FORM::SCALED) {
            load_mask();  // early, if the registers suffice
        }

#pragma unroll PASSES_AT_ONCE
        for (int column0 = 0; column0 < SCORE_COLUMNS; column0 += FORM::PASS_COLUMNS) {
            float    sums[FORM::PASS_COLUMNS][4]   = {};
            float    part[FORM::PASS_COLUMNS][4]   = {};
            uint32_t halves[FORM::PASS_COLUMNS][2] = {};
#pragma unroll
            for (int step = 0; step < FORM::MAX_STEPS; ++step) {
                if (step < FORM::LENT_STEPS) {
                    const uint4 x = lent[step * THREADS + threadIdx.x];
                    q[step][0][0] = x.x;
                    q[step][0][1] = x.y;
                    q[step][0][2] = x.z;
                    q[step][0][3] = x.w;
                }
                if (step < FORM::MIN_STEPS || step < n_steps) {
                    float (&to)[FORM::PASS_COLUMNS][4] = tiles::FACTORS ? part : sums;
#pragma unroll
                    for (int pair = 0; pair < FORM::PASS_COLUMNS / 2; ++pair) {
#pragma unroll
                        for (int p = 0; p < tiles::PLANES; ++p) {
                            const int key = 8 * column0 + 16 * pair + lane / 16 * 8 + lane % 8;
                            uint32_t  b[4];
                            load_matrices(b,
                                          cache.plane(p) + key * TILE_STRIDE + (step0 + step) * 16 + lane / 8 % 2 * 8);
#pragma unroll
                            for (int term = FORM::Q_TERMS - 1 - p; term >= 0; --term) {
                                multiply<FORM>(to[2 * pair], halves[2 * pair], q[step][term], { b[0], b[1] });
                                multiply<FORM>(to[2 * pair + 1], halves[2 * pair + 1], q[step][term], { b[2], b[3] });
                            }
                        }
                    }
#pragma unroll
                    for (int column = 0; column < FORM::PASS_COLUMNS && step % 2 == 1; ++column) {
                        add_halves<FORM>(sums[column], halves[column]);
                        if constexpr (tiles::FACTORS) {
                            const float2 factor = cache.factors((step0 + step) / 2, 8 * (column0 + column) + 2 * t);
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
            for (int i = 0; i < 2 * FORM::PASS_COLUMNS; ++i) {
                const int    row = slice * FORM::ROWS + 16 * m + g + i % 2 * 8;
                const int    key = 8 * (column0 + i / 2) + 2 * t;
                const float2 two = make_float2(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
                *reinterpret_cast<float2 *>(scores + row * SCORE_STRIDE + key) = two;
            }
        }
        if (FORM::SCALED) {
            load_mask();
        }
        __syncthreads();

        {
            float x[FORM::LANE_KEYS] = {};
#pragma unroll
            for (int i = 0; i < FORM::SLICES; ++i) {
#pragma unroll
                for (int k = 0; k < FORM::LANE_KEYS; k += 4) {
                    const float4 part = *reinterpret_cast<const float4 *>(
                        scores + (i * FORM::ROWS + my_row) * SCORE_STRIDE + my_key + k);
                    x[k] += part.x;
                    x[k + 1] += part.y;
                    x[k + 2] += part.z;
                    x[k + 3] += part.w;
                }
            }
            const auto key_factor = [&](int i) {
                if constexpr (FORM::SCALED) {
                    return cache.factor_of_key(my_key + i);
                } else {
                    return 1.0f;
                }
            };
            float largest = maximum;
#pragma unroll
            for (int i = 0; i < FORM::LANE_KEYS; ++i) {
                const float scale = row_scale[my_row] * key_factor(i);
                x[i]              = x[i] * scale + LOG2_E * __half2float(__ushort_as_half(added[i]));
                x[i]              = tile.sees(my_key + i) ? x[i] : -INFINITY;
                largest           = fmaxf(largest, x[i]);
            }
            largest            = max_lanes<FORM::LANES_A_ROW>(largest);
            const float factor = largest == maximum ? 1.0f : exp2f(maximum - largest);
            const float offset = largest == -INFINITY ? 0.0f : largest - FORM::WEIGHT_EXPONENT;
            maximum            = largest;
            sum *= factor;
#pragma unroll
            for (int k = 0; k < FORM::LANE_KEYS; k += 4) {
#pragma unroll
                for (int i = k; i < k + 4; ++i) {
                    x[i] = exp2f(x[i] - offset);
                }
                sum += (x[k] + x[k + 1]) + (x[k + 2] + x[k + 3]);
                const int at = my_row * SCORE_STRIDE + my_key + k;
                if constexpr (FORM::SCALED) {
                    const float unit                                                     = cache.factor_unit();
                    *reinterpret_cast<uint2 *>(reinterpret_cast<__half *>(weights) + at) = make_uint2(
                        pack<__half>(x[k] * (key_factor(k) * unit), x[k + 1] * (key_factor(k + 1) * unit)),
                        pack<__half>(x[k + 2] * (key_factor(k + 2) * unit), x[k + 3] * (key_factor(k + 3) * unit)));
                } else {
                    *reinterpret_cast<float4 *>(weights + at) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
                }
            }
            if (lane % FORM::LANES_A_ROW == 0) {
                rescale[my_row] = factor * cache.unit_change();
            }
        }
        __syncthreads();

        {
            float factor[GROUP_ROWS / 16][2];
            bool  same = true;
#pragma unroll
            for (int i = 0; i < GROUP_ROWS / 8; ++i) {
                factor[i / 2][i % 2] = rescale[group * GROUP_ROWS + 8 * i + g];
                same                 = same && factor[i / 2][i % 2] == 1.0f;
            }
            if (!__all_sync(ALL_LANES, same)) {
#pragma unroll
                for (int i = 0; i < GROUP_ROWS / 16 * FORM::VALUE_COLUMNS * 4; ++i) {
                    out[i / 4 / FORM::VALUE_COLUMNS][i / 4 % FORM::VALUE_COLUMNS][i % 4] *=
                        factor[i / 4 / FORM::VALUE_COLUMNS][i / 2 % 2];
                }
            }
        }
        if constexpr (FORM::SCALED) {
            add_values<FORM>(out, reinterpret_cast<const __half *>(weights) + group * GROUP_ROWS * SCORE_STRIDE,
                             cache.plane(0) + value0);
        } else {
            add_values<FORM>(out, weights, cache, value0);
        }
        tile = next;
        next = sight.next(next.key + TILE_KEYS, ahead);
    }

    sum = sum_lanes<FORM::LANES_A_ROW>(sum);

    const int64_t first_row = static_cast<int64_t>(s) * plan.n_rows + row0;
    const int64_t all_rows  = static_cast<int64_t>(args.n_streams) * plan.n_rows;
    const bool    whole     = plan.n_pieces == 1;
    __syncthreads();
    if (lane % FORM::LANES_A_ROW == 0) {
        rescale[my_row] = (!whole ? 1.0f : sum == 0.0f ? 0.0f : 1.0f / sum) * cache.inverse_unit();
        if (!whole && my_row < n_rows) {
            partials.max_sum[piece * all_rows + first_row + my_row] = make_float2(maximum, sum);
        }
    }
    __syncthreads();
    float * to = whole ? args.out : partials.out + piece * all_rows * N_LATENT;
#pragma unroll
    for (int i = 0; i < GROUP_ROWS / 8; ++i) {
        const int row = group * GROUP_ROWS + 8 * i + g;
        if (row < n_rows) {
            const float factor = rescale[row];
#pragma unroll
            for (int column = 0; column < FORM::VALUE_COLUMNS; ++column) {
                const float * x = out[i / 2][column] + i % 2 * 2;
                *reinterpret_cast<float2 *>(to + (first_row + row) * N_LATENT + value0 + 8 * column + 2 * t) =
                    make_float2(x[0] * factor, x[1] * factor);
            }
        }
    }
}

}  // namespace latent_cuda
