// Latent attention, absorbed form: FLASH_ATTN_EXT with one KV head and V the beginning of K.
//
// All heads of all queries see the same keys, so the rows of the computation are (query, head) pairs, head fastest, as
// in the result. They are processed in blocks; a block loops over tiles of keys, and every tile is read and converted
// to float32 once for the whole block:
//   scores^T [keys][rows]  = tile [keys][DK]  *  q^T [DK][rows]
//   out      [rows][DV]    = out * rescale  +  weights [rows][keys]  *  tile [keys][DV]
// A block has the queries of one sequence if the node has an order of the keys (Keys in latent-tile.h).
//
// The keys are split at fixed numbers of keys. Each split starts with empty sums, and the sums of the splits are added in
// order. So it does not matter to the result whether one thread computes all splits of a block, or, if there are few
// blocks, many threads one split each. Nor does it matter whether a task has all rows of a block: its tiles are those
// of the whole block.

#include "latent-attn.h"

#include "ggml-latent-attn.h"
#include "ggml-op-marks.h"
#include "latent-gemm.h"
#include "latent-int16.h"
#include "latent-softmax.h"
#include "latent-tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace latent;

namespace {

constexpr int64_t BLOCK_ROWS  = 64;
constexpr int64_t TILE_KEYS   = 64;
constexpr int64_t MIN_TASKS   = 32;   // splits are tasks if there are fewer blocks than this, ...
constexpr int64_t PER_THREAD  = 4;    // ... or than this for each thread, ...
constexpr int64_t MAX_SPLITS  = 512;  // ... and at most so many splits in all: each needs memory for its sums
constexpr int64_t MIN_ROWS    = 16;   // of a task
constexpr int64_t KEY_COST    = 8;    // reading and converting a key takes as long as so many rows
constexpr int64_t STEP_LATENT = 288;  // values of a row per step, so that this part of q^T stays in the L1 cache

// Splits of the keys: SPLITS_A_LEVEL splits of SPLIT_KEYS keys, then as many of twice the size, and so on.
constexpr int64_t SPLIT_KEYS     = 128;
constexpr int64_t SPLITS_A_LEVEL = 32;

int64_t first_key(int64_t split) {
    const int64_t size = SPLIT_KEYS << split / SPLITS_A_LEVEL;
    return SPLITS_A_LEVEL * (size - SPLIT_KEYS) + split % SPLITS_A_LEVEL * size;
}

int64_t count_splits(int64_t n_keys) {
    int64_t n = 1;
    while (first_key(n) < n_keys) {
        ++n;
    }
    return n;
}

// How a node is split into tasks, and the layout of its work buffer (in floats from the start of wdata).
struct Plan {
    int64_t dk, dv, n_keys;
    int64_t n_heads, n_queries, n_streams;
    int64_t n_groups;    // of queries, per stream; each has its own order of the keys
    int64_t n_rows;      // per group
    int64_t block_rows;  // of a task: BLOCK_ROWS or a part of them
    int64_t n_blocks;    // in all, of so many rows
    int64_t n_splits;    // of the keys; 1: all of a block are one task
    int64_t ld_tile;     // row stride of a tile, in floats
    bool    integer;     // uses integer matmuls, on a tile of quants

    // memory of one thread: either a tile of floats or the four arrays of quants; and if all keys are one task, q and
    // the sums
    int64_t at_q, at_q_scale, at_tile, at_codes, at_code_scales, at_code_pairs, at_room, at_scores, at_rescale, at_sums,
        at_total, thread_size;
    int64_t q_size;
    // the sums of a block: maximum, sum and out of each row
    int64_t at_sum, at_out, sums_size;

    int64_t n_tasks() const { return n_blocks * n_splits; }

    // threads that have a task
    int64_t n_busy(int64_t n_threads) const { return std::min(n_threads, n_tasks()); }

