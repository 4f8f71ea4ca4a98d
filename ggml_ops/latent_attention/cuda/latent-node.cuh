#pragma once

// Converts a FLASH_ATTN_EXT or LATENT_ATTN node to kernel arguments, or returns why the kernels do not support it.

#include "ggml-latent-node.h"
#include "ggml.h"
#include "latent-cuda.cuh"

#include <cstring>

namespace latent_cuda {

// Checks sizes and parameters of a node against what the kernels support. Ignores addresses, so it can be called before
// allocation. Returns nullptr, or what does not fit.
static inline const char * misfit(const ggml_tensor * dst) {
    if (dst->src[1]->ne[0] != N_CACHE || dst->src[2]->ne[0] != N_LATENT) {
        return "head sizes other than 576 and 512";
    }
    return ggml_latent_absorbed_misfit(dst);
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

// The offset of a tensor's data in an allocation. Allocations of ggml-cuda begin at multiples of 128 bytes, so this is
// the address as far as alignment is concerned, and is known before anything is allocated.
static inline uintptr_t offset_of(const ggml_tensor * t) {
    return t->view_src ? t->view_offs : 0;
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
    attention placed = args;
    placed.q         = reinterpret_cast<const float *>(offset_of(q));
    placed.cache     = reinterpret_cast<const void *>(offset_of(k));
    return refused(placed);
}

// With fewer keys than this the errors of single halves do not average out, and two halves cost next to nothing.
constexpr int FEW_KEYS = 256;

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
        return "weights that are not contiguous";
    }
    read_sources(q, k, mask, dst, args);
    args.scratch = SCRATCH;
    args.exact   = ggml_op_has_mark(dst, GGML_OP_MARK_EXACT) || args.n_keys < FEW_KEYS;
    return nullptr;
}

}  // namespace latent_cuda
