// Latent attention, decompressed form: the operator LATENT_ATTN.
//
// A task is one head of one stream, or some blocks of its queries if there are more threads than heads; such tasks all
// expand the same keys, and the result is bit-identical for any number of threads. The head's weights are converted to float32
// once, by the task or, if there are several per head, before all tasks. Then a task loops over tiles of keys. For each
// tile visible to its queries it computes
//   k_nope [keys][NOPE] = latent [keys][LATENT] * k_b [LATENT][NOPE]      (k_rope is copied next to it)
//   value  [keys][DV]   = latent [keys][LATENT] * v_b^T [LATENT][DV]
// and the attention of all queries that see the tile, a block of queries at a time:
//   scores^T [keys][queries] = key [keys][DK] * q^T [DK][queries]
//   out      [queries][DV]   = out * rescale + weights [queries][keys] * value [keys][DV]
// All in float32. With `pairs`, weights and value are rounded to 16-bit integers for the last matmul (latent-pairs.h).

#include "ggml-latent-attn.h"
#include "ggml-op-marks.h"
#include "latent-attn.h"
#include "latent-gemm.h"
#include "latent-pairs.h"
#include "latent-reference.h"
#include "latent-softmax.h"
#include "latent-tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace latent;

namespace {

constexpr int64_t BLOCK_QUERIES = 64;
constexpr int64_t TILE_KEYS     = 128;
constexpr int64_t STEP_LATENT   = 128;                           // see multiply_in_steps
constexpr int64_t ROWS_ONCE     = std::min<int64_t>(16, PANEL);  // rows of v_b transposed at a time

static_assert(BLOCK_QUERIES % PANEL == 0 && PANEL % ROWS_ONCE == 0);

// How a node is divided into tasks, and the layout of its work buffer, in floats.
struct Plan {
    ggml_latent_attn_shape s;
    int64_t                n_blocks;     // blocks of queries
    int64_t                task_blocks;  // of a task, at most
    int64_t                n_parts;      // tasks of a head
    int64_t                n_groups;     // groups of keys, see next_tile
    bool                   pairs;        // out is computed from weights and values as integers

    // memory of one thread
    int64_t at_rows, at_q, at_tile, at_key, at_value, at_scores, at_rescale, at_max, at_sum, at_out, thread_size;
    // in the same memory, if `pairs`: values and softmax weights, each with their units
    int64_t at_value_pairs, at_value_units, at_score_pairs, at_score_units;
    // both weights of a head: one for each thread, or, if a head has several tasks, one for each head
    int64_t at_v_b, at_v_b_units, weights_size;

    int64_t n_tasks() const { return s.n_streams * s.n_heads * n_parts; }

    // threads that have a task
    int64_t n_busy(int64_t n_threads) const { return std::min(n_threads, n_tasks()); }

