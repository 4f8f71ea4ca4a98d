// Shape checks and result of ggml_kda_scan; backends implement the computation.

#include "ggml-kda-scan.h"

#include "ggml-impl.h"

#include <string.h>

bool ggml_kda_head_size_supported(int64_t head_size) {
#define IS_EQUAL_OR(n) head_size == n ||
    return GGML_KDA_HEAD_SIZES(IS_EQUAL_OR) false;
#undef IS_EQUAL_OR
}

struct ggml_kda_scan_params ggml_kda_scan_get_params(const struct ggml_tensor * op) {
    GGML_ASSERT(op->op == GGML_OP_KDA_SCAN);
    struct ggml_kda_scan_params params;
    memcpy(&params, op->op_params, sizeof(params));
    return params;
}

// float32 with contiguous rows; any strides between rows
static bool has_packed_rows(const struct ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float);
}

static bool is_packed(const struct ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t);
}

static bool has_shape(const struct ggml_tensor * t, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    return t->ne[0] == ne0 && t->ne[1] == ne1 && t->ne[2] == ne2 && t->ne[3] == ne3;
}

static bool has_rows(const struct ggml_tensor * t, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    return has_packed_rows(t) && has_shape(t, ne0, ne1, ne2, ne3);
}

struct ggml_tensor * ggml_kda_scan(struct ggml_context *       ctx,
                                   struct ggml_tensor * const  sources[GGML_KDA_SCAN_N_SRC],
                                   struct ggml_kda_scan_params params) {
    const struct ggml_tensor * f       = sources[GGML_KDA_SCAN_F];
    const struct ggml_tensor * dt_bias = sources[GGML_KDA_SCAN_DT_BIAS];
    const struct ggml_tensor * a       = sources[GGML_KDA_SCAN_A];
    const struct ggml_tensor * norm    = sources[GGML_KDA_SCAN_NORM];
    const struct ggml_tensor * cache   = sources[GGML_KDA_SCAN_CACHE];
    const struct ggml_tensor * rows    = sources[GGML_KDA_SCAN_ROWS];

    const int64_t D = f->ne[0];
    const int64_t H = f->ne[1];
    const int64_t T = f->ne[2];
    const int64_t S = f->ne[3];

    GGML_ASSERT(has_rows(sources[GGML_KDA_SCAN_QKV], D, 3 * H, T, S));
    GGML_ASSERT(has_packed_rows(f));
    GGML_ASSERT(is_packed(dt_bias) && ggml_nelements(dt_bias) == D * H);
    GGML_ASSERT(is_packed(a) && ggml_nelements(a) == H);
    GGML_ASSERT(has_rows(sources[GGML_KDA_SCAN_BETA], H, T, S, 1));
    GGML_ASSERT(has_rows(sources[GGML_KDA_SCAN_GATE], D, H, T, S));
    GGML_ASSERT(is_packed(norm) && ggml_nelements(norm) == D);
    GGML_ASSERT(has_packed_rows(cache) && ggml_is_matrix(cache) && cache->ne[0] == D * D * H);
    GGML_ASSERT(rows->type == GGML_TYPE_I32 && rows->nb[0] == sizeof(int32_t) && has_shape(rows, S, 1, 1, 1));
    GGML_ASSERT(params.n_snapshots >= 1);
    GGML_ASSERT(params.zero_row >= -1 && params.zero_row < cache->ne[1]);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, D * H, T * S + D * S * params.n_snapshots);

    ggml_set_op_params(result, &params, sizeof(params));

    result->op = GGML_OP_KDA_SCAN;
    for (int i = GGML_KDA_SCAN_QKV; i < GGML_KDA_SCAN_N_SRC; ++i) {
        result->src[i] = sources[i];
    }

    return result;
}
