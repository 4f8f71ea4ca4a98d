// The matmul of one node: assigns columns to matrices of weights, splits the work, and writes the results.
//
// All threads quantize and pack the activation rows; meanwhile the first ones sort the columns of the result by matrix
// (an expert of MUL_MAT_ID, a plane of MUL_MAT). After one barrier threads fetch tasks from ggml's chunk counter; a
// task is some weight rows times some columns of one matrix, fewer of both if there are many threads. Every element of
// the result is summed in the same order for any number of threads, and of quantized weights for any number of columns.

#include "quant-gemm.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml-op-marks.h"
#include "quant-gemm-amx.h"
#include "quant-gemm-dot.h"
#include "vec.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace quant_gemm {

// The largest and the smallest tasks.
static constexpr int MAX_COLUMNS = 128;  // their packed activations (368 KiB at K = 2304) stay in L2
static constexpr int FEW_COLUMNS = 32;
static constexpr int TASK_ROWS   = 128;

// Dot products: a task may have more rows, as long as each thread has at least so many tasks. The first weights of a task
// come from memory more slowly than the following ones.
static constexpr int TASKS_PER_THREAD = 8;

// Results of so many bytes are written past the caches. (Limits of 64 KiB to 1 MiB were as fast, with 16 to 512 tokens.)
static constexpr size_t STREAMED_RESULT = 1 << 20;

// Up to so many columns there are too few tiles to prefetch all of the next rows with them, or to multiply two panels.
static constexpr int COLUMNS_OF_FEW_TILES = 24;

// What a task costs in addition to its multiplications, in rows of the task; and what a row costs (unpacking), in columns.
static constexpr int TASK_COST_ROWS   = 4;
static constexpr int ROW_COST_COLUMNS = 16;

// Columns for which another thread that sorts pays for the barrier that it requires.
static constexpr int SORTED_COLUMNS = 512;
static constexpr int MAX_SORTERS    = 8;

static size_t padded(size_t n) {
    return (n + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
}

// A column of the result: its activations and its position.
struct Column {
    int64_t act_row;
    int64_t dst_offset;  // bytes
};

// One matmul, or two of the same activations that are gate and up of a SwiGLU.
struct Job {
    const ggml_tensor * products[2];  // of the same shape and format, the gate first
    int                 n_products;
    ggml_tensor *       dst;  // the matmul itself, or the SwiGLU of both
};

using Sums = float[MAX_COLUMNS][PANEL_ROWS];

// Buffers of one thread.
struct alignas(CACHE_LINE) Scratch {
    Panel panels[MAX_PANELS];
    Sums  sums[2];  // of each matmul
};

// The layout of the work buffer, in order.
struct Work {
    size_t acts;     // packed rows of src1
    size_t columns;  // Column of every column of the result, sorted by matrix
    size_t starts;   // int64_t: the first column of every matrix, and the end
    size_t counts;   // int64_t: columns of every matrix, per sorter; then each sorter's next position in every matrix
    size_t scratch;  // per thread
    size_t tiles;    // TileScratch per thread, if tile registers are used
    size_t total;
};

static int64_t count_columns(const ggml_tensor * dst) {
    return dst->ne[1] * dst->ne[2] * dst->ne[3];
}

// Number of matrices by which columns are sorted: experts, or planes of src1 if src0 has several.
static int64_t count_matrices(const ggml_tensor * dst) {
    if (dst->op == GGML_OP_MUL_MAT_ID) {
        return dst->src[0]->ne[2];
    }
    const bool one = dst->src[0]->ne[2] == 1 && dst->src[0]->ne[3] == 1;
    return one ? 1 : dst->ne[2] * dst->ne[3];
}

// Number of threads that sort columns.
static int count_sorters(const ggml_tensor * dst, int n_threads) {
    const int64_t n = dst->op == GGML_OP_MUL_MAT_ID ? count_columns(dst) / SORTED_COLUMNS : 1;
    return (int) std::max<int64_t>(1, std::min<int64_t>({ n, n_threads, MAX_SORTERS }));
}

static Work plan_work(const ggml_tensor * dst, const Format & format, int n_tasks) {
    const ggml_tensor * src1 = dst->src[1];
    Work                work;
    work.acts    = 0;
    work.columns = padded(ggml_nrows(src1) * act_row_size(format.scheme, src1->ne[0]));
    work.starts  = work.columns + padded(count_columns(dst) * sizeof(Column));
    work.counts  = work.starts + padded((count_matrices(dst) + 1) * sizeof(int64_t));
    work.scratch = work.counts + padded(2 * count_sorters(dst, n_tasks) * count_matrices(dst) * sizeof(int64_t));
    work.tiles   = work.scratch + n_tasks * sizeof(Scratch);
    work.total   = work.tiles + CACHE_LINE;
    work.total += uses_tiles(format, count_columns(dst)) ? n_tasks * sizeof(TileScratch) : 0;
    return work;
}

const Format * format_of(const ggml_tensor * dst, quant_gemm_layout layout) {
    if ((dst->op != GGML_OP_MUL_MAT && dst->op != GGML_OP_MUL_MAT_ID) || ggml_op_has_mark(dst, GGML_OP_MARK_UPSTREAM)) {
        return nullptr;
    }
    const ggml_tensor * src0   = dst->src[0];
    const ggml_tensor * src1   = dst->src[1];
    const Format *      format = find_format(src0->type, layout);
    if (format == nullptr || src1->type != GGML_TYPE_F32 || src0->ne[0] % BLOCK != 0) {
        return nullptr;
    }
    if (src0->nb[0] != ggml_type_size(src0->type) || src1->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float)) {
        return nullptr;
    }
    return format;
}

