// Shape checks and result of ggml_kda_conv; backends implement the computation.

#include "ggml-kda-conv.h"

#include "ggml-impl.h"

#include <string.h>

struct ggml_kda_conv_params ggml_kda_conv_get_params(const struct ggml_tensor * op) {
    GGML_ASSERT(op->op == GGML_OP_KDA_CONV);
    struct ggml_kda_conv_params params;
    memcpy(&params, op->op_params, sizeof(params));
    return params;
}

struct ggml_tensor * ggml_kda_conv(struct ggml_context *       ctx,
                                   struct ggml_tensor * const  sources[GGML_KDA_CONV_N_SRC],
                                   struct ggml_kda_conv_params params) {
    const struct ggml_tensor * q     = sources[GGML_KDA_CONV_Q];
    const struct ggml_tensor * cache = sources[GGML_KDA_CONV_CACHE];
    const struct ggml_tensor * rows  = sources[GGML_KDA_CONV_ROWS];

    const int64_t C = q->ne[0];
    const int64_t T = q->ne[1];
    const int64_t S = q->ne[2];

    for (int x = GGML_KDA_CONV_Q; x <= GGML_KDA_CONV_V; ++x) {
        const struct ggml_tensor * input  = sources[x];
        const struct ggml_tensor * weight = sources[GGML_KDA_CONV_WQ + x];
        GGML_ASSERT(input->type == GGML_TYPE_F32 && input->nb[0] == sizeof(float));
        GGML_ASSERT(input->ne[0] == C && input->ne[1] == T && input->ne[2] == S && input->ne[3] == 1);
        GGML_ASSERT(weight->type == GGML_TYPE_F32 && ggml_is_contiguous(weight));
        GGML_ASSERT(ggml_nelements(weight) == GGML_KDA_CONV_WIDTH * C);
    }
    GGML_ASSERT(cache->type == GGML_TYPE_F32 && cache->nb[0] == sizeof(float) && ggml_is_matrix(cache));
    GGML_ASSERT(cache->ne[0] == 3 * (GGML_KDA_CONV_WIDTH - 1) * C);
    GGML_ASSERT(rows->type == GGML_TYPE_I32 && rows->nb[0] == sizeof(int32_t));
    GGML_ASSERT(rows->ne[0] == S && ggml_is_vector(rows));
    GGML_ASSERT(params.head_size > 0 && C % params.head_size == 0);
    GGML_ASSERT(params.n_snapshots >= 1);
    GGML_ASSERT(params.zero_row >= -1 && params.zero_row < cache->ne[1]);

    struct ggml_tensor * result =
        ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 3 * C, T * S + (GGML_KDA_CONV_WIDTH - 1) * S * params.n_snapshots);

    ggml_set_op_params(result, &params, sizeof(params));

    result->op = GGML_OP_KDA_CONV;
    for (int i = GGML_KDA_CONV_Q; i < GGML_KDA_CONV_N_SRC; ++i) {
        result->src[i] = sources[i];
    }

    return result;
}
