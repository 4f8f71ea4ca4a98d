#include "llama-fattn-f32.h"

#include "ggml-backend.h"
#include "ggml.h"

static const ggml_tensor * base(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

// whether the backend that holds the cache supports this node unchanged
static bool is_supported(const ggml_tensor * fattn) {
    const ggml_backend_buffer_t buffer = base(fattn->src[1])->buffer;
    if (buffer == nullptr) {
        return false;  // K is a result of this graph: its backend is not known yet
    }

    // ggml's plain CPU buffer type has no device; the CPU supports F32
    const ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
    return dev == nullptr || ggml_backend_dev_supports_op(dev, fattn);
}

// whether the rows of V are the start of the rows of K
static bool is_prefix(const ggml_tensor * v, const ggml_tensor * k) {
    bool res = base(v) == base(k) && v->view_offs == k->view_offs && v->type == k->type && v->ne[0] <= k->ne[0];
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        res = res && v->ne[i] == k->ne[i] && v->nb[i] == k->nb[i];
    }
    return res && v->nb[0] == k->nb[0];
}

static ggml_tensor * to_f16(ggml_context * ctx, ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 ? ggml_cast(ctx, t, GGML_TYPE_F16) : t;
}

void llama_fattn_fit_f32(ggml_context * ctx, ggml_tensor * fattn) {
    ggml_tensor *& k = fattn->src[1];
    ggml_tensor *& v = fattn->src[2];

    if ((k->type != GGML_TYPE_F32 && v->type != GGML_TYPE_F32) || is_supported(fattn)) {
        return;
    }

    const bool v_in_k = is_prefix(v, k);

    k = to_f16(ctx, k);
    v = v_in_k ? ggml_view_4d(ctx, k, v->ne[0], v->ne[1], v->ne[2], v->ne[3], k->nb[1], k->nb[2], k->nb[3], 0)
               : to_f16(ctx, v);
}