bool uses_tiles(const Format & format, int64_t n_columns) {
    return format.unpack_for_tiles != nullptr && n_columns >= format.min_tile_columns && has_tiles();
}

bool uses_dots(const Format & format, const ggml_tensor * dst, int64_t n_columns) {
    const bool plain = is_plain(format.scheme);
    const bool few   = n_columns < format.min_columns && !uses_tiles(format, n_columns);
    return few || (plain && ggml_op_has_mark(dst, GGML_OP_MARK_INVARIANT));
}

void pack_rows(const Format & format, const ggml_tensor * src1, char * acts, int ith, int nth) {
    const int64_t k        = src1->ne[0];
    const size_t  act_size = act_row_size(format.scheme, k);
    // few rows are divided: slices of K are packed independently
    const int64_t length   = ggml_nrows(src1) < 4 * nth ? SLICE : k;
    const int64_t n_pieces = (k + length - 1) / length;
    const int64_t n        = ggml_nrows(src1) * n_pieces;
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        const int64_t r  = i / n_pieces;
        const int64_t at = i % n_pieces * length;
        const int64_t i1 = r % src1->ne[1];
        const int64_t i2 = r / src1->ne[1] % src1->ne[2];
        const int64_t i3 = r / src1->ne[1] / src1->ne[2];
        const char *  x  = (const char *) src1->data + i1 * src1->nb[1] + i2 * src1->nb[2] + i3 * src1->nb[3];
        char *        to = acts + r * act_size + act_row_size(format.scheme, at);
        pack_row(format, (const float *) x + at, std::min(length, k - at), to);
    }
}

// The columns of a MUL_MAT, which are already in the order of its planes.
static void list_columns(const Job & job, int ith, int nth, Column * columns, int64_t * starts) {
    const ggml_tensor * product    = job.products[0];
    const ggml_tensor * dst        = job.dst;
    const int64_t       n          = count_columns(product);
    const int64_t       n_matrices = count_matrices(product);
    for (int64_t c = n * ith / nth; c < n * (ith + 1) / nth; c++) {
        const int64_t i1 = c % dst->ne[1];
        const int64_t i2 = c / dst->ne[1] % dst->ne[2];
        const int64_t i3 = c / dst->ne[1] / dst->ne[2];
        columns[c]       = { c, (int64_t) (i1 * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3]) };
    }
    for (int64_t m = 0; m <= n_matrices && ith == 0; m++) {
        starts[m] = m * n / n_matrices;
    }
}

