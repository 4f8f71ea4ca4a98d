// Latent attention, decompressed form: the operator LATENT_ATTN.
//
// A task is one head of one stream, or some blocks of its queries if there are more threads than heads; such tasks
// expand the same keys, but compute what one thread would, bit for bit. A task converts the head's weights to float32
// once, then loops over tiles of keys. For each tile visible to its queries it computes
//   k_nope [keys][NOPE] = latent [keys][LATENT] * k_b [LATENT][NOPE]      (k_rope is copied next to it)
//   value  [keys][DV]   = latent [keys][LATENT] * v_b^T [LATENT][DV]
// and the attention of all queries that see the tile, a block of queries at a time:
//   scores^T [keys][queries] = key [keys][DK] * q^T [DK][queries]
//   out      [queries][DV]   = out * rescale + weights [queries][keys] * value [keys][DV]

#include "ggml-latent-attn.h"
#include "latent-attn.h"
#include "latent-gemm.h"
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
constexpr int64_t STEP_LATENT   = 128;  // see multiply_in_steps
constexpr int64_t ROWS_ONCE     = 16;   // rows of v_b transposed at a time

// The layout of one thread's work buffer, in floats.
struct Plan {
    ggml_latent_attn_shape s;
    int64_t                n_blocks;  // blocks of queries
    int64_t                n_groups;  // groups of keys, see next_tile
    int64_t at_k_b, at_v_b, at_rows, at_q, at_tile, at_key, at_value, at_scores, at_rescale, at_max, at_sum, at_out;
    int64_t thread_size;
};

Plan make_plan(const ggml_tensor * dst) {
    Plan p          = {};
    p.s             = ggml_latent_attn_get_shape(dst);
    p.n_blocks      = (p.s.n_queries + BLOCK_QUERIES - 1) / BLOCK_QUERIES;
    p.n_groups      = (p.s.n_keys + GROUP_KEYS - 1) / GROUP_KEYS;
    const int64_t n = p.n_blocks * BLOCK_QUERIES;

    Layout room;
    p.at_k_b      = room.add(p.s.n_latent * pad_lanes(p.s.n_nope));
    p.at_v_b      = room.add(p.s.n_latent * pad_lanes(p.s.n_value));
    p.at_rows     = room.add(ROWS_ONCE * p.s.n_latent);
    p.at_q        = room.add(p.s.n_key * n);
    p.at_tile     = room.add(TILE_KEYS * align(p.s.n_cache));
    p.at_key      = room.add(TILE_KEYS * align(p.s.n_key + LANES));
    p.at_value    = room.add(TILE_KEYS * pad_lanes(p.s.n_value));
    p.at_scores   = room.add(TILE_KEYS * BLOCK_QUERIES);
    p.at_rescale  = room.add(BLOCK_QUERIES);
    p.at_max      = room.add(n);
    p.at_sum      = room.add(n);
    p.at_out      = room.add(n * pad_lanes(p.s.n_value));
    p.thread_size = room.size;
    return p;
}

// k_b of one head as [LATENT][NOPE], its own layout.
void load_k_b(const ggml_tensor * k_b, int64_t head, const Plan & p, float * dst) {
    const int64_t ld = pad_lanes(p.s.n_nope);
    std::fill(dst, dst + p.s.n_latent * ld, 0.0f);
    for (int64_t j = 0; j < p.s.n_latent; ++j) {
        read_row(k_b->type, row_of(k_b, j, head), p.s.n_nope, dst + j * ld);
    }
}

