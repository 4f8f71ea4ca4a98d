#pragma once

// Which FLASH_ATTN_EXT nodes are absorbed latent attention, for kernels of GPUs. Specification: the operator's README.

#include "ggml-op-marks.h"
#include "ggml.h"

#include <stdbool.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

static inline bool ggml_latent_v_begins_k(const struct ggml_tensor * k, const struct ggml_tensor * v) {
    return v->type == k->type && (v->view_src ? v->view_src : v) == (k->view_src ? k->view_src : k) &&
           v->view_offs == k->view_offs && v->ne[1] == k->ne[1] && v->nb[0] == k->nb[0] && v->nb[1] == k->nb[1] &&
           v->nb[3] == k->nb[3];
}

// Returns NULL, or why the node does not fit. Does not use addresses, so it can be called before allocation.
static inline const char * ggml_latent_absorbed_misfit(const struct ggml_tensor * dst) {
    const struct ggml_tensor * q    = dst->src[0];
    const struct ggml_tensor * k    = dst->src[1];
    const struct ggml_tensor * v    = dst->src[2];
    const struct ggml_tensor * mask = dst->src[3];

    float params[3];  // scale, max_bias, logit_softcap
    memcpy(params, dst->op_params, sizeof(params));
    const struct {
        bool         wrong;
        const char * what;
    } checks[] = {
        { ggml_op_has_mark(dst, GGML_OP_MARK_UPSTREAM), "switched off" },
        { k->ne[2] != 1 || v->ne[2] != 1, "more than one KV head" },
        { k->ne[3] != q->ne[3] || v->ne[3] != q->ne[3], "streams that share a cache" },
        { !ggml_latent_v_begins_k(k, v), "V that is not the beginning of K" },
        { q->type != GGML_TYPE_F32 || dst->type != GGML_TYPE_F32, "q or a result that is not F32" },
        { mask && (mask->type != GGML_TYPE_F16 || mask->ne[2] != 1), "a mask for each head" },
        { mask && q->ne[3] % mask->ne[3] != 0, "a mask of other streams" },
        { dst->src[4] != NULL, "attention sinks" },
        { params[1] != 0.0f, "ALiBi" },
        { params[2] != 0.0f, "soft-capped scores" },
        { dst->op_params[4] != 0, "sparse" },  // ggml_flash_attn_ext_set_n_kv_max: few keys are visible
    };
    for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); ++i) {
        if (checks[i].wrong) {
            return checks[i].what;
        }
    }
    return NULL;
}

#ifdef __cplusplus
}
#endif
