// Latent attention, absorbed form: FLASH_ATTN_EXT with one KV head and V the beginning of K.
//
// All heads of all queries see the same keys, so the rows of the computation are (query, head) pairs, head fastest, as
// in the result. They are processed in blocks; a block loops over tiles of keys, and every tile is read and converted
// to float32 once for the whole block:
//   scores^T [keys][rows]  = tile [keys][DK]  *  q^T [DK][rows]
//   out      [rows][DV]    = out * rescale  +  weights [rows][keys]  *  tile [keys][DV]
// If there are too few blocks for many threads, the keys are split and the partial results are combined in a second
// pass. Number and borders of the splits depend on the shapes only, and so does the result.

#include "latent-attn.h"

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
constexpr int64_t MIN_TASKS   = 32;   // the keys are split if there are fewer blocks than this
constexpr int64_t STEP_LATENT = 288;  // values of a row per step, so that this part of q^T stays in the L1 cache

// How a node is split into tasks, and the layout of its work buffer (in floats from the start of wdata).
struct Plan {
    int64_t dk, dv, n_keys;
    int64_t n_heads, n_queries, n_streams;
    int64_t n_rows;    // per stream
    int64_t n_blocks;  // per stream
    int64_t n_pieces;  // splits of the keys
    int64_t keys_a_piece;
    int64_t ld_tile;  // row stride of a tile, in floats
    bool    integer;  // uses integer matmuls, on a tile of quants

    // memory of one thread: either a tile of floats or the four arrays of quants
    int64_t at_q, at_q_scale, at_tile, at_codes, at_code_scales, at_code_pairs, at_room, at_scores, at_rescale, at_max,
        at_sum, at_out, thread_size;
    int64_t q_size;
    // size of one partial result: max, sum, out
    int64_t partial_size;

    int64_t n_tasks() const { return n_streams * n_blocks * n_pieces; }
};

