// Included by ggml-metal-ops.cpp, after ggml_metal_op_concurrency_check: encodes KDA's operators and our runs of nodes.

#pragma once

#include "ggml-metal-fuse.h"
#include "ggml-metal-kda.h"

int ggml_metal_op_kda(ggml_metal_op_t ctx, int idx) {
    const ggml_tensor * op = ctx->node(idx);
    const ggml_tensor * to = nullptr;

    int n_fuse = 1;

    if (ctx->use_fusion()) {
        const ggml_metal_fusion * fusion = ctx->can_fuse(idx, GGML_METAL_FUSION_FULL, &n_fuse);

        if (fusion) {
            to = ctx->node(idx + 1)->src[1];

            ctx->count_fusions(fusion);
        }
    }

    ggml_metal_kda_encode(ctx->lib, ctx->enc, op, to);

    return n_fuse;
}

// kernels with several outputs: none of the nodes may depend on what runs concurrently
static void ggml_metal_op_concurrency_check_all(ggml_metal_op_t ctx, int idx, int n_fuse) {
    for (int i = 1; i < n_fuse; ++i) {
        if (!ggml_metal_op_concurrency_check(ctx, ctx->node(idx + i))) {
            ggml_metal_op_concurrency_reset(ctx);

            break;
        }
    }
}

int ggml_metal_op_router(ggml_metal_op_t ctx, int idx) {
    int                       n_fuse = 1;
    const ggml_metal_fusion * fusion = ctx->can_fuse(idx, GGML_METAL_FUSION_FULL, &n_fuse);

    ggml_metal_op_concurrency_check_all(ctx, idx, n_fuse);

    ggml_metal_router_encode(ctx->lib, ctx->enc, ctx->node(idx), ctx->node(idx + 1), ctx->node(idx + 3),
                             ctx->node(idx + 5), ctx->node(idx + 7));

    ctx->count_fusions(fusion);

    return n_fuse;
}

int ggml_metal_op_add_norm(ggml_metal_op_t ctx, int idx) {
    int                       n_fuse = 1;
    const ggml_metal_fusion * fusion = ctx->can_fuse(idx, GGML_METAL_FUSION_FULL, &n_fuse);

    ggml_metal_op_concurrency_check_all(ctx, idx, n_fuse);

    const int last = idx + n_fuse - 1;
    ggml_metal_add_norm_encode(ctx->lib, ctx->enc, n_fuse == 4 ? ctx->node(idx) : nullptr, ctx->node(last - 2),
                               ctx->node(last - 1), ctx->node(last));

    ctx->count_fusions(fusion);

    return n_fuse;
}