    int64_t blocks_a_group() const { return n_blocks / (n_streams * n_groups); }
};

// Some rows of the computation, and the queries that determine their tiles.
struct Block {
    int64_t stream;
    int64_t group;  // in all streams
    int64_t row0;   // (query, head) in the stream
    int64_t n_rows;
    int64_t query0, query1;
};

Block block_of(const Plan & p, int64_t i) {
    const int64_t group  = i / p.blocks_a_group();
    const int64_t first  = i % p.blocks_a_group() * p.block_rows;  // in the group
    const int64_t before = group % p.n_groups * p.n_rows;          // rows of other groups
    const int64_t whole0 = first / BLOCK_ROWS * BLOCK_ROWS;
    const int64_t whole1 = std::min(p.n_rows, whole0 + BLOCK_ROWS);
    return { group / p.n_groups,
             group,
             before + first,
             std::min(p.block_rows, p.n_rows - first),
             (before + whole0) / p.n_heads,
             (before + whole1 - 1) / p.n_heads + 1 };
}

const ggml_tensor * order_of(const ggml_tensor * dst) {
    return dst->src[GGML_LATENT_ORDER_SRC];
}

// Sets the rows of a task: fewer if the longest task would take longer than its share of the threads' time.
void divide_rows(Plan & p, int64_t n_splits, int n_threads) {
    const int64_t longest = std::min(p.n_keys, first_key(n_splits) - first_key(n_splits - 1));
    int64_t       least   = INT64_MAX;
    for (int64_t rows = BLOCK_ROWS; rows >= MIN_ROWS; rows /= 2) {
        const int64_t n_blocks = (p.n_rows + rows - 1) / rows * p.n_groups * p.n_streams;
        const int64_t cost     = std::min(rows, p.n_rows) + KEY_COST;  // per key
        const int64_t time     = std::max(longest * n_threads, p.n_keys * n_blocks) * cost;
        if (time < least) {
            least        = time;
            p.block_rows = rows;
            p.n_blocks   = n_blocks;
        }
    }
}

Plan make_plan(const ggml_tensor * dst, int n_threads) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    Plan p       = {};
    p.dk         = k->ne[0];
    p.dv         = v->ne[0];
    p.n_keys     = k->ne[1];
    p.n_queries  = q->ne[1];
    p.n_heads    = q->ne[2];
    p.n_streams  = q->ne[3];
    p.n_groups   = order_of(dst) ? order_of(dst)->ne[1] / p.n_streams : 1;
    p.n_rows     = p.n_queries / p.n_groups * p.n_heads;
    p.block_rows = BLOCK_ROWS;
    p.n_blocks   = (p.n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS * p.n_groups * p.n_streams;

    const int64_t n_splits = count_splits(p.n_keys);
    const bool    few      = p.n_blocks < std::max(MIN_TASKS, PER_THREAD * n_threads);
    p.n_splits             = few && p.n_blocks * n_splits <= MAX_SPLITS ? n_splits : 1;
    if (p.n_splits == n_splits) {
        divide_rows(p, n_splits, n_threads);
    }

    const int64_t rows = std::min(p.block_rows, pad_lanes(p.n_rows));
    p.ld_tile          = align(p.dk);
    p.integer          = has_int16(k->type) && p.dv % CODES_A_SCALE == 0;

    Layout        room;
    const int64_t floats   = p.integer ? 0 : 1;
    const int64_t integers = p.integer ? 1 : 0;
    const int64_t whole    = p.n_splits > 1 ? 0 : 1;
    Layout        q_room;
    q_room.add(p.integer ? p.dk / 2 * rows : p.dk * rows);
    p.at_q_scale     = q_room.add(integers * rows);
    p.q_size         = q_room.size;
    p.at_q           = room.add(whole * p.q_size);
    p.at_tile        = room.add(floats * TILE_KEYS * p.ld_tile);
    p.at_codes       = room.add(integers * TILE_KEYS * p.dk / 2);
    p.at_code_scales = room.add(integers * TILE_KEYS * p.dk / CODES_A_SCALE);
    p.at_code_pairs  = room.add(integers * p.dv / CODES_A_SCALE * CodeTile::PAIRS);
    p.at_room        = room.add(integers * ROOM_PER_COLUMN * rows);
    p.at_scores      = room.add(TILE_KEYS * rows);
    p.at_rescale     = room.add(rows);
    Layout sums;
    sums.add(rows);  // maximum
    p.at_sum      = sums.add(rows);
    p.at_out      = sums.add(rows * p.dv);
    p.sums_size   = sums.size;
    p.at_sums     = room.add(whole * p.sums_size);
    p.at_total    = room.add(whole * p.sums_size);
    p.thread_size = room.size;
    return p;
}

size_t work_size(const Plan & p, int n_threads) {
    const int64_t shared = p.n_splits > 1 ? p.n_tasks() * p.sums_size + p.n_blocks * p.q_size : 0;
    return (p.n_busy(n_threads) * p.thread_size + shared + ALIGN) * sizeof(float);
}

bool shapes_fit(const ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];

