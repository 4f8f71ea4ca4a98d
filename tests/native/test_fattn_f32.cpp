// Tests llama_fattn_fit_f32 on flash attention nodes, for caches on devices that support F32 and that do not.
// Devices and their buffers are fakes; only the last check computes something, on the CPU.

#include "check.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "llama-fattn-f32.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static const int64_t DK = 24, DV = 16, N_KV = 40, N_Q = 3, N_HEAD = 4;

static bool reads_f32(ggml_backend_dev_t, const ggml_tensor *) {
    return true;
}

static bool reads_f16(ggml_backend_dev_t, const ggml_tensor * op) {
    return op->src[1]->type == GGML_TYPE_F16 && op->src[2]->type == GGML_TYPE_F16;
}

// a buffer on a device that answers with `supports`; without it, on no device, like ggml's CPU buffers
struct fake_buffer {
    ggml_backend_device      dev  = {};
    ggml_backend_buffer_type buft = {};
    ggml_backend_buffer      buf  = {};

    explicit fake_buffer(bool (*supports)(ggml_backend_dev_t, const ggml_tensor *)) {
        dev.iface.supports_op = supports;
        buft.device           = supports ? &dev : nullptr;
        buf.buft              = &buft;
    }
};

struct attention {
    ggml_context * ctx;
    ggml_tensor *  q;
    ggml_tensor *  k;
    ggml_tensor *  v;
    ggml_tensor *  node;

    // one cache row per token; V is the first part of K, or in its own cache with the same strides
    attention(ggml_type type, ggml_backend_buffer_t buffer, bool v_in_k, bool no_alloc = true) :
        ctx(ggml_init({ 1 << 20, nullptr, no_alloc })) {
        ggml_tensor * cache_k = ggml_new_tensor_2d(ctx, type, DK, N_KV);
        ggml_tensor * cache_v = v_in_k ? cache_k : ggml_new_tensor_2d(ctx, type, DK, N_KV);
        cache_k->buffer = cache_v->buffer = buffer;

        q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, DK, N_Q, N_HEAD);
        k = ggml_view_3d(ctx, cache_k, DK, N_KV, 1, cache_k->nb[1], cache_k->nb[2], 0);
        v = ggml_view_3d(ctx, cache_v, DV, N_KV, 1, cache_v->nb[1], cache_v->nb[2], 0);
        // with soft-capped scores the CPU computes the same whether V is a view of K or not
        node = ggml_flash_attn_ext(ctx, q, k, v, nullptr, 0.2f, 0.0f, 30.0f);
    }

    ~attention() { ggml_free(ctx); }

    bool is_untouched() const { return node->src[1] == k && node->src[2] == v; }
};

static void stays_in_f32_where_the_device_reads_it() {
    fake_buffer able(reads_f32);
    fake_buffer cpu(nullptr);
    for (fake_buffer * buffer : { &able, &cpu }) {
        attention a(GGML_TYPE_F32, &buffer->buf, true);
        llama_fattn_fit_f32(a.ctx, a.node);
        CHECK(a.is_untouched());
    }
}

static void is_copied_once_where_v_is_a_view_of_k() {
    fake_buffer unable(reads_f16);
    attention   a(GGML_TYPE_F32, &unable.buf, true);
    llama_fattn_fit_f32(a.ctx, a.node);
    const ggml_tensor * k = a.node->src[1];
    const ggml_tensor * v = a.node->src[2];
    CHECK(k->type == GGML_TYPE_F16 && k->op == GGML_OP_CPY && k->src[0] == a.k && ggml_are_same_shape(k, a.k));
    CHECK(v->type == GGML_TYPE_F16 && v->view_src == k && v->view_offs == 0 && ggml_are_same_shape(v, a.v));
}

static void is_copied_twice_where_v_is_apart() {
    fake_buffer unable(reads_f16);
    attention   a(GGML_TYPE_F32, &unable.buf, false);
    llama_fattn_fit_f32(a.ctx, a.node);
    CHECK(a.node->src[1]->type == GGML_TYPE_F16 && a.node->src[1]->src[0] == a.k);
    CHECK(a.node->src[2]->type == GGML_TYPE_F16 && a.node->src[2]->src[0] == a.v);
}

static void leaves_other_types_alone() {
    fake_buffer unable(reads_f16);
    attention   a(GGML_TYPE_F16, &unable.buf, true);
    llama_fattn_fit_f32(a.ctx, a.node);
    CHECK(a.is_untouched());
}

static std::vector<float> compute(attention & a) {
    for (ggml_tensor * t : { a.q, a.k->view_src }) {
        float * x = (float *) t->data;
        for (int64_t i = 0; i < ggml_nelements(t); ++i) {
            x[i] = (float) ((i * 7919) % 1013) / 500.0f - 1.0f;
        }
    }
    ggml_cgraph * gf = ggml_new_graph(a.ctx);
    ggml_build_forward_expand(gf, a.node);
    CHECK(ggml_graph_compute_with_ctx(a.ctx, gf, 1) == GGML_STATUS_SUCCESS);
    const float * y = (const float *) a.node->data;
    return std::vector<float>(y, y + ggml_nelements(a.node));
}

// K without a buffer is copied: one copy has the same result as a copy of each
static void one_copy_computes_what_two_do() {
    attention one(GGML_TYPE_F32, nullptr, true, false);
    llama_fattn_fit_f32(one.ctx, one.node);
    CHECK(one.node->src[2]->view_src == one.node->src[1]);

    attention two(GGML_TYPE_F32, nullptr, true, false);
    two.node->src[1] = ggml_cast(two.ctx, two.k, GGML_TYPE_F16);
    two.node->src[2] = ggml_cast(two.ctx, two.v, GGML_TYPE_F16);

    CHECK(compute(one) == compute(two));
}

int main() {
    stays_in_f32_where_the_device_reads_it();
    is_copied_once_where_v_is_a_view_of_k();
    is_copied_twice_where_v_is_apart();
    leaves_other_types_alone();
    one_copy_computes_what_two_do();
    return 0;
}
