#pragma once

// Converts a FLASH_ATTN_EXT or LATENT_ATTN node to kernel arguments, or returns why the kernels do not support it.

#include "ggml-op-marks.h"
#include "ggml.h"
#include "latent-cuda.cuh"

#include <cstring>

namespace latent_cuda {

// Checks sizes and parameters of a node against what the kernels support. Ignores addresses, so it can be called before
// allocation. Returns nullptr, or what does not fit.
static inline const char * misfit(const ggml_tensor * dst) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    float params[3];  // scale, max_bias, logit_softcap
    memcpy(params, dst->op_params, sizeof(params));
    const auto view_of = [](const ggml_tensor * t) { return t->view_src ? t->view_src : t; };
    const struct {
        bool         wrong;
        const char * what;
    } checks[] = {
        { ggml_op_has_mark(dst, GGML_OP_MARK_UPSTREAM), "switched off" },
        { k->ne[0] != N_CACHE || v->ne[0] != N_LATENT, "head sizes other than 576 and 512" },
        { k->ne[2] != 1 || v->ne[2] != 1, "more than one KV head" },
        { k->ne[3] != q->ne[3] || v->ne[3] != q->ne[3], "streams that share a cache" },
        { v->type != k->type || view_of(v) != view_of(k) || v->view_offs != k->view_offs || v->ne[1] != k->ne[1] ||
              v->nb[0] != k->nb[0] || v->nb[1] != k->nb[1] || v->nb[3] != k->nb[3],
          "V that is not the beginning of K" },
        { q->type != GGML_TYPE_F32 || dst->type != GGML_TYPE_F32, "q or a result that is not F32" },
        { mask && (mask->type != GGML_TYPE_F16 || mask->ne[2] != 1), "a mask for each head" },
        { mask && q->ne[3] % mask->ne[3] != 0, "a mask of other streams" },
        { dst->src[4] != nullptr, "attention sinks" },
        { params[1] != 0.0f, "ALiBi" },
        { params[2] != 0.0f, "soft-capped scores" },
    };
    for (const auto & check : checks) {
        if (check.wrong) {
            return check.what;
        }
    }
    return nullptr;
}

static inline bool find_cache_type(ggml_type type, cache_type & found) {
    const struct {
        ggml_type  ggml;
        cache_type ours;
    } types[] = {
        { GGML_TYPE_F32, cache_type::f32 },   { GGML_TYPE_F16, cache_type::f16 },
        { GGML_TYPE_BF16, cache_type::bf16 }, { GGML_TYPE_Q8_0, cache_type::q8_0 },
        { GGML_TYPE_Q4_0, cache_type::q4_0 },
    };
    for (const auto & each : types) {
        if (each.ggml == type) {
            found = each.ours;
            return true;
        }
    }
    return false;
}

// Sources common to both operators.
static inline void read_sources(
    const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * mask, const ggml_tensor * dst, attention & args) {
    memcpy(&args.scale, dst->op_params, sizeof(args.scale));
    args.q            = static_cast<const float *>(q->data);
    args.q_query      = q->nb[1] / sizeof(float);
    args.q_head       = q->nb[2] / sizeof(float);
    args.q_stream     = q->nb[3] / sizeof(float);
    args.cache        = k->data;
    args.cache_row    = k->nb[1];
    args.cache_stream = k->nb[3];
    args.mask_streams = 1;
    if (mask) {
        args.mask         = static_cast<const uint16_t *>(mask->data);
        args.mask_query   = mask->nb[1] / sizeof(uint16_t);
        args.mask_stream  = mask->nb[3] / sizeof(uint16_t);
        args.mask_streams = mask->ne[3];
    }
    args.out       = static_cast<float *>(dst->data);
    args.n_keys    = k->ne[1];
    args.n_queries = q->ne[1];
    args.n_heads   = q->ne[2];
    args.n_streams = q->ne[3];
}

// Returns nullptr, or why the kernels do not support the node.
static inline const char * read_node(const ggml_tensor * dst, attention & args) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * mask = dst->src[3];

    if (const char * why = misfit(dst)) {
        return why;
    }
    args = {};
    if (!find_cache_type(k->type, args.type)) {
        return "a type of cache that the kernels do not read";
    }
    read_sources(q, k, mask, dst, args);
    return refused(args);
}

// The same for LATENT_ATTN. The caller has to convert k_b and v_b to float.
static inline const char * read_decompressed(const ggml_tensor * dst, decompressed & args) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * k_b  = dst->src[2];
    const ggml_tensor * v_b  = dst->src[3];
    const ggml_tensor * mask = dst->src[4];

    args = {};
    if (k_b->ne[0] != N_NOPE || k_b->ne[1] != N_LATENT || k->ne[0] != N_CACHE || v_b->ne[1] != N_VALUE) {
        return "head sizes other than 128 + 64 and 128, or a latent other than 512";
    }
    if (!find_cache_type(k->type, args.type)) {
        return "a type of cache that the kernels do not read";
    }
    if (!ggml_is_contiguous(k_b) || !ggml_is_contiguous(v_b)) {
        return "weights that do not lie one behind the other";
    }
    read_sources(q, k, mask, dst, args);
    args.scratch = SCRATCH;
    return nullptr;
}

}  // namespace latent_cuda