    const float max_bias      = ggml_get_op_params_f32(dst, 1);
    const float logit_softcap = ggml_get_op_params_f32(dst, 2);

    return q->type == GGML_TYPE_F32 && k->type == v->type && can_read_rows(k->type) &&                    //
           k->ne[2] == 1 && v->ne[2] == 1 && k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3] &&              //
           v->ne[0] <= k->ne[0] && v->ne[1] == k->ne[1] && v->ne[0] % LANES == 0 &&                       //
           (mask == nullptr || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1)) && sinks == nullptr &&  //
           max_bias == 0.0f && logit_softcap == 0.0f;
}

// Whether V has the address and the strides of K.
bool v_is_beginning_of_k(const ggml_tensor * k, const ggml_tensor * v) {
    return v->data == k->data && v->nb[0] == k->nb[0] && v->nb[1] == k->nb[1] && v->nb[3] == k->nb[3];
}

// Values [d0, d1) of q^T [DK][n_cols] of a block of rows, times the scale; columns after the block's rows are zero.
// INTEGER: pairs of neighbouring d rounded to 16 bits, and each row's scale, which includes the scale of the attention.
template <bool INTEGER>
void load_queries(
    const ggml_tensor * dst, const Plan & p, const Block & block, int64_t d0, int64_t d1, float * queries) {
    const float   scale  = ggml_get_op_params_f32(dst, 0);
    const int64_t n_rows = block.n_rows;
    const int64_t n_cols = pad_lanes(n_rows);
    const auto    row    = [&](int64_t i) {
        const int64_t j = block.row0 + i;
        return (const float *) row_of(dst->src[0], j / p.n_heads, j % p.n_heads, block.stream);
    };
    if constexpr (INTEGER) {
        int32_t * pairs  = (int32_t *) queries;
        float *   scales = queries + p.at_q_scale;
        for (int64_t col = 0; col < n_rows; ++col) {
            const float largest = round_pairs(row(col), p.dk, d0, d1, pairs + d0 / 2 * n_cols + col, n_cols);
            if (d0 == 0) {
                scales[col] = scale * largest / INT16_MAX;
            }
        }
        for (int64_t d = d0; d < d1; d += 2) {
            std::fill(pairs + d / 2 * n_cols + n_rows, pairs + (d / 2 + 1) * n_cols, 0);
        }
        if (d0 == 0) {
            std::fill(scales + n_rows, scales + n_cols, 0.0f);
        }
    } else {
        transpose_rows(row, n_rows, n_cols, d0, d1, scale, queries, n_cols);
    }
}

// Adds the mask to the scores of a tile, query by query.
void mask_scores(
    const Plan & p, const KeyTile & tile, const MaskRows & mask, const Block & block, int64_t n_cols, float * scores) {
    for (int64_t i = 0; i < mask.n_queries; ++i) {
        const int64_t row  = (block.query0 + i) * p.n_heads - block.row0;
        const int64_t col0 = std::max<int64_t>(0, row);
        const int64_t col1 = std::min(block.n_rows, row + p.n_heads);
        add_mask(tile, mask.row(i), col0, col1, n_cols, scores);
    }
}

// Rows are (query, head) pairs, head fastest, as in dst.
float * result_row(const ggml_tensor * dst, int64_t stream, int64_t row) {
    return (float *) row_of(dst, row, 0, stream);
}

