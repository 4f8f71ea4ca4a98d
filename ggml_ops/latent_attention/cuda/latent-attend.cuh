#pragma once

// Attention of one block of rows over one split of the keys.
//
// All heads of all queries see the same cache, so the rows of the matmuls are (query, head) pairs, head fastest, as in
// the result. A thread block processes FORM::ROWS of them and loops over tiles of keys. Each tile is loaded into shared
// memory once and serves as keys and values of all rows. A tile has three steps, each followed by a barrier:
//   scores   warp (m, slice): 16 rows, a part of the N_CACHE values of a row, all keys of the tile; q is in registers
//   softmax  a few lanes per row: sum of the slices, online maximum, weights
//   values   warp w: 32 rows, a part of the values of the result, which stays in registers
// Sums are float32, except as below. A factor that 16 bits cannot hold accurately enough is the sum of two terms
// (`form`). Quants are multiplied as they are: the partial scores and the weights of each 32 values are multiplied with
// their scales.
//
// Blocks of 64 rows are for quantized caches, whose tiles take long to unpack. Their weights are rounded to halves before
// they are multiplied with the scales. GeForce cards multiply halves twice as fast if the sums are halves too: there
// these blocks sum 32 weighted values in halves, and add these sums in float32.

#include "latent-cache.cuh"