    int64_t n_weights(int64_t n_threads) const { return n_parts > 1 ? s.n_heads : n_busy(n_threads); }
};

// Sets the blocks of a task to the number with the shortest time. Every task of a head expands the same keys.
void divide_queries(Plan & p, int n_threads) {
    const int64_t expand    = p.s.n_latent * (p.s.n_nope + p.s.n_value);  // multiplications per key
    const int64_t per_block = BLOCK_QUERIES * (p.s.n_key + p.s.n_value);
    int64_t       least     = INT64_MAX;
    for (int64_t blocks = p.n_blocks; blocks > 0; --blocks) {
        const int64_t parts  = (p.n_blocks + blocks - 1) / blocks;
        const int64_t rounds = (p.s.n_streams * p.s.n_heads * parts + n_threads - 1) / n_threads;
        const int64_t time   = rounds * (expand + blocks * per_block);
        if (time < least) {
            least         = time;
            p.task_blocks = blocks;
            p.n_parts     = parts;
        }
    }
}

Plan make_plan(const ggml_tensor * dst, int n_threads) {
    Plan p     = {};
    p.s        = ggml_latent_attn_get_shape(dst);
    p.n_blocks = (p.s.n_queries + BLOCK_QUERIES - 1) / BLOCK_QUERIES;
    p.n_groups = (p.s.n_keys + GROUP_KEYS - 1) / GROUP_KEYS;
    p.pairs    = has_pairs(dst->src[1]->type, p.s.n_latent) && !ggml_op_has_mark(dst, GGML_OP_MARK_EXACT);
    divide_queries(p, n_threads);
    const int64_t n = p.task_blocks * BLOCK_QUERIES;

    Layout room;
    p.at_rows    = room.add(std::max(ROWS_ONCE * p.s.n_latent, pad_panel(p.s.n_nope)));
    p.at_q       = room.add(p.s.n_key * n);
    p.at_tile    = room.add(TILE_KEYS * align(p.s.n_cache));
    p.at_key     = room.add(TILE_KEYS * align(p.s.n_key + LANES));
    p.at_value   = room.add(TILE_KEYS * pad_panel(p.s.n_value));
    p.at_scores  = room.add(TILE_KEYS * BLOCK_QUERIES);
    p.at_rescale = room.add(BLOCK_QUERIES);
    p.at_max     = room.add(n);
    p.at_sum     = room.add(n);
    p.at_out     = room.add(n * pad_lanes(p.s.n_value));
    if (p.pairs) {
        p.at_value_pairs = room.add(TILE_KEYS / 2 * pad_panel(p.s.n_value));
        p.at_value_units = room.add(2 * TILE_KEYS);
        p.at_score_pairs = room.add(TILE_KEYS / 2 * BLOCK_QUERIES);
        p.at_score_units = room.add(TILE_KEYS / SEGMENT_KEYS * BLOCK_QUERIES);
    }
    p.thread_size = room.size;
    Layout weights;
    weights.add(p.s.n_latent * pad_panel(p.s.n_nope));  // k_b
    p.at_v_b       = weights.add(p.s.n_latent * pad_panel(p.s.n_value));
    p.at_v_b_units = weights.add(p.pairs ? pad_panel(p.s.n_value) : 0);
    p.weights_size = weights.size;
    return p;
}

// k_b of one head as [LATENT][NOPE] in panels, one row at a time.
void load_k_b(const ggml_tensor * k_b, int64_t head, const Plan & p, float * row, float * dst) {
    std::fill(row, row + pad_panel(p.s.n_nope), 0.0f);
    for (int64_t j = 0; j < p.s.n_latent; ++j) {
        read_row(k_b->type, row_of(k_b, j, head), p.s.n_nope, row);
        for (int64_t i = 0; i < p.s.n_nope; i += PANEL) {
            std::copy(row + i, row + i + PANEL, dst + i * p.s.n_latent + j * PANEL);
        }
    }
}

// v_b of one head as [LATENT][DV] in panels: transposed, some rows at a time. With `pairs`, rows are normalised, their powers
// of two stored in `units`, and rows that are not finite are zeros with the unit NaN.
void load_v_b(
    const ggml_tensor * v_b, int64_t head, const Plan & p, float * rows, float * dst, [[maybe_unused]] float * units) {
    const auto row = [&](int64_t i) { return rows + i * p.s.n_latent; };
    for (int64_t i0 = 0; i0 < p.s.n_value; i0 += ROWS_ONCE) {
        const int64_t n = std::min(ROWS_ONCE, p.s.n_value - i0);
        for (int64_t i = 0; i < n; ++i) {
            read_row(v_b->type, row_of(v_b, i0 + i, head), p.s.n_latent, row(i));
#if LATENT_PAIRS
            if (p.pairs) {
                units[i0 + i] = magnitude(p.s.n_latent, row(i));
                if (std::isnan(units[i0 + i])) {
                    std::fill(row(i), row(i) + p.s.n_latent, 0.0f);
                }
            }
#endif
        }
        transpose_rows(row, n, pad_lanes(n), 0, p.s.n_latent, 1.0f,
                       dst + i0 / PANEL * PANEL * p.s.n_latent + i0 % PANEL, PANEL);
    }
#if LATENT_PAIRS
    if (p.pairs) {
        const int64_t n_cols = pad_lanes(p.s.n_value);
        std::fill(units + p.s.n_value, units + n_cols, 0.0f);
        normalise(p.s.n_latent, n_cols, in_panels(dst, p.s.n_latent), units);
    }
#endif
}

// One task.
struct Task {
    int64_t stream;
    int64_t head;
    int64_t query0, query1;  // query0 is the start of a block
};

// q^T of one head, times the scale: [DK][BLOCK_QUERIES] in panels for each block of queries; missing queries are zero.
void load_queries(const ggml_tensor * dst, const Task & task, const Plan & p, float * queries) {
    const ggml_tensor * q     = dst->src[0];
    const float         scale = ggml_get_op_params_f32(dst, 0);
    for (int64_t query0 = task.query0; query0 < task.query1; query0 += PANEL) {
        const auto row = [&](int64_t i) { return (const float *) row_of(q, query0 + i, task.head, task.stream); };
        transpose_rows(row, std::min(PANEL, task.query1 - query0), PANEL, 0, p.s.n_key, scale,
                       queries + (query0 - task.query0) * p.s.n_key, PANEL);
    }
}

MaskRows mask_of(const ggml_tensor * dst, int64_t stream) {
    return mask_rows(dst->src[4], stream, 0, dst->src[0]->ne[1]);
}

Keys keys_in(const ggml_tensor * dst, const Plan & p, int64_t stream) {
    return keys_of(dst->src[GGML_LATENT_ORDER_SRC], stream, p.s.n_keys);
}

#if LATENT_PAIRS
ValueUnits value_units(const Plan & p, float * scratch) {
    return { scratch + p.at_value_units, scratch + p.at_value_units + TILE_KEYS };
}
#endif

// Expands the tile's rows of the cache to keys [NOPE, ROPE] and, in panels, values of one head.
void expand(const Plan & p, int n_keys, const float * weights, float * scratch) {
    float *       latents   = scratch + p.at_tile;
    float *       keys      = scratch + p.at_key;
    float *       values    = scratch + p.at_value;
    const int64_t ld_latent = align(p.s.n_cache);
    const int64_t ld_key    = align(p.s.n_key + LANES);
    const auto    product   = [&](int64_t n_cols, const float * b, const Matrix<float> & c) {
        multiply_in_steps({ n_keys, pad_lanes(n_cols), p.s.n_latent, latents, ld_latent, 1, in_panels(b, p.s.n_latent),
                            c, nullptr, nullptr },
                          STEP_LATENT);
    };
    product(p.s.n_nope, weights, in_rows(keys, ld_key));
    isolate_keys(n_keys, p.s.n_latent, ld_latent, latents, ld_key, keys);  // with such keys, scores are NaN, too
    for (int i = 0; i < n_keys; ++i) {
        memcpy(keys + i * ld_key + p.s.n_nope, latents + i * ld_latent + p.s.n_latent,
               (p.s.n_key - p.s.n_nope) * sizeof(float));
    }
    product(p.s.n_value, weights + p.at_v_b, in_panels(values, TILE_KEYS));
#if LATENT_PAIRS
    if (p.pairs) {
        round_values(n_keys, pad_lanes(p.s.n_value), in_panels((const float *) values, TILE_KEYS),
                     in_panels((int32_t *) (scratch + p.at_value_pairs), TILE_KEYS / 2), value_units(p, scratch));
    }
#endif
}

// Adds softmax weights times values of a tile to the rows of a block.
void add_values(const Plan & p, int n_keys, int64_t n_queries, float * scratch, float * out) {
    const float * weights  = scratch + p.at_scores;
    const float * rescale  = scratch + p.at_rescale;
    const int64_t n_cols   = pad_lanes(n_queries);
    const int64_t ld_value = pad_lanes(p.s.n_value);
    if (!p.pairs) {
        multiply<Accumulate::SCALE>(Product{ n_queries, ld_value, n_keys, weights, 1, n_cols,
                                             in_panels((const float *) scratch + p.at_value, TILE_KEYS),
                                             in_rows(out, ld_value), rescale, nullptr });
        return;
    }
#if LATENT_PAIRS
    int32_t * pairs = (int32_t *) (scratch + p.at_score_pairs);
    float *   units = scratch + p.at_score_units;
    round_weights(n_keys, n_cols, weights, value_units(p, scratch), pairs, units);
    for (int key = 0; key < n_keys; key += SEGMENT_KEYS) {
        const int64_t     n_pairs = (std::min<int64_t>(SEGMENT_KEYS, n_keys - key) + 1) / 2;
        const PairProduct product = { n_queries,
                                      ld_value,
                                      n_pairs,
                                      pairs + key / 2 * n_cols,
                                      1,
                                      n_cols,
                                      in_panels((const int32_t *) (scratch + p.at_value_pairs) + key / 2 * PANEL,
                                                TILE_KEYS / 2),
                                      in_rows(out, ld_value),
                                      rescale,
                                      nullptr,
                                      units + key / SEGMENT_KEYS * n_cols };
        if (key == 0) {
            multiply<Accumulate::SCALE>(product);
        } else {
            multiply<Accumulate::ADD>(product);
        }
    }
#endif
}

// map: visibility of each group of keys for all queries of the task's stream; weights: those of the head.
void attend(const ggml_tensor * dst,
            const Plan &        p,
            const Task &        task,
            const View *        map,
            const float *       weights,
            float *             scratch) {
    const ggml_tensor * k = dst->src[1];

    float * queries = scratch + p.at_q;
    float * latents = scratch + p.at_tile;
    float * keys    = scratch + p.at_key;
    float * scores  = scratch + p.at_scores;
    float * rescale = scratch + p.at_rescale;
    float * maximum = scratch + p.at_max;
    float * sum     = scratch + p.at_sum;
    float * out     = scratch + p.at_out;

    const int64_t ld_key   = align(p.s.n_key + LANES);
    const int64_t ld_value = pad_lanes(p.s.n_value);
    const int64_t n_padded = p.task_blocks * BLOCK_QUERIES;

    load_queries(dst, task, p, queries);
    std::fill(maximum, maximum + n_padded, -INFINITY);
    std::fill(sum, sum + n_padded, 0.0f);
    std::fill(out, out + n_padded * ld_value, 0.0f);

    const MaskRows all      = mask_of(dst, task.stream);
    const Keys     all_keys = keys_in(dst, p, task.stream);
    const char *   cache    = row_of(k, 0, 0, task.stream);

    KeyTile tile;
    for (int64_t key = 0; key < all_keys.n;) {
        key = next_tile(all, all_keys, map, key, all_keys.n, TILE_KEYS, tile);
        if (tile.n_keys == 0) {
            continue;
        }
        bool expanded = false;
        for (int64_t query0 = task.query0; query0 < task.query1; query0 += BLOCK_QUERIES) {
            const int64_t n_queries = std::min(BLOCK_QUERIES, task.query1 - query0);
            const int64_t n_cols    = pad_lanes(n_queries);
            const int64_t at        = query0 - task.query0;

            const MaskRows some = { all.data + query0 * all.stride, all.stride, n_queries };
            const View     view = view_of(some, tile);
            if (view == View::CLOSED) {
                continue;
            }
            if (!expanded) {
                read_rows(tile, k->type, cache, k->nb[1], p.s.n_cache, latents, align(p.s.n_cache));
                expand(p, tile.n_keys, weights, scratch);
                expanded = true;
            }
            const float * q = queries + at * p.s.n_key;
            multiply<Accumulate::NONE>(Product{ tile.n_keys, n_cols, p.s.n_key, keys, ld_key, 1,
                                                in_panels(q, p.s.n_key), in_rows(scores, n_cols), nullptr, nullptr });
            for (int64_t i = 0; i < n_queries && view == View::MIXED; ++i) {
                add_mask(tile, some.row(i), i, i + 1, n_cols, scores);
            }
            softmax_tile(tile.n_keys, n_cols, scores, maximum + at, sum + at, rescale);
            add_values(p, tile.n_keys, n_queries, scratch, out + at * ld_value);
        }
    }

    for (int64_t i = 0; i < task.query1 - task.query0; ++i) {
        float * result = (float *) row_of(dst, task.head, task.query0 + i, task.stream);
        write_row(out + i * ld_value, sum[i], p.s.n_value, result);
        for (int64_t d = 0; p.pairs && sum[i] != 0.0f && d < p.s.n_value; ++d) {
            result[d] *= weights[p.at_v_b_units + d];
        }
    }
}

size_t work_size(const Plan & p, int n_threads) {
    const int64_t floats = p.n_busy(n_threads) * p.thread_size + p.n_weights(n_threads) * p.weights_size + ALIGN;
    return floats * sizeof(float) + p.s.n_streams * p.n_groups * sizeof(View);
}

}  // namespace