// Calls f(slot, token, expert) for this sorter's share of the tokens, in order.
template <typename F> static void for_each_choice(const ggml_tensor * product, int sorter, int n_sorters, const F & f) {
    const ggml_tensor * ids       = product->src[2];
    const int64_t       n_experts = count_matrices(product);
    for (int64_t t = ids->ne[1] * sorter / n_sorters; t < ids->ne[1] * (sorter + 1) / n_sorters; t++) {
        for (int64_t slot = 0; slot < ids->ne[0]; slot++) {
            int32_t expert;
            memcpy(&expert, (const char *) ids->data + t * ids->nb[1] + slot * ids->nb[0], sizeof(expert));
            GGML_ASSERT(expert >= 0 && expert < n_experts);
            f(slot, t, expert);
        }
    }
}

// The columns of a MUL_MAT_ID are sorted by expert, in the order of tokens within each: each sorter counts those of its
// tokens, and when all have counted, each knows where its own are placed.
static void count_choices(const ggml_tensor * product, int sorter, int n_sorters, int64_t * counts) {
    int64_t * sorter_counts = counts + sorter * count_matrices(product);
    std::fill(sorter_counts, sorter_counts + count_matrices(product), 0);
    for_each_choice(product, sorter, n_sorters, [&](int64_t, int64_t, int32_t expert) { sorter_counts[expert]++; });
}

static void
place_choices(const Job & job, int sorter, int n_sorters, int64_t * counts, Column * columns, int64_t * starts) {
    const ggml_tensor * product    = job.products[0];
    const ggml_tensor * dst        = job.dst;
    const int64_t       n_matrices = count_matrices(product);
    const int64_t       n_acts     = product->src[1]->ne[1];
    int64_t *           next       = counts + (n_sorters + sorter) * n_matrices;
    int64_t             n          = 0;
    for (int64_t m = 0; m < n_matrices; m++) {
        if (sorter == 0) {
            starts[m] = n;
        }
        for (int s = 0; s < n_sorters; s++) {
            next[m] = s == sorter ? n : next[m];
            n += counts[s * n_matrices + m];
        }
    }
    if (sorter == 0) {
        starts[n_matrices] = n;
    }
    for_each_choice(product, sorter, n_sorters, [&](int64_t slot, int64_t token, int32_t expert) {
        const int64_t act_row   = (n_acts == 1 ? 0 : slot % n_acts) + token * n_acts;
        columns[next[expert]++] = { act_row, (int64_t) (slot * dst->nb[1] + token * dst->nb[2]) };
    });
}

static const char * weights_of(const ggml_tensor * product, int64_t matrix) {
    const ggml_tensor * src0 = product->src[0];
    if (product->op == GGML_OP_MUL_MAT_ID) {
        return (const char *) src0->data + matrix * src0->nb[2];
    }
    const int64_t i2 = matrix % product->ne[2] / (product->ne[2] / src0->ne[2]);
    const int64_t i3 = matrix / product->ne[2] / (product->ne[3] / src0->ne[3]);
    return (const char *) src0->data + i2 * src0->nb[2] + i3 * src0->nb[3];
}

#if QUANT_GEMM_KERNELS

