// Shape checks and result of ggml_kda_scan; the computation is each backend's own.

#include "ggml-kda-scan.h"

#include "ggml-impl.h"

#include <string.h>

bool ggml_kda_head_size_supported(int64_t head_size) {
    return head_size == 32 || head_size == 64 || head_size == 96 || head_size == 128 || head_size == 256;
}

struct ggml_kda_scan_params ggml_kda_scan_get_params(const struct ggml_tensor * op) {
    GGML_ASSERT(op->op == GGML_OP_KDA_SCAN);
    struct ggml_kda_scan_params params;
    memcpy(&params, op->op_params, sizeof(params));
    return params;
}

// float32 with its rows packed; strides between rows are free
static bool has_packed_rows(const struct ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float);
}

static bool is_packed(const struct ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t);
}

static bool has_shape(const struct ggml_tensor * t, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    return t->ne[0] == ne0 && t->ne[1] == ne1 && t->ne[2] == ne2 && t->ne[3] == ne3;
}

struct ggml_tensor * ggml_kda_scan(struct ggml_context * ctx,
                                   struct ggml_tensor *  qkv,
                                   struct ggml_tensor *  f,
                                   struct ggml_tensor *  dt_bias,
                                   struct ggml_tensor *  a,
                                   struct ggml_tensor *  beta,
                                   struct ggml_tensor *  gate,
                                   struct ggml_tensor *  norm,
                                   struct ggml_tensor *  cache,
                                   struct ggml_tensor *  rows,
                                   int64_t               n_snapshots,
                                   int32_t               zero_row,
                                   float                 eps,
                                   float                 lower_bound) {
    const int64_t D = f->ne[0];
    const int64_t H = f->ne[1];
    const int64_t T = f->ne[2];
    const int64_t S = f->ne[3];

    GGML_ASSERT(has_packed_rows(qkv) && has_shape(qkv, D, 3 * H, T, S));
    GGML_ASSERT(has_packed_rows(f));
    GGML_ASSERT(is_packed(dt_bias) && ggml_nelements(dt_bias) == D * H);
    GGML_ASSERT(is_packed(a) && ggml_nelements(a) == H);
    GGML_ASSERT(has_packed_rows(beta) && has_shape(beta, H, T, S, 1));
    GGML_ASSERT(has_packed_rows(gate) && has_shape(gate, D, H, T, S));
    GGML_ASSERT(is_packed(norm) && ggml_nelements(norm) == D);
    GGML_ASSERT(has_packed_rows(cache) && ggml_is_matrix(cache) && cache->ne[0] == D * D * H);
    GGML_ASSERT(rows->type == GGML_TYPE_I32 && rows->nb[0] == sizeof(int32_t) && has_shape(rows, S, 1, 1, 1));
    GGML_ASSERT(n_snapshots >= 1);
    GGML_ASSERT(zero_row >= -1 && zero_row < cache->ne[1]);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, D * H, T * S + D * S * n_snapshots);

    const struct ggml_kda_scan_params params = { (int32_t) n_snapshots, zero_row, eps, lower_bound };
    ggml_set_op_params(result, &params, sizeof(params));

    result->op                         = GGML_OP_KDA_SCAN;
    result->src[GGML_KDA_SCAN_QKV]     = qkv;
    result->src[GGML_KDA_SCAN_F]       = f;
    result->src[GGML_KDA_SCAN_DT_BIAS] = dt_bias;
    result->src[GGML_KDA_SCAN_A]       = a;
    result->src[GGML_KDA_SCAN_BETA]    = beta;
    result->src[GGML_KDA_SCAN_GATE]    = gate;
    result->src[GGML_KDA_SCAN_NORM]    = norm;
    result->src[GGML_KDA_SCAN_CACHE]   = cache;
    result->src[GGML_KDA_SCAN_ROWS]    = rows;

    return result;
}