// v_b of one head as [LATENT][DV]: transposed, some rows at a time.
void load_v_b(const ggml_tensor * v_b, int64_t head, const Plan & p, float * rows, float * dst) {
    const int64_t ld  = pad_lanes(p.s.n_value);
    const auto    row = [&](int64_t i) { return rows + i * p.s.n_latent; };
    for (int64_t i0 = 0; i0 < p.s.n_value; i0 += ROWS_ONCE) {
        const int64_t n = std::min(ROWS_ONCE, p.s.n_value - i0);
        for (int64_t i = 0; i < n; ++i) {
            read_row(v_b->type, row_of(v_b, i0 + i, head), p.s.n_latent, rows + i * p.s.n_latent);
        }
        transpose_rows(row, n, pad_lanes(n), 0, p.s.n_latent, 1.0f, dst + i0, ld);
    }
}

// One task.
struct Task {
    int64_t stream;
    int64_t head;
    int64_t query0, query1;  // query0 is the start of a block
};

// q^T of one head, times the scale: [DK][BLOCK_QUERIES] for each block of queries; missing queries are zero.
void load_queries(const ggml_tensor * dst, const Task & task, const Plan & p, float * queries) {
    const ggml_tensor * q     = dst->src[0];
    const float         scale = ggml_get_op_params_f32(dst, 0);
    for (int64_t query0 = task.query0; query0 < task.query1; query0 += BLOCK_QUERIES) {
        const auto row = [&](int64_t i) { return (const float *) row_of(q, query0 + i, task.head, task.stream); };
        transpose_rows(row, std::min(BLOCK_QUERIES, task.query1 - query0), BLOCK_QUERIES, 0, p.s.n_key, scale,
                       queries + query0 * p.s.n_key, BLOCK_QUERIES);
    }
}

MaskRows mask_of(const ggml_tensor * dst, int64_t stream) {
    return mask_rows(dst->src[4], stream, 0, dst->src[0]->ne[1]);
}

Keys keys_in(const ggml_tensor * dst, const Plan & p, int64_t stream) {
    return keys_of(dst->src[GGML_LATENT_ORDER_SRC], stream, p.s.n_keys);
}

// Expands the tile's rows of the cache to keys [NOPE, ROPE] and values of one head.
void expand(const Plan &  p,
            int           n_keys,
            const float * latents,
            const float * k_b,
            const float * v_b,
            float *       keys,
            float *       values) {
    const int64_t ld_latent = align(p.s.n_cache);
    const int64_t ld_key    = align(p.s.n_key + LANES);
    const int64_t ld_nope   = pad_lanes(p.s.n_nope);
    const int64_t ld_value  = pad_lanes(p.s.n_value);
    multiply_in_steps(
        { n_keys, ld_nope, p.s.n_latent, latents, ld_latent, 1, k_b, ld_nope, keys, ld_key, nullptr, nullptr },
        STEP_LATENT);
    multiply_in_steps(
        { n_keys, ld_value, p.s.n_latent, latents, ld_latent, 1, v_b, ld_value, values, ld_value, nullptr, nullptr },
        STEP_LATENT);
    for (int i = 0; i < n_keys; ++i) {
        memcpy(keys + i * ld_key + p.s.n_nope, latents + i * ld_latent + p.s.n_latent,
               (p.s.n_key - p.s.n_nope) * sizeof(float));
    }
}