// PANEL_ROWS rows of a matrix times n columns. Unpacking reads short pieces of many rows, which hardware prefetching
// does not recognize. So the next rows, `ahead`, are prefetched in address order, a few lines with each tile: all at
// once would fill the queue for the reads of the tiles themselves. With few columns, and so few tiles, half of them are
// prefetched before unpacking; into L1, too, where that is faster.
static void multiply_rows(const Format &      format,
                          const ggml_tensor * src0,
                          const char *        weights,
                          int64_t             row,
                          const Ahead &       ahead,
                          Columns             columns,
                          Panel (&panels)[MAX_PANELS],
                          Sums & sums) {
    const int64_t n_blocks         = src0->ne[0] / BLOCK;
    const int     blocks_per_panel = panel_blocks(format.scheme);
    const int     step     = columns.n > COLUMNS_OF_FEW_TILES ? MAX_PANELS * blocks_per_panel : blocks_per_panel;
    const size_t  act_step = act_row_size(format.scheme, step * BLOCK);
    const bool    into_l1  = prefetches_in_order();
    const char *  next     = ahead.first;
    const char *  act[MAX_COLUMNS];
    std::copy(columns.at, columns.at + columns.n, act);
    for (int64_t block = 0; block < n_blocks; block += step) {
        const int    here   = (int) std::min<int64_t>(step, n_blocks - block);
        const size_t piece  = ahead.size * here / n_blocks;
        const size_t before = columns.n <= COLUMNS_OF_FEW_TILES ? piece / 2 : 0;
        if (into_l1) {
            prefetch<3>(next, before);
        } else {
            prefetch<2>(next, before);
        }
        for (int b = 0; b < here; b += blocks_per_panel) {
            const int n = std::min(blocks_per_panel, here - b);
            format.unpack(weights, src0->nb[1], row, src0->ne[1], block + b, n, panels[b / blocks_per_panel]);
        }
        multiply(format, panels, here, { act, columns.n }, { next + before, piece - before }, block == 0, sums[0]);
        next += piece;
        for (int i = 0; i < columns.n; i++) {
            act[i] += act_step;
        }
    }
}

// How a matrix is divided into tasks: its rows in `rows` parts, multiples of `step`, and its columns in parts of up to
// `columns`. All parts of either have nearly the same size.
struct Division {
    int64_t step;
    int64_t rows;
    int64_t columns;

    int64_t first_row(int64_t n_rows, int64_t part) const {
        const int64_t n_steps = (n_rows + step - 1) / step;
        return std::min(n_rows, n_steps * std::min(part, rows) / rows * step);
    }

    int64_t column_parts(int64_t n) const { return (n + columns - 1) / columns; }

    int64_t tasks(int64_t n) const { return rows * column_parts(n); }
};

// A row of one of the matrices.
struct Place {
    int64_t matrix;
    int64_t row;
};

// The division with the shortest time if all tasks take equally long. With few threads tasks have as many rows and
// columns as they may have.
static Division divide(const ggml_tensor * product, const Format & format, const int64_t * starts, int nth) {
    const int64_t n_matrices = count_matrices(product);
    int64_t       largest    = 0;  // columns of a matrix
    int64_t       n_used     = 0;  // matrices with columns
    for (int64_t m = 0; m < n_matrices; m++) {
        largest = std::max(largest, starts[m + 1] - starts[m]);
        n_used += starts[m + 1] > starts[m] ? 1 : 0;
    }
    const bool    dots    = uses_dots(format, product, largest);
    const int64_t average = starts[n_matrices] / std::max<int64_t>(1, n_used);
    // a long task of a matrix with many columns would hold up the other threads
    const bool    mostly  = dots || (largest <= FEW_COLUMNS && uses_dots(format, product, average));
    const int64_t step    = dots ? DOT_ROWS : PANEL_ROWS;
    const int64_t n_steps = (product->src[0]->ne[1] + step - 1) / step;
    if (ggml_is_numa()) {
        return { step, std::min<int64_t>(n_steps, nth), MAX_COLUMNS };
    }
    const int64_t share     = mostly ? n_used * n_steps / (TASKS_PER_THREAD * nth) : 0;
    const int64_t few_steps = TASK_ROWS / step;
    const int64_t max_steps = std::max(share, few_steps);
    const auto    fewer     = [&](int64_t n) { return n > few_steps ? std::max(n / 2, few_steps) : n / 2; };
    // if experts have different numbers of columns, the other threads may wait for one more task
    const int64_t more = starts[n_matrices] < n_used * largest ? 1 : 0;
    Division      best = { step, n_steps, MAX_COLUMNS };
    int64_t       time = INT64_MAX;
    for (int64_t columns = MAX_COLUMNS; columns >= FEW_COLUMNS; columns /= 2) {
        int64_t n_parts = 0;  // of columns
        for (int64_t m = 0; m < n_matrices; m++) {
            const int64_t n = starts[m + 1] - starts[m];
            n_parts += n > 0 ? (n + columns - 1) / columns : 0;
        }
        const int64_t part_columns = starts[n_matrices] / std::max<int64_t>(1, n_parts);
        for (int64_t steps = max_steps; steps > 0; steps = fewer(steps)) {
            const int64_t rows      = (n_steps + steps - 1) / steps;
            const int64_t rounds    = (n_parts * rows + nth - 1) / nth + more;
            const int64_t task_rows = (n_steps + rows - 1) / rows * step;
            const int64_t estimate  = rounds * (task_rows + TASK_COST_ROWS) * (part_columns + ROW_COST_COLUMNS);
            if (estimate < time) {
                best = { step, rows, columns };
                time = estimate;
            }
        }
        if (largest <= columns / 2) {
            break;
        }
    }
    return best;
}