namespace latent_cuda {

constexpr int N_WARPS       = THREADS / WARP;
constexpr int KEY_STEPS     = TILE_KEYS / 16;
constexpr int SCORE_COLUMNS = TILE_KEYS / 8;
constexpr int SCORE_STRIDE  = TILE_KEYS + 8;  // avoids bank conflicts between pairs of eight rows
constexpr int GROUP_ROWS    = 32;             // rows of a warp when it multiplies with the values
constexpr int GROUP_TILES   = GROUP_ROWS / 16;

static_assert(TILE_KEYS == WARP, "a lane a key");

// Rows of a block: NARROW for all types; WIDE for quantized caches, whose tiles are unpacked once for twice the rows.
constexpr int NARROW = 32;
constexpr int WIDE   = 64;

constexpr bool is_quantised(cache_type type) {
    return type == cache_type::q8_0 || type == cache_type::q4_0;
}

// How a kernel computes: properties of a type of cache and of the number of rows.
template <cache_type TYPE, int ROWS_, bool HALF_SUMS_ = false> struct form {
    static constexpr int  ROWS    = ROWS_;
    static constexpr bool IS_WIDE = ROWS == WIDE;
    // Weighted values: sums of TILE_KEYS products in halves, which are added in float32. Not where that saves nothing.
    static constexpr bool HALF_SUMS = HALF_SUMS_ && !FAST_SUMS;

    using tiles   = cache_tiles<TYPE>;
    using element = typename tiles::element;

    static constexpr bool HALF = std::is_same_v<element, __half>;
    // Terms per value of q and per weight.
    static constexpr int Q_TERMS = is_quantised(TYPE) ? 1 : 2;
    static constexpr int P_TERMS = HALF ? 1 : 2;
    // The largest weight is 2^this, so that small weights, and weights times small factors, become subnormal halves as late
    // as possible. Factors of values are below 2, so a product is at most 2^15, a finite half. With HALF_SUMS the sum of
    // TILE_KEYS products is at most 2^15.
    static constexpr int WEIGHT_EXPONENT = HALF_SUMS ? 9 : HALF ? 14 : 0;
    static_assert(WEIGHT_EXPONENT + 1 + (HALF_SUMS ? 5 : 0) <= 15 && TILE_KEYS == 32);

    // Scores: a warp has 16 rows and a slice of the values of a row. Blocks of a quantized row with factors are not
    // split: of the 18 a slice has 4 or 5, or 9.
    static constexpr int ROW_TILES = ROWS / 16;
    static constexpr int SLICES    = N_WARPS / ROW_TILES;
    static constexpr int MIN_STEPS = tiles::FACTORS ? N_FACTORS / SLICES * 2 : N_CACHE / SLICES / 16;
    static constexpr int MAX_STEPS = tiles::FACTORS && N_FACTORS % SLICES != 0 ? MIN_STEPS + 2 : MIN_STEPS;

    // Registers do not suffice for more: half of the keys at a time, and some words of q in shared memory. A step has 4
    // words. Code for 12.0 needs more registers (nvcc 13.0): there two more words are in shared memory, and a thread
    // derives its role from its number again before the scores and before the values of each tile.
    static constexpr int  PASS_COLUMNS = IS_WIDE ? SCORE_COLUMNS / 2 : SCORE_COLUMNS;
    static constexpr bool ROLES_AGAIN  = IS_WIDE && ARCHITECTURE >= 1200;
    static constexpr int  LENT_WORDS   = !IS_WIDE ? 0 : ROLES_AGAIN ? 22 : 20;
    static constexpr int  MOST_LENT = IS_WIDE ? 22 : 0;  // of any architecture: the host reserves shared memory for all

    // Softmax: a warp has as many lanes for each row.
    static constexpr int LANES_A_ROW = THREADS / ROWS;
    static constexpr int LANE_KEYS   = TILE_KEYS / LANES_A_ROW;

    // Values: a warp has GROUP_ROWS rows and a part of the result's values.
    static constexpr int ROW_GROUPS    = ROWS / GROUP_ROWS;
    static constexpr int WARP_VALUES   = N_LATENT / (N_WARPS / ROW_GROUPS);
    static constexpr int VALUE_COLUMNS = WARP_VALUES / 8;

    static_assert(!IS_WIDE || tiles::FACTORS, "only quantized caches have wide blocks");
};

// A thread's share of the scores, of the softmax and of the weighted values.
template <typename FORM> struct role {
    int lane;
    int warp;

    __device__ explicit role(int thread) : lane(thread % WARP), warp(thread / WARP) {}

    __device__ int g() const { return lane / 4; }

    __device__ int t() const { return lane % 4; }

    // Scores: the warp's 16 rows, and its slice of the values of a row, in steps of 16.
    __device__ int row_tile() const { return warp % FORM::ROW_TILES; }

    __device__ int slice() const { return warp / FORM::ROW_TILES; }

    static __device__ int first_step(int slice) {
        return FORM::tiles::FACTORS ? slice * N_FACTORS / FORM::SLICES * 2 : slice * FORM::MAX_STEPS;
    }

    __device__ int first_step() const { return first_step(slice()); }

    __device__ int n_steps() const { return first_step(slice() + 1) - first_step(); }

    // Softmax: the lane's row and the first of its keys.
    __device__ int row() const { return warp * (WARP / FORM::LANES_A_ROW) + lane / FORM::LANES_A_ROW; }

    __device__ int key() const { return lane % FORM::LANES_A_ROW * FORM::LANE_KEYS; }

    // Values: the warp's rows, and the first of its values.
    __device__ int group() const { return warp % FORM::ROW_GROUPS; }

    __device__ int value0() const { return warp / FORM::ROW_GROUPS * FORM::WARP_VALUES; }
};

// The first LENT_WORDS words of each thread's q, which are in shared memory.
template <typename FORM> struct lent_words {
    uint4 * of_steps;  // [steps][threads]; if the last step has only two words, they are a uint2

    __device__ uint2 * two(int step) const { return reinterpret_cast<uint2 *>(of_steps + step * THREADS); }

    __device__ void store(int step, const uint32_t (&x)[4]) const {
        if (4 * step + 4 <= FORM::LENT_WORDS) {
            of_steps[step * THREADS + threadIdx.x] = make_uint4(x[0], x[1], x[2], x[3]);
        } else if (4 * step + 2 <= FORM::LENT_WORDS) {
            two(step)[threadIdx.x] = make_uint2(x[0], x[1]);
        }
    }

    __device__ void load(int step, int thread, uint32_t (&x)[4]) const {
        if (4 * step + 4 <= FORM::LENT_WORDS) {
            const uint4 y = of_steps[step * THREADS + thread];
            x[0]          = y.x;
            x[1]          = y.y;
            x[2]          = y.z;
            x[3]          = y.w;
        } else if (4 * step + 2 <= FORM::LENT_WORDS) {
            const uint2 y = two(step)[thread];
            x[0]          = y.x;
            x[1]          = y.y;
        }
    }
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

// Shared memory in addition to the tiles. Weights are floats, which are rounded when they are multiplied with the
// factors; or halves (wide), in place of the row's scores.
template <typename FORM> struct room {
    static constexpr int SCORES  = FORM::SLICES * FORM::ROWS * SCORE_STRIDE;       // floats
    static constexpr int WEIGHTS = FORM::IS_WIDE ? 0 : FORM::ROWS * SCORE_STRIDE;  // floats
    static constexpr int LENT    = FORM::MOST_LENT * THREADS;
    static constexpr int BYTES   = (SCORES + WEIGHTS + LENT) * sizeof(float);
};

// Data of a row that all threads of a block need, after the row's scores in the first slice.
struct row_state {
    float rescale;  // the factor of sums of earlier tiles; before the first tile: the factor of q (half_range)
    float scale;    // of the scores, for exp2
    float maximum;  // of the scores so far
    float sum;      // of the weights
    int   mask;     // its distance from the mask of the block's first query
};

static_assert(sizeof(row_state) <= (SCORE_STRIDE - TILE_KEYS) * sizeof(float));

static __device__ __forceinline__ row_state & state_of(float * scores, int row) {
    return *reinterpret_cast<row_state *>(scores + row * SCORE_STRIDE + TILE_KEYS);
}

// The weights of a row where they are halves. The distance of eight rows avoids bank conflicts.
static __device__ __forceinline__ __half * half_weights(float * scores, int row) {
    return reinterpret_cast<__half *>(scores + row * SCORE_STRIDE) + row / 4 % 2 * 8;
}

template <typename FORM> constexpr int shared_bytes() {
    return FORM::tiles::SHARED + room<FORM>::BYTES;
}

// Visibility of the keys of a split for the rows of a block.
struct sight {
    const uint16_t * mask;  // of the block's first query; nullptr: all keys are visible
    int64_t          mask_query;
    int              n_queries;
    int              end;  // end of the split

    static constexpr uint16_t MINUS_INFINITY = 0xfc00;

    // The mask of a key for the first two queries. It is compared later, because a comparison waits for the loads.
    struct glance {
        uint16_t first, second;
    };

    __device__ glance look(int key) const {
        glance x = { MINUS_INFINITY, MINUS_INFINITY };
        if (mask != nullptr && key < end) {
            x.first = mask[key];
            if (n_queries > 1) {
                x.second = mask[mask_query + key];
            }
        }
        return x;
    }

    // Whether any query of the block sees the key that `x` is of.
    __device__ bool sees(int key, const glance & x) const {
        bool any = mask == nullptr && key < end;
        any      = any || x.first != MINUS_INFINITY || x.second != MINUS_INFINITY;
        for (int i = 2; i < n_queries && mask != nullptr && key < end; ++i) {
            any = any || mask[i * mask_query + key] != MINUS_INFINITY;
        }
        return any;
    }

    __device__ bool sees(int key) const { return sees(key, look(key)); }

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

// out += weights of this warp's rows x its values, where weights are halves.
template <typename FORM>
static __device__ __forceinline__ void add_values_wide(float (&out)[FORM::VALUE_COLUMNS][GROUP_TILES][4],
                                                       float *                      scores,  // of the warp's first row
                                                       const typename FORM::tiles & cache,
                                                       int                          value0) {
    const int lane = threadIdx.x % WARP;
    const int t    = lane % 4;

#pragma unroll
    for (int span = 0; span < FORM::WARP_VALUES / FACTOR_SPAN; ++span) {
        const int block = value0 / FACTOR_SPAN + span;
        uint32_t  a[KEY_STEPS][GROUP_TILES][4];
#pragma unroll
        for (int step = 0; step < KEY_STEPS; ++step) {
            const uint32_t factor[2] = { cache.half_factors(block, 16 * step + 2 * t),
                                         cache.half_factors(block, 16 * step + 2 * t + 8) };
#pragma unroll
            for (int i = 0; i < GROUP_TILES; ++i) {
                load_matrices(a[step][i], half_weights(scores, 16 * i + lane % 16) + 16 * step + lane / 16 * 8);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    a[step][i][k] = multiply_halves(a[step][i][k], factor[k / 2]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < FACTOR_SPAN / 8; ++i) {
            float (&to)[GROUP_TILES][4]     = out[span * FACTOR_SPAN / 8 + i];
            uint32_t halves[GROUP_TILES][2] = {};
            uint32_t b[2 * KEY_STEPS];
            load_matrices_transposed(b, cache.plane(0) + lane * TILE_STRIDE + block * FACTOR_SPAN + 8 * i);
#pragma unroll
            for (int step = 0; step < KEY_STEPS; ++step) {
#pragma unroll
                for (int m = 0; m < GROUP_TILES; ++m) {
                    if constexpr (FORM::HALF_SUMS) {
                        mma(halves[m], a[step][m], { b[2 * step], b[2 * step + 1] });
                    } else {
                        mma<__half>(to[m], a[step][m], { b[2 * step], b[2 * step + 1] });
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < GROUP_TILES * 2 && FORM::HALF_SUMS; ++m) {
                to[m / 2][m % 2 * 2] += first_of<__half>(halves[m / 2][m % 2]);
                to[m / 2][m % 2 * 2 + 1] += second_of<__half>(halves[m / 2][m % 2]);
            }
        }
    }
}

// The same where weights are floats, of all rows of a block, and have the factors of their blocks of quants.
template <typename FORM>
static __device__ __forceinline__ void add_values(float (&out)[FORM::VALUE_COLUMNS][GROUP_TILES][4],
                                                  const float *                weights,
                                                  const typename FORM::tiles & cache,
                                                  int                          value0) {
    using element  = typename FORM::element;
    const int lane = threadIdx.x % WARP;
    const int g    = lane / 4;
    const int t    = lane % 4;

#pragma unroll
    for (int step = 0; step < KEY_STEPS; ++step) {
#pragma unroll
        for (int span = 0; span < FORM::WARP_VALUES / FACTOR_SPAN; ++span) {
            const int    block = value0 / FACTOR_SPAN + span;
            const float2 low   = cache.factors(block, 16 * step + 2 * t);
            const float2 high  = cache.factors(block, 16 * step + 2 * t + 8);
            uint32_t     a[GROUP_TILES][FORM::P_TERMS][4];
#pragma unroll
            for (int i = 0; i < GROUP_TILES * 4; ++i) {
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
                        for (int i = 0; i < GROUP_TILES; ++i) {
                            mma<element>(out[column][i], a[i][term], { b[0], b[1] });
                            mma<element>(out[column + 1][i], a[i][term], { b[2], b[3] });
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

    const role<FORM> me(threadIdx.x);

    const int piece = blockIdx.x;
    const int block = blockIdx.y;
    const int s     = blockIdx.z;

    float * scores  = reinterpret_cast<float *>(shared + tiles::SHARED);
    float * weights = scores + room<FORM>::SCORES;

    const lent_words<FORM> lent = { reinterpret_cast<uint4 *>(weights + room<FORM>::WEIGHTS) };

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
    key_tile  tile      = sight.next(first_key, sight.sees(first_key + me.lane));
    key_tile  next      = sight.next(tile.key + TILE_KEYS, sight.sees(tile.key + TILE_KEYS + me.lane));
    cache.fetch(tile);

    const auto begin_row = [&](int i) {
        const float range = FORM::HALF && i < n_rows ? half_range(query_row(i)) : 1.0f;
        if (me.lane == 0) {
            const int   query = (row0 + min(i, n_rows - 1)) / args.n_heads;
            row_state & row   = state_of(scores, i);
            row.rescale       = range;
            row.scale         = args.scale * LOG2_E * power_of_two(254 - exponent_of(range) + tiles::QUANT_BITS);
            row.maximum       = -INFINITY;
            row.sum           = 0.0f;
            row.mask          = static_cast<int>((query - query0) * args.mask_query);
        }
    };
    if constexpr (FORM::IS_WIDE) {
#pragma unroll 1  // the registers do not suffice for more
        for (int i = me.warp * FORM::ROWS / N_WARPS; i < (me.warp + 1) * FORM::ROWS / N_WARPS; ++i) {
            begin_row(i);
        }
    } else {
#pragma unroll
        for (int n = 0; n < FORM::ROWS / N_WARPS; ++n) {  // a constant number: the loads of all rows are in flight
            begin_row(me.warp * (FORM::ROWS / N_WARPS) + n);
        }
    }
    __syncthreads();

    // q of this warp's rows and slice.
    const int           my_rows[2] = { 16 * me.row_tile() + me.g(), 16 * me.row_tile() + me.g() + 8 };
    const float * const my_q[2]    = { query_row(min(my_rows[0], n_rows - 1)), query_row(min(my_rows[1], n_rows - 1)) };
    uint32_t            q[FORM::MAX_STEPS][FORM::Q_TERMS][4];
#pragma unroll
    for (int step = 0; step < FORM::MAX_STEPS; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 x = make_float2(0.0f, 0.0f);
            if (my_rows[i % 2] < n_rows && (step < FORM::MIN_STEPS || step < me.n_steps())) {
                const int at = (me.first_step() + step) * 16 + 2 * me.t() + i / 2 * 8;
                x            = *reinterpret_cast<const float2 *>(my_q[i % 2] + at);
            }
            const float                range = state_of(scores, my_rows[i % 2]).rescale;
            const terms<FORM::Q_TERMS> pair  = split<element, FORM::Q_TERMS>(x.x * range, x.y * range);
#pragma unroll
            for (int term = 0; term < FORM::Q_TERMS; ++term) {
                q[step][term][i] = pair.term[term];
            }
        }
        lent.store(step, q[step][0]);
    }

    float out[FORM::VALUE_COLUMNS][GROUP_TILES][4] = {};

    while (tile.visible != 0) {
        const int           lane_key = next.key + TILE_KEYS + me.lane;  // of the tile after the next one
        const sight::glance ahead    = sight.look(lane_key);
        cache.arrive(tile);
        cache.fetch(next);
        // Quantized caches: now, because the scores need all registers. Unpacking has given the loads time.
        bool       sees_ahead = FORM::tiles::FACTORS && sight.sees(lane_key, ahead);
        uint16_t   added[FORM::LANE_KEYS];
        const auto load_mask = [&] {
#pragma unroll
            for (int i = 0; i < FORM::LANE_KEYS; ++i) {
                added[i] = mask != nullptr && tile.sees(me.key() + i)
                               ? sight.mask[state_of(scores, me.row()).mask + tile.key + me.key() + i]
                               : 0;
            }
        };
        if (!FORM::IS_WIDE) {
            load_mask();  // early, if the registers suffice
        }

        const role<FORM> to_score(FORM::ROLES_AGAIN ? thread_again() : threadIdx.x);
        const int        lane  = to_score.lane;
        const int        step0 = to_score.first_step();
#pragma unroll 1  // two at once would need more registers
        for (int column0 = 0; column0 < SCORE_COLUMNS; column0 += FORM::PASS_COLUMNS) {
            float sums[FORM::PASS_COLUMNS][4] = {};
            float part[FORM::PASS_COLUMNS][4] = {};
#pragma unroll
            for (int step = 0; step < FORM::MAX_STEPS; ++step) {
                lent.load(step, to_score.warp * WARP + lane, q[step][0]);
                if (step < FORM::MIN_STEPS || step < to_score.n_steps()) {
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
                                mma<element>(to[2 * pair], q[step][term], { b[0], b[1] });
                                mma<element>(to[2 * pair + 1], q[step][term], { b[2], b[3] });
                            }
                        }
                    }
#pragma unroll
                    for (int column = 0; column < FORM::PASS_COLUMNS && tiles::FACTORS && step % 2 == 1; ++column) {
                        const float2 factor =
                            cache.factors((step0 + step) / 2, 8 * (column0 + column) + 2 * to_score.t());
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            sums[column][i] += part[column][i] * (i % 2 == 0 ? factor.x : factor.y);
                            part[column][i] = 0.0f;
                        }
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2 * FORM::PASS_COLUMNS; ++i) {
                const int    row = to_score.slice() * FORM::ROWS + 16 * to_score.row_tile() + to_score.g() + i % 2 * 8;
                const int    key = 8 * (column0 + i / 2) + 2 * to_score.t();
                const float2 two = make_float2(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
                *reinterpret_cast<float2 *>(scores + row * SCORE_STRIDE + key) = two;
            }
        }
        if (FORM::IS_WIDE) {
            load_mask();
        }
        if (!FORM::tiles::FACTORS) {
            sees_ahead = sight.sees(lane_key, ahead);
        }
        __syncthreads();

        {
            const int my_row             = me.row();
            const int my_key             = me.key();
            float     x[FORM::LANE_KEYS] = {};
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
            row_state & row     = state_of(scores, my_row);
            const float maximum = row.maximum;
            float       largest = maximum;
#pragma unroll
            for (int i = 0; i < FORM::LANE_KEYS; ++i) {
                x[i] =
                    x[i] * (row.scale * cache.key_unit(my_key + i)) + LOG2_E * __half2float(__ushort_as_half(added[i]));
                x[i]    = tile.sees(my_key + i) ? x[i] : -INFINITY;
                largest = fmaxf(largest, x[i]);
            }
            largest = max_lanes<FORM::LANES_A_ROW>(largest);
            __syncwarp();  // the row's lanes have read its scores and state, which now change
            const float factor = largest == maximum ? 1.0f : exp2f(maximum - largest);
            const float offset = largest == -INFINITY ? 0.0f : largest;
            float       sum    = 0.0f;
#pragma unroll
            for (int k = 0; k < FORM::LANE_KEYS; k += 4) {
#pragma unroll
                for (int i = k; i < k + 4; ++i) {
                    x[i] = exp2f(x[i] - offset + FORM::WEIGHT_EXPONENT);  // the difference first: it is exact
                }
                sum += (x[k] + x[k + 1]) + (x[k + 2] + x[k + 3]);
#pragma unroll
                for (int i = k; i < k + 4; ++i) {
                    x[i] *= cache.key_weight(my_key + i);
                }
                if constexpr (FORM::IS_WIDE) {
                    *reinterpret_cast<uint2 *>(half_weights(scores, my_row) + my_key + k) =
                        make_uint2(pack<__half>(x[k], x[k + 1]), pack<__half>(x[k + 2], x[k + 3]));
                } else {
                    *reinterpret_cast<float4 *>(weights + my_row * SCORE_STRIDE + my_key + k) =
                        make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
                }
            }
            sum = sum_lanes<FORM::LANES_A_ROW>(sum);
            if (me.lane % FORM::LANES_A_ROW == 0) {
                row.rescale = factor * cache.unit_change();
                row.maximum = largest;
                row.sum     = row.sum * factor + sum;
            }
        }
        __syncthreads();

        const role<FORM> to_add(FORM::ROLES_AGAIN ? thread_again() : threadIdx.x);
        {
            float factor[GROUP_TILES][2];
            bool  same = true;
#pragma unroll
            for (int i = 0; i < GROUP_ROWS / 8; ++i) {
                factor[i / 2][i % 2] = state_of(scores, to_add.group() * GROUP_ROWS + 8 * i + to_add.g()).rescale;
                same                 = same && factor[i / 2][i % 2] == 1.0f;
            }
            if (!__all_sync(ALL_LANES, same)) {
#pragma unroll
                for (int i = 0; i < GROUP_TILES * FORM::VALUE_COLUMNS * 4; ++i) {
                    out[i / 4 / GROUP_TILES][i / 4 % GROUP_TILES][i % 4] *= factor[i / 4 % GROUP_TILES][i / 2 % 2];
                }
            }
        }
        if constexpr (FORM::IS_WIDE) {
            add_values_wide<FORM>(out, scores + to_add.group() * GROUP_ROWS * SCORE_STRIDE, cache, to_add.value0());
        } else {
            add_values<FORM>(out, weights, cache, to_add.value0());
        }
        tile = next;
        next = sight.next(next.key + TILE_KEYS, sees_ahead);
    }

    const int64_t first_row = static_cast<int64_t>(s) * plan.n_rows + row0;
    const int64_t all_rows  = static_cast<int64_t>(args.n_streams) * plan.n_rows;
    const bool    whole     = plan.n_pieces == 1;
    __syncthreads();
    if (const int i = threadIdx.x; !whole && i < n_rows) {
        const row_state & row                              = state_of(scores, i);
        partials.max_sum[piece * all_rows + first_row + i] = make_float2(row.maximum, row.sum);
    }
    const float unit = cache.inverse_unit() * power_of_two(127 + tiles::QUANT_BITS);
    float *     to   = whole ? args.out : partials.out + piece * all_rows * N_LATENT;
#pragma unroll
    for (int i = 0; i < GROUP_ROWS / 8; ++i) {
        const int row = me.group() * GROUP_ROWS + 8 * i + me.g();
        if (row < n_rows) {
            const float sum    = state_of(scores, row).sum;
            const float factor = (!whole ? 1.0f : sum == 0.0f ? 0.0f : 1.0f / sum) * unit;
#pragma unroll
            for (int column = 0; column < FORM::VALUE_COLUMNS; ++column) {
                const float * x = out[column][i / 2] + i % 2 * 2;
                *reinterpret_cast<float2 *>(to + (first_row + row) * N_LATENT + me.value0() + 8 * column + 2 * me.t()) =
                    make_float2(x[0] * factor, x[1] * factor);
            }
        }
    }
}

}  // namespace latent_cuda
