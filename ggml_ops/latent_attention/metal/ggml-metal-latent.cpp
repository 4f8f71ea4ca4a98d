#include "ggml-metal-latent.h"

#include "ggml-impl.h"
#include "ggml-latent-node.h"
#include "ggml-metal-encode.h"
#include "kernels/kimi_args.metal"

#include <cstdio>

// The keys of a stream are split so that its blocks of rows give at most MAX_GROUPS threadgroups: about two for each core
// of the largest devices except the Ultras. A split has MIN_KEYS << n keys, which does not depend on other streams.
static constexpr int64_t MIN_KEYS   = 64;
static constexpr int64_t MAX_GROUPS = 64;

namespace {

struct Plan {
    int64_t n_rows;  // of a stream
    int64_t n_blocks;
    int64_t n_split_keys;
    int64_t n_splits;
};

}  // namespace

static Plan make_plan(const ggml_tensor * op) {
    const ggml_tensor * q      = op->src[0];
    const int64_t       n_keys = op->src[1]->ne[1];

    Plan p;
    p.n_rows            = q->ne[1] * q->ne[2];
    p.n_blocks          = (p.n_rows + OP_FLASH_ATTN_EXT_LATENT_NR - 1) / OP_FLASH_ATTN_EXT_LATENT_NR;
    p.n_split_keys      = MIN_KEYS;
    const auto n_splits = [&] { return (n_keys + p.n_split_keys - 1) / p.n_split_keys; };
    while (n_splits() > 1 && n_splits() * p.n_blocks > MAX_GROUPS) {
        p.n_split_keys *= 2;
    }
    p.n_splits = n_splits();
    return p;
}

// The alignment that rows of the cache need for the loads in fa_latent.metal. 0: not supported.
static size_t alignment_of(ggml_type type) {
    switch (type) {
    case GGML_TYPE_F32:
        return 16;
    case GGML_TYPE_F16:
    case GGML_TYPE_BF16:
        return 8;
    case GGML_TYPE_Q8_0:
    case GGML_TYPE_Q4_0:
        return 2;
    default:
        return 0;
    }
}

static bool rows_aligned(const ggml_tensor * t, size_t alignment) {
    return t->nb[1] % alignment == 0 && t->nb[2] % alignment == 0 && t->nb[3] % alignment == 0 &&
           t->view_offs % alignment == 0;
}

static bool supported(const ggml_tensor * op) {
    const ggml_tensor * q         = op->src[0];
    const ggml_tensor * k         = op->src[1];
    const size_t        alignment = alignment_of(k->type);
    return k->ne[0] == 576 && op->src[2]->ne[0] == 512 && alignment != 0 && rows_aligned(k, alignment) &&
           rows_aligned(q, 16) && ggml_latent_absorbed_misfit(op) == nullptr;
}

size_t ggml_metal_latent_extra(const ggml_tensor * op) {
    if (!supported(op)) {
        return 0;
    }
    const Plan p = make_plan(op);
    if (p.n_splits == 1) {
        return 0;
    }
    // the splits' results, their sums and their largest scores
    return p.n_splits * p.n_rows * op->src[0]->ne[3] * (op->ne[0] + 2) * sizeof(float);
}

// Memory after dst.
static ggml_metal_buffer_id scratch_of(const ggml_tensor * op) {
    ggml_metal_buffer_id result = ggml_metal_buffer_of(op);
    result.offs += ggml_nbytes(op);
    return result;
}

static ggml_metal_pipeline_with_params get_pipeline(ggml_metal_library_t lib, const ggml_tensor * op) {
    const ggml_tensor * k        = op->src[1];
    const bool          has_mask = op->src[3] != nullptr;

    char base[256];
    char name[256];

    snprintf(base, 256, "kernel_flash_attn_ext_latent_%s_dk%d_dv%d", ggml_type_name(k->type), (int) k->ne[0],
             (int) op->ne[0]);
    snprintf(name, 256, "%s_mask=%d", base, has_mask);

    return ggml_metal_pipeline_of(lib, base, name, [&](ggml_metal_cv_t cv) {
        ggml_metal_cv_set_bool(cv, has_mask, FC_FLASH_ATTN_EXT_LATENT + 0);
    });
}

int ggml_metal_latent_attend(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * op) {
    if (!supported(op) || !ggml_metal_library_has(lib, "fa_latent")) {
        return 0;
    }

    const auto pipeline = get_pipeline(lib, op);
    const int  nsg      = OP_FLASH_ATTN_EXT_LATENT_NSG;
    if (!ggml_metal_pipeline_allows(pipeline, 32 * nsg)) {
        return 0;
    }

    const ggml_tensor * q    = op->src[0];
    const ggml_tensor * k    = op->src[1];
    const ggml_tensor * mask = op->src[3];
    const Plan          p    = make_plan(op);

    ggml_metal_kargs_flash_attn_ext_latent args = {
        /*.ne01  =*/(int32_t) q->ne[1],
        /*.ne02  =*/(int32_t) q->ne[2],
        /*.ne03  =*/(int32_t) q->ne[3],
        /*.nb01  =*/q->nb[1],
        /*.nb02  =*/q->nb[2],
        /*.nb03  =*/q->nb[3],
        /*.ne11  =*/(int32_t) k->ne[1],
        /*.nb11  =*/k->nb[1],
        /*.nb13  =*/k->nb[3],
        /*.ne33  =*/mask ? (int32_t) mask->ne[3] : 1,
        /*.nb31  =*/mask ? mask->nb[1] : 0,
        /*.nb33  =*/mask ? mask->nb[3] : 0,
        /*.nkps  =*/(int32_t) p.n_split_keys,
        /*.ns    =*/(int32_t) p.n_splits,
        /*.scale =*/ggml_get_op_params_f32(op, 0),
    };

    // a tile of keys, the scores of the slices of the head size, diagonal matrices
    const int    nr   = OP_FLASH_ATTN_EXT_LATENT_NR;
    const size_t smem = sizeof(float) * (8 * (k->ne[0] + 8) + (nsg / (nr / 8)) * nr * (16 + 4) + 8 * nr);

    ggml_metal_encoder_set_pipeline(enc, pipeline);
    ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), 0);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(q), 1);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(k), 2);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(mask ? mask : q), 3);
    ggml_metal_encoder_set_buffer(enc, p.n_splits > 1 ? scratch_of(op) : ggml_metal_buffer_of(op), 4);
    ggml_metal_encoder_set_threadgroup_memory_size(enc, smem, 0);

    ggml_metal_encoder_dispatch_threadgroups(enc, p.n_blocks, p.n_splits, q->ne[3], 32, nsg, 1);

    return p.n_splits;
}

void ggml_metal_latent_reduce(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * op) {
    const char * name     = "kernel_flash_attn_ext_latent_reduce";
    auto         pipeline = ggml_metal_library_get_pipeline(lib, name);
    if (!pipeline.pipeline) {
        pipeline = ggml_metal_library_compile_pipeline(lib, name, name, nullptr);
    }

    ggml_metal_kargs_flash_attn_ext_latent_reduce args = {
        /*.nrows =*/(int32_t) ggml_nrows(op),
        /*.ns    =*/(int32_t) make_plan(op).n_splits,
    };

    ggml_metal_encoder_set_pipeline(enc, pipeline);
    ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), 0);
    ggml_metal_encoder_set_buffer(enc, scratch_of(op), 1);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(op), 2);

    ggml_metal_encoder_dispatch_threadgroups(enc, args.nrows, 1, 1, op->ne[0] / 4, 1, 1);
}
