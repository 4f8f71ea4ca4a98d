// The matmul of one node: assigns columns to matrices of weights, splits the work, and writes the results.
//
// All threads quantize and pack the activation rows; meanwhile the first one sorts the columns of the result by matrix
// (an expert of MUL_MAT_ID, a plane of MUL_MAT). After one barrier threads fetch tasks from ggml's chunk counter; a
// task is some weight rows times up to MAX_COLUMNS columns of one matrix. Every element of the result is summed in the
// same order for any number of threads, and of quantized weights for any number of columns.

#include "quant-gemm.h"

#include "ggml-op-marks.h"
#include "quant-gemm-dot.h"
#include "vec.h"

#include <algorithm>
#include <cstring>

namespace quant_gemm {

static constexpr int MAX_COLUMNS = 128;  // their packed activations (368 KiB at K = 2304) stay in L2
static constexpr int TASK_ROWS   = 128;

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
    Panel panel;
    Sums  sums[2];  // of each matmul
};

// The layout of the work buffer, in order.
struct Work {
    size_t acts;     // packed rows of src1
    size_t columns;  // Column of every column of the result, sorted by matrix
    size_t starts;   // int64_t: the first column of every matrix, and the end
    size_t scratch;  // per thread
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

static Work plan_work(const ggml_tensor * dst, const Format & format, int n_tasks) {
    const ggml_tensor * src1 = dst->src[1];
    Work                work;
    work.acts    = 0;
    work.columns = padded(ggml_nrows(src1) * act_row_size(format.scheme, src1->ne[0]));
    work.starts  = work.columns + padded(count_columns(dst) * sizeof(Column));
    work.scratch = work.starts + padded((count_matrices(dst) + 1) * sizeof(int64_t));
    work.total   = work.scratch + n_tasks * sizeof(Scratch) + CACHE_LINE;
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

bool uses_dots(const Format & format, const ggml_tensor * dst, int64_t n_columns) {
    const bool plain = is_plain(format.scheme);
    return n_columns < format.min_columns || (plain && ggml_op_has_mark(dst, GGML_OP_MARK_INVARIANT));
}

void pack_rows(const Format & format, const ggml_tensor * src1, char * acts, int ith, int nth) {
    const size_t  act_size = act_row_size(format.scheme, src1->ne[0]);
    const int64_t n_rows   = ggml_nrows(src1);
    for (int64_t r = ith; r < n_rows; r += nth) {
        const int64_t i1 = r % src1->ne[1];
        const int64_t i2 = r / src1->ne[1] % src1->ne[2];
        const int64_t i3 = r / src1->ne[1] / src1->ne[2];
        const char *  x  = (const char *) src1->data + i1 * src1->nb[1] + i2 * src1->nb[2] + i3 * src1->nb[3];
        pack_row(format, (const float *) x, src1->ne[0], acts + r * act_size);
    }
}

// Columns sorted by matrix, in the order of tokens within each.
static void sort_columns(const Job & job, Column * columns, int64_t * starts) {
    const ggml_tensor * product    = job.products[0];
    const ggml_tensor * dst        = job.dst;
    const ggml_tensor * src1       = product->src[1];
    const int64_t       n_matrices = count_matrices(product);
    if (product->op != GGML_OP_MUL_MAT_ID) {
        for (int64_t i = 0; i < count_columns(product); i++) {
            const int64_t i1 = i % dst->ne[1];
            const int64_t i2 = i / dst->ne[1] % dst->ne[2];
            const int64_t i3 = i / dst->ne[1] / dst->ne[2];
            columns[i]       = { i, (int64_t) (i1 * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3]) };
        }
        for (int64_t m = 0; m <= n_matrices; m++) {
            starts[m] = m * count_columns(product) / n_matrices;
        }
        return;
    }
    const ggml_tensor * ids       = product->src[2];
    const auto          expert_of = [&](int64_t slot, int64_t token) {
        int32_t expert;
        memcpy(&expert, (const char *) ids->data + token * ids->nb[1] + slot * ids->nb[0], sizeof(expert));
        GGML_ASSERT(expert >= 0 && expert < n_matrices);
        return expert;
    };
    std::fill(starts, starts + n_matrices + 1, 0);
    for (int64_t token = 0; token < ids->ne[1]; token++) {
        for (int64_t slot = 0; slot < ids->ne[0]; slot++) {
            starts[expert_of(slot, token) + 1]++;
        }
    }
    for (int64_t m = 0; m < n_matrices; m++) {
        starts[m + 1] += starts[m];
    }
    for (int64_t token = 0; token < ids->ne[1]; token++) {
        for (int64_t slot = 0; slot < ids->ne[0]; slot++) {
            const int64_t act_row                     = slot % src1->ne[1] + token * src1->ne[1];
            columns[starts[expert_of(slot, token)]++] = { act_row, (int64_t) (slot * dst->nb[1] + token * dst->nb[2]) };
        }
    }
    for (int64_t m = n_matrices; m > 0; m--) {  // each start has advanced to the start of the next matrix
        starts[m] = starts[m - 1];
    }
    starts[0] = 0;
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
// once would fill the queue for the reads of the tiles themselves.
static void add_panel(const Format &      format,
                      const ggml_tensor * src0,
                      const char *        weights,
                      int64_t             row,
                      const Ahead &       ahead,
                      Columns             columns,
                      Panel &             panel,
                      Sums &              sums) {
    const int64_t n_blocks = src0->ne[0] / BLOCK;
    const int     step     = panel_blocks(format.scheme);
    const size_t  act_step = act_row_size(format.scheme, step * BLOCK);
    const size_t  piece    = ahead.size * step / n_blocks;
    const char *  next     = ahead.first;
    const char *  act[MAX_COLUMNS];
    std::copy(columns.at, columns.at + columns.n, act);
    memset(sums, 0, columns.n * sizeof(sums[0]));
    for (int64_t block = 0; block < n_blocks; block += step) {
        const int here = (int) std::min<int64_t>(step, n_blocks - block);
        format.unpack(weights, src0->nb[1], row, src0->ne[1], block, here, panel);
        multiply(format, panel, here, { act, columns.n }, { next, piece }, sums[0]);
        next += piece;
        for (int i = 0; i < columns.n; i++) {
            act[i] += act_step;
        }
    }
}

// Rows row .. end - 1 of a matrix times n columns; next_row: first row to prefetch, the likely next task.
static void compute_task(const Format & format,
                         const Job &    job,
                         int64_t        matrix,
                         int64_t        row,
                         int64_t        end,
                         int64_t        next_row,
                         const char *   acts,
                         const Column * columns,
                         int            n,
                         Scratch &      scratch) {
    const bool          dots     = uses_dots(format, job.products[0], n);
    const ggml_tensor * src0     = job.products[0]->src[0];
    const size_t        act_size = act_row_size(format.scheme, src0->ne[0]);
    const char *        act[MAX_COLUMNS];
    for (int i = 0; i < n; i++) {
        act[i] = acts + columns[i].act_row * act_size;
    }
    for (; row < end; row += PANEL_ROWS) {
        const int n_rows = (int) std::min<int64_t>(PANEL_ROWS, end - row);
        for (int p = 0; p < job.n_products; p++) {
            src0                  = job.products[p]->src[0];
            const char *  weights = weights_of(job.products[p], matrix);
            const int64_t after   = row + PANEL_ROWS < end ? row + PANEL_ROWS : next_row;
            if (dots) {
                const size_t     stride = src0->nb[1];
                const WeightRows those  = { weights + row * stride, stride, n_rows,
                                            weights + (after < src0->ne[1] ? after : row) * stride };
                dot_rows(dot_of(format), those, src0->ne[0], { act, n }, *scratch.sums[p]);
                continue;
            }
            const bool          last    = p + 1 == job.n_products;
            const ggml_tensor * follows = job.products[last ? 0 : p + 1];
            const int64_t       next    = last ? after : row;
            const int64_t       n_next  = std::max<int64_t>(0, std::min<int64_t>(PANEL_ROWS, src0->ne[1] - next));
            const size_t        stride  = follows->src[0]->nb[1];
            const Ahead         ahead   = { weights_of(follows, matrix) + next * stride, n_next * stride };
            add_panel(format, src0, weights, row, ahead, { act, n }, scratch.panel, scratch.sums[p]);
        }
        for (int i = 0; i < n; i++) {
            float * to = (float *) ((char *) job.dst->data + columns[i].dst_offset) + row;
            if (job.n_products == 2) {
                ggml_vec_swiglu_f32(n_rows, to, scratch.sums[0][i], scratch.sums[1][i]);
            } else {
                memcpy(to, scratch.sums[0][i], n_rows * sizeof(float));
            }
        }
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
    Scratch &           scratch = ((Scratch *) (base + work.scratch))[params->ith];
    GGML_ASSERT(params->wsize >= work.total);

    if (params->ith == 0) {
        sort_columns(job, columns, starts);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    pack_rows(format, src1, acts, params->ith, params->nth);
    ggml_barrier(params->threadpool);

    // tasks are numbered matrix by matrix; within a matrix, all rows of the first columns come first
    const int64_t n_matrices = count_matrices(product);
    const int64_t row_parts  = (src0->ne[1] + TASK_ROWS - 1) / TASK_ROWS;
    int64_t       first_task = 0;
    int64_t       task       = params->ith;
    for (int64_t m = 0; m < n_matrices; m++) {
        const int64_t n            = starts[m + 1] - starts[m];
        const int64_t column_parts = (n + MAX_COLUMNS - 1) / MAX_COLUMNS;
        const int64_t n_tasks      = row_parts * column_parts;
        for (; task < first_task + n_tasks; task = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            const int64_t  part  = (task - first_task) / row_parts;
            const int64_t  row   = (task - first_task) % row_parts * TASK_ROWS;
            const int64_t  end   = std::min<int64_t>(row + TASK_ROWS, src0->ne[1]);
            const int64_t  first = n * part / column_parts;
            const int      here  = (int) (n * (part + 1) / column_parts - first);
            const Column * those = columns + starts[m] + first;
            // the next task of this thread if all threads progress equally
            const int64_t next_row = row + params->nth * TASK_ROWS;
            compute_task(format, job, m, row, end, next_row, acts, those, here, scratch);
        }
        first_task += n_tasks;
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