bool ggml_latent_attn_supported(const ggml_tensor * dst) {
    return can_read_rows(dst->src[1]->type) && can_read_rows(dst->src[2]->type) && can_read_rows(dst->src[3]->type);
}

size_t ggml_latent_attn_work_size(const ggml_tensor * dst, int n_tasks) {
    return std::max(work_size(make_plan(dst, n_tasks), n_tasks), reference_work_size(dst, n_tasks));
}

void ggml_compute_forward_latent_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref) {
        compute_reference(params, dst);
        return;
    }
    // OpenMP may start fewer threads than planned, whose own plan requires more memory; any number can follow any plan
    int  n_threads = params->nth;
    Plan p         = make_plan(dst, n_threads);
    while (work_size(p, params->nth) > params->wsize) {
        GGML_ASSERT(n_threads < GGML_MAX_N_THREADS);
        p = make_plan(dst, ++n_threads);
    }
    const int64_t n_busy  = p.n_busy(params->nth);
    float *       all     = (float *) (((uintptr_t) params->wdata + 63) / 64 * 64);
    float *       scratch = all + params->ith * p.thread_size;
    float *       weights = all + n_busy * p.thread_size;
    View *        map     = (View *) (weights + p.n_weights(params->nth) * p.weights_size);

    for (int64_t i = params->ith; i < p.s.n_streams * p.n_groups; i += params->nth) {
        const Keys    keys = keys_in(dst, p, i / p.n_groups);
        const int64_t key  = i % p.n_groups * GROUP_KEYS;
        if (key < keys.n) {
            map[i] = view_of(mask_of(dst, i / p.n_groups), keys, key, std::min(GROUP_KEYS, keys.n - key));
        }
    }
    const auto load = [&](int64_t head, bool values, float * to) {
        if (values) {
            load_v_b(dst->src[3], head, p, scratch + p.at_rows, to + p.at_v_b, to + p.at_v_b_units);
        } else {
            load_k_b(dst->src[2], head, p, scratch + p.at_rows, to);
        }
    };
    if (p.n_parts > 1 && params->ith < n_busy) {
        for (int64_t i = params->ith; i < 2 * p.s.n_heads; i += n_busy) {
            load(i / 2, i % 2 == 1, weights + i / 2 * p.weights_size);
        }
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    for (int64_t i = params->ith; i < p.n_tasks(); i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t head         = i / p.n_parts % p.s.n_heads;
        const int64_t query0       = i % p.n_parts * p.task_blocks * BLOCK_QUERIES;
        const int64_t query1       = std::min(p.s.n_queries, query0 + p.task_blocks * BLOCK_QUERIES);
        const Task    task         = { i / p.n_parts / p.s.n_heads, head, query0, query1 };
        float *       head_weights = weights + (p.n_parts > 1 ? head : params->ith) * p.weights_size;
        if (p.n_parts == 1) {
            load(head, false, head_weights);
            load(head, true, head_weights);
        }
        attend(dst, p, task, map + task.stream * p.n_groups, head_weights, scratch);
    }
}