// One block of rows (queries: its q^T) over the keys [begin, end). Writes the sums: maximum, sum, and out, which is only
// written if a key is visible.
template <bool INTEGER>
void attend(const ggml_tensor * dst,
            const Plan &        p,
            const Block &       block,
            const Keys &        all,
            int64_t             begin,
            int64_t             end,
            const float *       queries,
            float *             scratch,
            float *             sums) {
    const ggml_tensor * k = dst->src[1];

    const int64_t n_rows = block.n_rows;
    const int64_t n_cols = pad_lanes(n_rows);

    float * keys    = scratch + p.at_tile;
    float * scores  = scratch + p.at_scores;
    float * rescale = scratch + p.at_rescale;
    float * maximum = sums;
    float * sum     = sums + p.at_sum;
    float * out     = sums + p.at_out;

    CodeTile codes = { p.dk,
                       p.dv,
                       (int16_t *) (scratch + p.at_codes),
                       scratch + p.at_code_scales,
                       (int32_t *) (scratch + p.at_code_pairs),
                       scratch + p.at_room,
                       0 };

    std::fill(maximum, maximum + n_cols, -INFINITY);
    std::fill(sum, sum + n_cols, 0.0f);

    const MaskRows masks  = mask_rows(dst->src[3], block.stream, block.query0, block.query1 - block.query0);
    const char *   k_data = row_of(k, 0, 0, block.stream);

    KeyTile tile;
    bool    first = true;  // `out` is still empty
    for (int64_t key = begin; key < end;) {
        key = next_tile(masks, all, nullptr, key, end, TILE_KEYS, tile);
        if (tile.n_keys == 0) {
            continue;
        }
        const char * next  = k_data + (key < end ? all.cell(key) : 0) * k->nb[1];
        Ahead        ahead = { next, next + std::min(TILE_KEYS, end - key) * k->nb[1] };
        if constexpr (INTEGER) {
            read_codes(tile, k->type, k_data, k->nb[1], codes);
            score_int16(n_cols, codes, (const int32_t *) queries, queries + p.at_q_scale, scores);
            isolate_keys(tile.n_keys, p.dv / CODES_A_SCALE, codes.n_scales(), codes.scales, n_cols, scores);
        } else {
            read_rows(tile, k->type, k_data, k->nb[1], p.dk, keys, p.ld_tile);
            multiply_in_steps({ tile.n_keys, n_cols, p.dk, keys, p.ld_tile, 1, in_rows(queries, n_cols),
                                in_rows(scores, n_cols), nullptr, &ahead },
                              STEP_LATENT);
            isolate_keys(tile.n_keys, p.dv, p.ld_tile, keys, n_cols, scores);
        }
        if (tile.masked) {
            mask_scores(p, tile, masks, block, n_cols, scores);
        }
        softmax_tile(tile.n_keys, n_cols, scores, maximum, sum, rescale);

        if constexpr (INTEGER) {
            add_values_int16(n_rows, codes, scores, first ? nullptr : rescale, ahead, out);
        } else {
            const Matrix<const float> rows   = in_rows((const float *) keys, p.ld_tile);
            const Product             values = { n_rows, p.dv, tile.n_keys,        scores,  1,
                                                 n_cols, rows, in_rows(out, p.dv), rescale, &ahead };
            if (first) {
                multiply<Accumulate::NONE>(values);
            } else {
                multiply<Accumulate::SCALE>(values);
            }
        }
        first = false;
    }
}

// Adds the sums of row i of a split to those of the splits before it.
void add_split(const Plan & p, const float * split, int64_t i, float * total) {
    if (split[p.at_sum + i] == 0.0f) {
        return;
    }
    const float * more = split + p.at_out + i * p.dv;
    float *       out  = total + p.at_out + i * p.dv;
    if (total[p.at_sum + i] == 0.0f) {
        total[i]            = split[i];
        total[p.at_sum + i] = split[p.at_sum + i];
        std::copy(more, more + p.dv, out);
        return;
    }
    const float maximum = std::max(total[i], split[i]);
    const float old     = expf(total[i] - maximum);
    const float added   = expf(split[i] - maximum);
    const vf    sum = v_fma(v_set(split[p.at_sum + i]), v_set(added), v_mul(v_set(total[p.at_sum + i]), v_set(old)));
    total[i]        = maximum;
    float lanes[LANES];
    v_store(lanes, sum);
    total[p.at_sum + i] = lanes[0];
    for (int64_t d = 0; d < p.dv; d += LANES) {
        v_store(out + d, v_fma(v_load(more + d), v_set(added), v_mul(v_load(out + d), v_set(old))));
    }
}

void write_sums(const ggml_tensor * dst, const Plan & p, const Block & block, int64_t i, const float * total) {
    if (total[p.at_sum + i] == 0.0f) {  // out was not written
        float * result = result_row(dst, block.stream, block.row0 + i);
        std::fill(result, result + p.dv, 0.0f);
        return;
    }
    write_row(total + p.at_out + i * p.dv, total[p.at_sum + i], p.dv, result_row(dst, block.stream, block.row0 + i));
}