// Whether panels write this result past the caches. In them, a large one displaces activations and weights; and as the
// rows of many results are multiples of 4096 bytes apart, those of all columns compete for the same few lines. Only whole
// lines can be written this way.
static bool is_streamed(const ggml_tensor * dst) {
    const uintptr_t addresses = (uintptr_t) dst->data | dst->nb[1] | dst->nb[2] | dst->nb[3];
    return STREAMS && ggml_nbytes(dst) >= STREAMED_RESULT && addresses % CACHE_LINE == 0;
}

static inline void copy_sums(const float (&sums)[PANEL_ROWS], int n_rows, float * to, bool streamed) {
    if (n_rows < PANEL_ROWS) {
        memcpy(to, sums, n_rows * sizeof(float));
        return;
    }
#pragma GCC unroll 2
    for (int v = 0; v < PANEL_VECTORS; v++) {
        const Floats x = load_floats(sums + v * LANES);
        if (streamed) {
            stream_floats(to + v * LANES, x);
        } else {
            store_floats(to + v * LANES, x);
        }
    }
}

// The place where `task` begins. The search starts at `matrix`, whose first task is first_task. If there is no such task:
// the end of the last matrix.
static Place find_task(const Division & division,
                       const int64_t *  starts,
                       int64_t          n_matrices,
                       int64_t          n_rows,
                       int64_t          task,
                       int64_t          matrix,
                       int64_t          first_task) {
    for (; matrix < n_matrices; matrix++) {
        if (starts[matrix + 1] == starts[matrix]) {
            continue;  // most experts, for one token
        }
        const int64_t n_tasks = division.tasks(starts[matrix + 1] - starts[matrix]);
        if (task < first_task + n_tasks) {
            return { matrix, division.first_row(n_rows, (task - first_task) % division.rows) };
        }
        first_task += n_tasks;
    }
    return { n_matrices - 1, n_rows };
}

