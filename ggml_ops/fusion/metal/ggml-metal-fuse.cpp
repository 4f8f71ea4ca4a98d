#include "ggml-metal-fuse.h"

#include "ggml-metal-encode.h"
#include "ggml-op-marks.h"
#include "ggml-router-nodes.h"
#include "kernels/kimi_args.metal"

#include <algorithm>
#include <string>

bool ggml_metal_fuse_allowed(const ggml_tensor * first) {
    if (ggml_op_has_mark(first, GGML_OP_MARK_UNFUSED)) {
        return false;
    }
    const ggml_backend_buffer_t buffer = first->view_src ? first->view_src->buffer : first->buffer;
    if (!buffer) {
        return true;
    }
    const auto dev = (ggml_metal_device_t) ggml_backend_buft_get_device(buffer->buft)->context;
    return ggml_metal_library_has(ggml_metal_device_get_library(dev), "fuse");
}

//
// router
//

bool ggml_metal_router_supported(const ggml_cgraph * gf, int first, int last) {
    return last == first + GGML_ROUTER_N_NODES - 1 && ggml_is_router(gf, first) &&
           ggml_metal_fuse_allowed(gf->nodes[first]);
}

static ggml_metal_pipeline_with_params get_pipeline_router(ggml_metal_library_t lib, int32_t n_expert, int32_t top_k) {
    const std::string base = "kernel_router_f32";
    const std::string name = base + "_n_expert=" + std::to_string(n_expert) + "_top_k=" + std::to_string(top_k);

    return ggml_metal_pipeline_of(lib, base, name, [&](ggml_metal_cv_t cv) {
        ggml_metal_cv_set_int32(cv, n_expert, FC_FUSE + 0);
        ggml_metal_cv_set_int32(cv, top_k, FC_FUSE + 1);
    });
}

void ggml_metal_router_encode(ggml_metal_library_t lib,
                              ggml_metal_encoder_t enc,
                              const ggml_tensor *  scores,
                              const ggml_tensor *  biased,
                              const ggml_tensor *  get_rows,
                              const ggml_tensor *  clamp,
                              const ggml_tensor *  weights) {
    const ggml_tensor * logits = scores->src[0];
    const ggml_tensor * ids    = get_rows->src[1];

    ggml_metal_kargs_router args = {};
    args.nb01                    = logits->nb[1];
    args.nb1_ids                 = ids->nb[1];
    args.min                     = ggml_get_op_params_f32(clamp, 0);
    args.max                     = ggml_get_op_params_f32(clamp, 1);
    args.scale                   = ggml_get_op_params_f32(weights, 0);

    ggml_metal_encoder_set_pipeline(enc, get_pipeline_router(lib, int32_t(logits->ne[0]), int32_t(ids->ne[0])));
    ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), 0);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(logits), 1);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(biased->src[1]), 2);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(weights), 3);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(ids), 4);

    ggml_metal_encoder_dispatch_threadgroups(enc, int(logits->ne[1]), 1, 1, 32, 1, 1);
}

//
// residual and norm
//

static bool is_f32(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t);
}

bool ggml_metal_add_norm_supported(const ggml_cgraph * gf, const int * node_idxs, int n) {
    const ggml_tensor * first = gf->nodes[node_idxs[0]];
    const ggml_tensor * add   = gf->nodes[node_idxs[n - 3]];
    const ggml_tensor * norm  = gf->nodes[node_idxs[n - 2]];
    const ggml_tensor * mul   = gf->nodes[node_idxs[n - 1]];

    if (!ggml_metal_fuse_allowed(first) || norm->src[0] != add || mul->src[0] != norm ||
        (n == 4 && add->src[0] != first)) {
        return false;
    }
    const ggml_tensor * rows[] = { first->src[0], first->src[1], first, add->src[1], add, norm, mul };
    for (const ggml_tensor * t : rows) {
        if (!is_f32(t) || !ggml_are_same_shape(t, add)) {
            return false;
        }
    }
    if (!is_f32(mul->src[1]) || mul->src[1]->ne[0] != add->ne[0] || ggml_nrows(mul->src[1]) != 1 ||
        add->ne[0] % 4 != 0) {
        return false;
    }

    const ggml_op   ops_1[] = { GGML_OP_ADD, GGML_OP_RMS_NORM, GGML_OP_MUL };
    const ggml_op   ops_2[] = { GGML_OP_ADD, GGML_OP_ADD, GGML_OP_RMS_NORM, GGML_OP_MUL };
    const int       outs[]  = { node_idxs[n - 3], node_idxs[n - 1] };
    const ggml_op * ops     = n == 4 ? ops_2 : ops_1;
    return ggml_can_fuse_subgraph_ext(gf, node_idxs, n, ops, outs, 2);
}

static ggml_metal_pipeline_with_params get_pipeline_add_norm(ggml_metal_library_t lib, int n_add) {
    const std::string name = "kernel_add_rms_norm_mul_f32_4_" + std::to_string(n_add);

    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name.c_str());
    if (!res.pipeline) {
        res = ggml_metal_library_compile_pipeline(lib, name.c_str(), name.c_str(), nullptr);
    }
    return res;
}

void ggml_metal_add_norm_encode(ggml_metal_library_t lib,
                                ggml_metal_encoder_t enc,
                                const ggml_tensor *  first,
                                const ggml_tensor *  add,
                                const ggml_tensor *  norm,
                                const ggml_tensor *  mul) {
    ggml_metal_kargs_add_rms_norm args = {};
    args.ne00_4                        = int32_t(add->ne[0] / 4);
    args.eps                           = ggml_get_op_params_f32(norm, 0);

    const ggml_metal_pipeline_with_params pipeline = get_pipeline_add_norm(lib, first ? 2 : 1);

    const int nth = std::min((args.ne00_4 + 31) / 32 * 32, ggml_metal_pipeline_max_theads_per_threadgroup(pipeline));

    const ggml_tensor * sum = first ? first : add;

    ggml_metal_encoder_set_pipeline(enc, pipeline);
    ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), 0);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(sum->src[0]), 1);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(sum->src[1]), 2);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(add->src[1]), 3);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(mul->src[1]), 4);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(add), 5);
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(mul), 6);
    ggml_metal_encoder_set_threadgroup_memory_size(enc, 32 * sizeof(float), 0);

    ggml_metal_encoder_dispatch_threadgroups(enc, int(ggml_nrows(add)), 1, 1, nth, 1, 1);
}