// One block over all its keys.
template <bool INTEGER>
void attend_all(const ggml_tensor * dst, const Plan & p, const Block & block, const float * queries, float * scratch) {
    const Keys keys  = keys_of(order_of(dst), block.group, p.n_keys);
    float *    total = scratch + p.at_total;
    float *    sums  = scratch + p.at_sums;
    attend<INTEGER>(dst, p, block, keys, 0, std::min(keys.n, first_key(1)), queries, scratch, total);
    for (int64_t split = 1; first_key(split) < keys.n; ++split) {
        attend<INTEGER>(dst, p, block, keys, first_key(split), std::min(keys.n, first_key(split + 1)), queries, scratch,
                        sums);
        for (int64_t i = 0; i < block.n_rows; ++i) {
            add_split(p, sums, i, total);
        }
    }
    for (int64_t i = 0; i < block.n_rows; ++i) {
        write_sums(dst, p, block, i, total);
    }
}

template <bool INTEGER> void compute(const ggml_compute_params * params, const ggml_tensor * dst, const Plan & p) {
    float * work    = (float *) (((uintptr_t) params->wdata + 63) / 64 * 64);
    float * scratch = work + params->ith * p.thread_size;
    float * sums    = work + p.n_busy(params->nth) * p.thread_size;
    float * queries = sums + p.n_tasks() * p.sums_size;  // common to all threads, like the sums of the splits

    const bool splits = p.n_splits > 1;
    if (splits) {
        const int64_t d0 = p.dk / 2 * params->ith / params->nth * 2;
        const int64_t d1 = params->ith + 1 == params->nth ? p.dk : p.dk / 2 * (params->ith + 1) / params->nth * 2;
        for (int64_t i = 0; i < p.n_blocks; ++i) {
            load_queries<INTEGER>(dst, p, block_of(p, i), d0, d1, queries + i * p.q_size);
        }
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    for (int64_t task = params->ith; task < p.n_tasks(); task = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t i     = task % p.n_blocks;
        const Block   block = block_of(p, i);
        if (splits) {
            const int64_t split = p.n_splits - 1 - task / p.n_blocks;  // the longest first
            const Keys    keys  = keys_of(order_of(dst), block.group, p.n_keys);
            attend<INTEGER>(dst, p, block, keys, first_key(split), std::min(keys.n, first_key(split + 1)),
                            queries + i * p.q_size, scratch, sums + (i * p.n_splits + split) * p.sums_size);
        } else {
            load_queries<INTEGER>(dst, p, block, 0, p.dk, scratch + p.at_q);
            attend_all<INTEGER>(dst, p, block, scratch + p.at_q, scratch);
        }
    }

    if (splits) {
        ggml_barrier(params->threadpool);
        for (int64_t i = params->ith; i < p.n_blocks * p.block_rows; i += params->nth) {
            const Block   block = block_of(p, i / p.block_rows);
            const int64_t row   = i % p.block_rows;
            float *       total = sums + i / p.block_rows * p.n_splits * p.sums_size;  // the first split
            if (row < block.n_rows) {
                for (int64_t split = 1; split < p.n_splits; ++split) {
                    add_split(p, total + split * p.sums_size, row, total);
                }
                write_sums(dst, p, block, row, total);
            }
        }
    }
}

}  // namespace

size_t ggml_latent_absorbed_work_size(const ggml_tensor * dst, int n_tasks) {
    return shapes_fit(dst) ? work_size(make_plan(dst, n_tasks), n_tasks) : 0;
}

bool ggml_compute_forward_latent_absorbed(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || ggml_op_has_mark(dst, GGML_OP_MARK_UPSTREAM) || !shapes_fit(dst) ||
        !v_is_beginning_of_k(dst->src[1], dst->src[2])) {
        return false;
    }
    // OpenMP may start fewer threads than planned, whose own plan requires more memory; any number can follow any plan
    int  n_threads = params->nth;
    Plan p         = make_plan(dst, n_threads);
    while (work_size(p, params->nth) > params->wsize) {
        GGML_ASSERT(n_threads < GGML_MAX_N_THREADS);
        p = make_plan(dst, ++n_threads);
    }

    if constexpr (LATENT_INT16) {
        if (p.integer) {
            compute<true>(params, dst, p);
            return true;
        }
    }
    compute<false>(params, dst, p);
    return true;
}