// Rows row .. end - 1 of a matrix times n columns; next: the likely next task, whose first rows are prefetched.
// dots: for the columns of this node, or nullptr for panels; tiles: for panels that tile registers multiply, or nullptr.
static void compute_task(const Format & format,
                         const Job &    job,
                         int64_t        matrix,
                         int64_t        row,
                         int64_t        end,
                         const Place &  next,
                         const char *   acts,
                         const Column * columns,
                         int            n,
                         DotOperand *   dots,
                         TileScratch *  tiles,
                         Scratch &      scratch) {
    const ggml_tensor * src0     = job.products[0]->src[0];
    const size_t        act_size = act_row_size(format.scheme, src0->ne[0]);
    const char *        act[MAX_COLUMNS];
    for (int i = 0; i < n; i++) {
        act[i] = acts + columns[i].act_row * act_size;
    }
    if (dots != nullptr) {
        dots->set_columns({ act, n });
    }
    const bool streamed = dots == nullptr && is_streamed(job.dst);
    if (tiles != nullptr) {
        begin_tiles(n);
    }
    for (; row < end; row += PANEL_ROWS) {
        const int n_rows = (int) std::min<int64_t>(PANEL_ROWS, end - row);
        for (int p = 0; p < job.n_products; p++) {
            src0                  = job.products[p]->src[0];
            const char *  weights = weights_of(job.products[p], matrix);
            const Place   after   = row + PANEL_ROWS < end ? Place{ matrix, row + PANEL_ROWS } : next;
            const int64_t n_after = std::min<int64_t>(PANEL_ROWS, src0->ne[1] - after.row);
            if (dots != nullptr) {
                const size_t     stride    = src0->nb[1];
                const char *     first     = weights + row * stride;
                const char *     next_rows = weights_of(job.products[p], after.matrix) + after.row * stride;
                const WeightRows rows      = { first, stride, n_rows, n_after > 0 ? next_rows : first };
                dots->multiply(rows, *scratch.sums[p]);
                continue;
            }
            const bool          last       = p + 1 == job.n_products;
            const ggml_tensor * follows    = job.products[last ? 0 : p + 1];
            const Place         next_place = last ? after : Place{ matrix, row };
            const int64_t       n_then     = last ? n_after : n_rows;
            const size_t        stride     = follows->src[0]->nb[1];
            const Ahead ahead = { weights_of(follows, next_place.matrix) + next_place.row * stride, n_then * stride };
            if (tiles != nullptr) {
                const TileWeights rows = { format, weights, src0->nb[1], row, src0->ne[1], src0->ne[0] / BLOCK };
                multiply_tiles(rows, { act, n }, ahead, scratch.sums[p][0], *tiles);
                continue;
            }
            multiply_rows(format, src0, weights, row, ahead, { act, n }, scratch.panels, scratch.sums[p]);
        }
        for (int i = 0; i < n; i++) {
            float * to = (float *) ((char *) job.dst->data + columns[i].dst_offset) + row;
            if (job.n_products == 2) {
                ggml_vec_swiglu_f32(n_rows, scratch.sums[0][i], scratch.sums[0][i], scratch.sums[1][i]);
            }
            copy_sums(scratch.sums[0][i], n_rows, to, streamed);
        }
    }
    if (tiles != nullptr) {
        end_tiles();
    }
}

static void compute(const ggml_compute_params * params, const Job & job, const Format & format) {
    const ggml_tensor * product = job.products[0];
    const ggml_tensor * src0    = product->src[0];
    const ggml_tensor * src1    = product->src[1];
    const Work          work    = plan_work(product, format, params->nth);
    char *              base    = (char *) padded((size_t) params->wdata);
    char *              acts    = base + work.acts;
    Column *            columns = (Column *) (base + work.columns);
    int64_t *           starts  = (int64_t *) (base + work.starts);
    int64_t *           counts  = (int64_t *) (base + work.counts);
    Scratch &           scratch = ((Scratch *) (base + work.scratch))[params->ith];
    TileScratch *       tiles   = (TileScratch *) (base + work.tiles) + params->ith;
    GGML_ASSERT(params->wsize >= work.total);

    const int n_sorters = count_sorters(product, params->nth);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    if (product->op != GGML_OP_MUL_MAT_ID) {
        list_columns(job, params->ith, params->nth, columns, starts);
    } else if (params->ith < n_sorters) {
        count_choices(product, params->ith, n_sorters, counts);
    }
    pack_rows(format, src1, acts, params->ith, params->nth);
    if (n_sorters > 1) {
        ggml_barrier(params->threadpool);
    }
    if (product->op == GGML_OP_MUL_MAT_ID && params->ith < n_sorters) {
        place_choices(job, params->ith, n_sorters, counts, columns, starts);
    }
    ggml_barrier(params->threadpool);

    // tasks are numbered matrix by matrix; within a matrix, all rows of the first columns come first
    const Division division   = divide(product, format, starts, params->nth);
    const int64_t  n_rows     = src0->ne[1];
    const int64_t  n_matrices = count_matrices(product);
    const bool     stealing   = !ggml_is_numa();  // otherwise a row is always read by the same thread, as in mul_mat
    int64_t        first_task = 0;
    int64_t        task       = params->ith;
    DotOperand     few(format, src0->ne[0]);
    for (int64_t m = 0; m < n_matrices; m++) {
        const int64_t n            = starts[m + 1] - starts[m];
        const int64_t column_parts = division.column_parts(n);
        const int64_t n_tasks      = division.tasks(n);
        const bool    dots         = uses_dots(format, product, n);
        TileScratch * here_tiles   = !dots && uses_tiles(format, n) ? tiles : nullptr;
        while (task < first_task + n_tasks) {
            const int64_t  part         = (task - first_task) / division.rows;
            const int64_t  row_part     = (task - first_task) % division.rows;
            const int64_t  row          = division.first_row(n_rows, row_part);
            const int64_t  end          = division.first_row(n_rows, row_part + 1);
            const int64_t  first        = n * part / column_parts;
            const int      here         = (int) (n * (part + 1) / column_parts - first);
            const Column * task_columns = columns + starts[m] + first;
            // the next task of this thread if all threads progress equally
            const Place next = find_task(division, starts, n_matrices, n_rows, task + params->nth, m, first_task);
            compute_task(format, job, m, row, end, next, acts, task_columns, here, dots ? &few : nullptr, here_tiles,
                         scratch);
            task = stealing ? ggml_threadpool_chunk_add(params->threadpool, 1) : task + params->nth;
        }
        first_task += n_tasks;
    }
    if (is_streamed(job.dst)) {
        finish_streams();
    }
}