Plan make_plan(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    Plan p      = {};
    p.dk        = k->ne[0];
    p.dv        = v->ne[0];
    p.n_keys    = k->ne[1];
    p.n_queries = q->ne[1];
    p.n_heads   = q->ne[2];
    p.n_streams = q->ne[3];
    p.n_rows    = p.n_queries * p.n_heads;
    p.n_blocks  = (p.n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;

    const int64_t n_tiles = (p.n_keys + TILE_KEYS - 1) / TILE_KEYS;
    const int64_t target  = (MIN_TASKS + p.n_blocks * p.n_streams - 1) / (p.n_blocks * p.n_streams);
    const int64_t tiles   = std::max<int64_t>(1, (n_tiles + target - 1) / target);
    p.keys_a_piece        = tiles * TILE_KEYS;
    p.n_pieces            = std::max<int64_t>(1, (n_tiles + tiles - 1) / tiles);

    const int64_t rows = std::min(BLOCK_ROWS, pad_lanes(p.n_rows));
    p.ld_tile          = align(p.dk);
    p.integer          = has_int16(k->type) && p.dv % CODES_A_SCALE == 0;

    Layout        room;
    const int64_t floats   = p.integer ? 0 : 1;
    const int64_t integers = p.integer ? 1 : 0;
    p.at_q                 = room.add(p.integer ? p.dk / 2 * rows : p.dk * rows);
    p.at_q_scale           = room.add(integers * rows);
    p.q_size               = room.size;
    p.at_tile              = room.add(floats * TILE_KEYS * p.ld_tile);
    p.at_codes             = room.add(integers * TILE_KEYS * p.dk / 2);
    p.at_code_scales       = room.add(integers * TILE_KEYS * p.dk / CODES_A_SCALE);
    p.at_code_pairs        = room.add(integers * p.dv / CODES_A_SCALE * CodeTile::PAIRS);
    p.at_room              = room.add(integers * ROOM_PER_COLUMN * rows);
    p.at_scores            = room.add(TILE_KEYS * rows);
    p.at_rescale           = room.add(rows);
    p.at_max               = room.add(rows);
    p.at_sum               = room.add(rows);
    p.at_out               = room.add(rows * p.dv);
    p.partial_size         = room.size - p.at_max;
    p.thread_size          = room.size;
    return p;
}

size_t work_size(const Plan & p, int n_tasks) {
    const int64_t shared = p.n_pieces > 1 ? p.n_tasks() * p.partial_size + p.n_streams * p.n_blocks * p.q_size : 0;
    return (n_tasks * p.thread_size + shared + ALIGN) * sizeof(float);
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

int64_t rows_of_block(const Plan & p, int64_t block) {
    return std::min(BLOCK_ROWS, p.n_rows - block * BLOCK_ROWS);
}

// Values [d0, d1) of q^T [DK][n_cols] of a block of rows, times the scale; columns after the block's rows are zero.
// INTEGER: pairs of neighbouring d rounded to 16 bits, and each row's scale, which includes the scale of the attention.
template <bool INTEGER>
void load_queries(
    const ggml_tensor * dst, const Plan & p, int64_t stream, int64_t block, int64_t d0, int64_t d1, float * queries) {
    const float   scale  = ggml_get_op_params_f32(dst, 0);
    const int64_t n_rows = rows_of_block(p, block);
    const int64_t n_cols = pad_lanes(n_rows);
    const auto    row    = [&](int64_t i) {
        const int64_t j = block * BLOCK_ROWS + i;
        return (const float *) row_of(dst->src[0], j / p.n_heads, j % p.n_heads, stream);
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
void mask_scores(const Plan &     p,
                 const KeyTile &  tile,
                 const MaskRows & mask,
                 int64_t          row0,
                 int64_t          n_rows,
                 int64_t          n_cols,
                 float *          scores) {
    const int64_t query0 = row0 / p.n_heads;
    for (int64_t i = 0; i < mask.n_queries; ++i) {
        const int64_t col0 = std::max<int64_t>(0, (query0 + i) * p.n_heads - row0);
        const int64_t col1 = std::min(n_rows, (query0 + i + 1) * p.n_heads - row0);
        add_mask(tile, mask.row(i), col0, col1, n_cols, scores);
    }
}

// Rows are (query, head) pairs, head fastest, as in dst.
float * result_row(const ggml_tensor * dst, int64_t stream, int64_t row) {
    return (float *) row_of(dst, row, 0, stream);
}

// One block of rows (queries: its q^T) over one split of the keys. The sums are written to `partial` (max, sum, out)
// or, if the keys are not split, the result is written to dst.
template <bool INTEGER>
void attend(const ggml_tensor * dst,
            const Plan &        p,
            int64_t             stream,
            int64_t             block,
            int64_t             piece,
            const float *       queries,
            float *             own,
            float *             partial) {
    const ggml_tensor * k = dst->src[1];

    const int64_t row0   = block * BLOCK_ROWS;
    const int64_t n_rows = rows_of_block(p, block);
    const int64_t n_cols = pad_lanes(n_rows);
    const int64_t query0 = row0 / p.n_heads;
    const int64_t query1 = (row0 + n_rows - 1) / p.n_heads + 1;

    float * keys    = own + p.at_tile;
    float * scores  = own + p.at_scores;
    float * rescale = own + p.at_rescale;
    float * maximum = partial;
    float * sum     = partial + (p.at_sum - p.at_max);
    float * out     = partial + (p.at_out - p.at_max);

    CodeTile codes = { p.dk,
                       p.dv,
                       (int16_t *) (own + p.at_codes),
                       own + p.at_code_scales,
                       (int32_t *) (own + p.at_code_pairs),
                       own + p.at_room,
                       0 };

    std::fill(maximum, maximum + n_cols, -INFINITY);
    std::fill(sum, sum + n_cols, 0.0f);

    const MaskRows masks  = mask_rows(dst->src[3], stream, query0, query1 - query0);
    const char *   k_data = row_of(k, 0, 0, stream);
    const int64_t  end    = std::min(p.n_keys, (piece + 1) * p.keys_a_piece);

    KeyTile tile;
    bool    first = true;  // `out` is still empty
    for (int64_t key = piece * p.keys_a_piece; key < end;) {
        key = next_tile(masks, nullptr, key, end, TILE_KEYS, tile);
        if (tile.n_keys == 0) {
            continue;
        }
        Ahead ahead = { k_data + key * k->nb[1], k_data + std::min(end, key + TILE_KEYS) * k->nb[1] };
        if constexpr (INTEGER) {
            read_codes(tile, k->type, k_data, k->nb[1], codes);
            score_int16(n_cols, codes, (const int32_t *) queries, queries + p.at_q_scale, scores);
        } else {
            read_rows(tile, k->type, k_data, k->nb[1], p.dk, keys, p.ld_tile);
            multiply_in_steps(
                { tile.n_keys, n_cols, p.dk, keys, p.ld_tile, 1, queries, n_cols, scores, n_cols, nullptr, &ahead },
                STEP_LATENT);
        }
        if (tile.masked) {
            mask_scores(p, tile, masks, row0, n_rows, n_cols, scores);
        }
        softmax_tile(tile.n_keys, n_cols, scores, maximum, sum, rescale);

        if constexpr (INTEGER) {
            add_values_int16(n_rows, codes, scores, first ? nullptr : rescale, ahead, out);
        } else {
            const Product values = { n_rows, p.dv,      tile.n_keys, scores, 1,       n_cols,
                                     keys,   p.ld_tile, out,         p.dv,   rescale, &ahead };
            if (first) {
                multiply<Accumulate::NONE>(values);
            } else {
                multiply<Accumulate::SCALE>(values);
            }
        }
        first = false;
    }
    if (first) {
        std::fill(out, out + n_rows * p.dv, 0.0f);
    }

    if (p.n_pieces == 1) {
        for (int64_t i = 0; i < n_rows; ++i) {
            write_row(out + i * p.dv, sum[i], p.dv, result_row(dst, stream, row0 + i));
        }
    }
}

// Combines the splits of one row, in order.
void join(const ggml_tensor * dst, const Plan & p, int64_t stream, int64_t row, const float * partials, float * out) {
    const int64_t block = row / BLOCK_ROWS;
    const int64_t i     = row % BLOCK_ROWS;
    const float * first = partials + (stream * p.n_blocks + block) * p.n_pieces * p.partial_size;

    float maximum = -INFINITY;
    for (int64_t piece = 0; piece < p.n_pieces; ++piece) {
        maximum = std::max(maximum, first[piece * p.partial_size + i]);
    }
    float sum = 0.0f;
    std::fill(out, out + p.dv, 0.0f);
    for (int64_t piece = 0; piece < p.n_pieces; ++piece) {
        const float * part = first + piece * p.partial_size;
        if (part[i] == -INFINITY) {
            continue;
        }
        const float   factor   = expf(part[i] - maximum);
        const float * part_out = part + (p.at_out - p.at_max) + i * p.dv;
        sum += factor * part[p.at_sum - p.at_max + i];
        for (int64_t d = 0; d < p.dv; ++d) {
            out[d] += factor * part_out[d];
        }
    }
    write_row(out, sum, p.dv, result_row(dst, stream, row));
}

template <bool INTEGER> void compute(const ggml_compute_params * params, const ggml_tensor * dst, const Plan & p) {
    float * work     = (float *) (((uintptr_t) params->wdata + 63) / 64 * 64);
    float * own      = work + params->ith * p.thread_size;
    float * partials = work + params->nth * p.thread_size;
    float * queries  = partials + p.n_tasks() * p.partial_size;  // common to all threads, like the partial results

    const bool in_pieces = p.n_pieces > 1;
    if (in_pieces) {
        const int64_t d0 = p.dk / 2 * params->ith / params->nth * 2;
        const int64_t d1 = params->ith + 1 == params->nth ? p.dk : p.dk / 2 * (params->ith + 1) / params->nth * 2;
        for (int64_t i = 0; i < p.n_streams * p.n_blocks; ++i) {
            load_queries<INTEGER>(dst, p, i / p.n_blocks, i % p.n_blocks, d0, d1, queries + i * p.q_size);
        }
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    for (int64_t task = params->ith; task < p.n_tasks(); task = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t i      = task / p.n_pieces;
        const int64_t stream = i / p.n_blocks;
        const int64_t block  = i % p.n_blocks;
        if (in_pieces) {
            attend<INTEGER>(dst, p, stream, block, task % p.n_pieces, queries + i * p.q_size, own,
                            partials + task * p.partial_size);
        } else {
            load_queries<INTEGER>(dst, p, stream, block, 0, p.dk, own + p.at_q);
            attend<INTEGER>(dst, p, stream, block, 0, own + p.at_q, own, own + p.at_max);
        }
    }

    if (in_pieces) {
        ggml_barrier(params->threadpool);
        for (int64_t row = params->ith; row < p.n_streams * p.n_rows; row += params->nth) {
            join(dst, p, row / p.n_rows, row % p.n_rows, partials, own + p.at_out);
        }
    }
}

}  // namespace

size_t ggml_latent_absorbed_work_size(const ggml_tensor * dst, int n_tasks) {
    return shapes_fit(dst) ? work_size(make_plan(dst), n_tasks) : 0;
}

bool ggml_compute_forward_latent_absorbed(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || ggml_op_has_mark(dst, GGML_OP_MARK_UPSTREAM) || !shapes_fit(dst) ||
        !v_is_beginning_of_k(dst->src[1], dst->src[2])) {
        return false;
    }
    const Plan p = make_plan(dst);
    GGML_ASSERT(params->wsize >= work_size(p, params->nth));

    if constexpr (HAS_INT16) {
        if (p.integer) {
            compute<true>(params, dst, p);
            return true;
        }
    }
    compute<false>(params, dst, p);
    return true;
}