// map: visibility of each group of keys for all queries of the task's stream.
void attend(const ggml_tensor * dst, const Plan & p, const Task & task, const View * map, float * own) {
    const ggml_tensor * k = dst->src[1];

    float * k_b     = own + p.at_k_b;
    float * v_b     = own + p.at_v_b;
    float * queries = own + p.at_q;
    float * latents = own + p.at_tile;
    float * keys    = own + p.at_key;
    float * values  = own + p.at_value;
    float * scores  = own + p.at_scores;
    float * rescale = own + p.at_rescale;
    float * maximum = own + p.at_max;
    float * sum     = own + p.at_sum;
    float * out     = own + p.at_out;

    const int64_t ld_key   = align(p.s.n_key + LANES);
    const int64_t ld_value = pad_lanes(p.s.n_value);
    const int64_t n_padded = p.n_blocks * BLOCK_QUERIES;

    load_k_b(dst->src[2], task.head, p, k_b);
    load_v_b(dst->src[3], task.head, p, own + p.at_rows, v_b);
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

            const MaskRows some = { all.data + query0 * all.stride, all.stride, n_queries };
            const View     view = view_of(some, tile);
            if (view == View::CLOSED) {
                continue;
            }
            if (!expanded) {
                read_rows(tile, k->type, cache, k->nb[1], p.s.n_cache, latents, align(p.s.n_cache));
                expand(p, tile.n_keys, latents, k_b, v_b, keys, values);
                expanded = true;
            }
            multiply<Accumulate::NONE>({ tile.n_keys, n_cols, p.s.n_key, keys, ld_key, 1, queries + query0 * p.s.n_key,
                                         BLOCK_QUERIES, scores, n_cols, nullptr, nullptr });
            for (int64_t i = 0; i < n_queries && view == View::MIXED; ++i) {
                add_mask(tile, some.row(i), i, i + 1, n_cols, scores);
            }
            softmax_tile(tile.n_keys, n_cols, scores, maximum + query0, sum + query0, rescale);
            multiply<Accumulate::SCALE>({ n_queries, ld_value, tile.n_keys, scores, 1, n_cols, values, ld_value,
                                          out + query0 * ld_value, ld_value, rescale, nullptr });
        }
    }

    for (int64_t i = task.query0; i < task.query1; ++i) {
        write_row(out + i * ld_value, sum[i], p.s.n_value, (float *) row_of(dst, task.head, i, task.stream));
    }
}

size_t work_size(const Plan & p, int n_tasks) {
    return (n_tasks * p.thread_size + ALIGN) * sizeof(float) + p.s.n_streams * p.n_groups * sizeof(View);
}

}  // namespace

bool ggml_latent_attn_supported(const ggml_tensor * dst) {
    return can_read_rows(dst->src[1]->type) && can_read_rows(dst->src[2]->type) && can_read_rows(dst->src[3]->type);
}

size_t ggml_latent_attn_work_size(const ggml_tensor * dst, int n_tasks) {
    return std::max(work_size(make_plan(dst), n_tasks), reference_work_size(dst, n_tasks));
}

void ggml_compute_forward_latent_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    GGML_ASSERT(params->wsize >= ggml_latent_attn_work_size(dst, params->nth));
    if (params->use_ref) {
        compute_reference(params, dst);
        return;
    }
    const Plan p   = make_plan(dst);
    float *    all = (float *) (((uintptr_t) params->wdata + 63) / 64 * 64);
    float *    own = all + params->ith * p.thread_size;
    View *     map = (View *) (all + params->nth * p.thread_size);

    for (int64_t i = params->ith; i < p.s.n_streams * p.n_groups; i += params->nth) {
        const Keys    keys = keys_in(dst, p, i / p.n_groups);
        const int64_t key  = i % p.n_groups * GROUP_KEYS;
        if (key < keys.n) {
            map[i] = view_of(mask_of(dst, i / p.n_groups), keys, key, std::min(GROUP_KEYS, keys.n - key));
        }
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // Splits of the queries: enough to keep all threads busy. Blocks are whole and independent, so the number of
    // threads does not change the result.
    const int64_t n_heads     = p.s.n_streams * p.s.n_heads;
    const int64_t parts       = std::min(p.n_blocks, (params->nth + n_heads - 1) / n_heads);
    const int64_t part_blocks = (p.n_blocks + parts - 1) / parts;
    for (int64_t i = params->ith; i < n_heads * parts; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t query0 = i % parts * part_blocks * BLOCK_QUERIES;
        const int64_t query1 = std::min(p.s.n_queries, query0 + part_blocks * BLOCK_QUERIES);
        const Task    task   = { i / parts / p.s.n_heads, i / parts % p.s.n_heads, query0, query1 };
        attend(dst, p, task, map + task.stream * p.n_groups, own);
    }
}