#else

static void compute(const ggml_compute_params *, const Job &, const Format &) {}  // never called: there is no format

#endif

}  // namespace quant_gemm

size_t ggml_quant_gemm_work_size(const ggml_tensor * dst, int n_tasks, quant_gemm_layout layout) {
    const quant_gemm::Format * format = quant_gemm::format_of(dst, layout);
    return format != nullptr ? quant_gemm::plan_work(dst, *format, n_tasks).total : 0;
}

bool quant_gemm::environment_switch(const char * name, bool otherwise) {
    const char * value = getenv(name);
    if (value == nullptr || *value == 0) {
        return otherwise;
    }
    if (strcmp(value, "0") == 0 || strcmp(value, "1") == 0) {
        return *value == '1';
    }
    static std::atomic<const char *> last(nullptr);
    if (last.exchange(name) != name) {
        GGML_LOG_WARN("%s: %s=%s has no effect: expected 0 or 1\n", __func__, name, value);
    }
    return otherwise;
}

bool ggml_quant_gemm_prefers_rows(const ggml_tensor * op) {
    const ggml_type            type = op->src[0]->type;
    const quant_gemm::Format * rows = quant_gemm::find_format(type, QUANT_GEMM_ROWS);
    if (rows == nullptr) {
        return false;
    }
    // With NEON, upstream interleaves most types of 32 values. Without i8mm, its kernels for Q4_0 and Q8_0 decode faster on
    // most cores (estimated by llvm-mca, not measured; commit d90d8139). But it multiplies experts' interleaved weights by one
    // column at a time.
    const bool upstreams = QUANT_GEMM_NEON && rows->scheme == quant_gemm::Scheme::q8_0;
    const bool slower    = !QUANT_GEMM_I8MM && (type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q8_0);
    const bool as_fast   = op->op == GGML_OP_MUL_MAT_ID || !slower;
    const bool has_other = upstreams || quant_gemm::find_format(type, QUANT_GEMM_8X8) != nullptr;
    return (!upstreams || as_fast) && !(has_other && quant_gemm::environment_switch("KIMI_REPACK", false));
}

bool ggml_compute_forward_quant_gemm(const ggml_compute_params * params, ggml_tensor * dst, quant_gemm_layout layout) {
    const quant_gemm::Format * format = params->use_ref ? nullptr : quant_gemm::format_of(dst, layout);
    if (format == nullptr) {
        return false;
    }
    quant_gemm::compute(params, { { dst, nullptr }, 1, dst }, *format);
    return true;
}

bool ggml_compute_forward_quant_gemm_gated(const ggml_compute_params * params,
                                           const ggml_tensor *         gate,
                                           const ggml_tensor *         up,
                                           ggml_tensor *               swiglu,
                                           quant_gemm_layout           layout) {
    const quant_gemm::Format * format = params->use_ref ? nullptr : quant_gemm::format_of(gate, layout);
    if (format == nullptr || format != quant_gemm::format_of(up, layout)) {
        return false;
    }
    quant_gemm::compute(params, { { gate, up }, 2, swiglu }, *format);
    return true;
}
