#include "ggml-metal-kda.h"

#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"
#include "ggml-kda-state.h"
#include "ggml-metal-encode.h"
#include "kernels/kimi_args.metal"

#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

// Kernels access four floats at once.
static constexpr size_t ALIGNMENT = 16;

static bool rows_aligned(const ggml_tensor * t) {
    return t->nb[1] % ALIGNMENT == 0 && t->nb[2] % ALIGNMENT == 0 && t->nb[3] % ALIGNMENT == 0 &&
           t->view_offs % ALIGNMENT == 0;
}

static int64_t head_size_of(const ggml_tensor * op) {
    return op->op == GGML_OP_KDA_CONV ? ggml_kda_conv_get_params(op).head_size : op->src[GGML_KDA_SCAN_F]->ne[0];
}

static int n_simdgroups_of(const ggml_tensor * op) {
    return op->op == GGML_OP_KDA_CONV ? OP_KDA_CONV_NSG : int(head_size_of(op)) * OP_KDA_SCAN_NL / 32;
}

static bool is_bounded(const ggml_tensor * op) {
    return op->op == GGML_OP_KDA_SCAN && ggml_kda_scan_get_params(op).lower_bound > -INFINITY;
}

static ggml_metal_pipeline_with_params get_pipeline(ggml_metal_library_t lib, const ggml_tensor * op, bool elide) {
    const bool        scan    = op->op == GGML_OP_KDA_SCAN;
    const bool        bounded = is_bounded(op);
    const std::string kernel  = scan ? "kernel_kda_scan_f32_" : "kernel_kda_conv_f32_";
    const std::string base    = kernel + std::to_string(head_size_of(op));
    const std::string name    = base + "_elide=" + std::to_string(elide) + "_bounded=" + std::to_string(bounded);

    return ggml_metal_pipeline_of(lib, base, name, [&](ggml_metal_cv_t cv) {
        ggml_metal_cv_set_bool(cv, elide, FC_KDA + 0);
        ggml_metal_cv_set_bool(cv, bounded, FC_KDA + 1);
    });
}

// Whether both kernels compiled and their threadgroups can be large enough. It is found once: ggml-metal would compile a
// kernel that failed again for each node.
static bool kernels_fit(ggml_metal_library_t lib, const ggml_tensor * op) {
    using Kernel = std::tuple<ggml_metal_library_t, ggml_op, int64_t, bool>;
    static std::mutex             mutex;
    static std::map<Kernel, bool> known;
    std::lock_guard<std::mutex>   lock(mutex);

    const Kernel key   = { lib, op->op, head_size_of(op), is_bounded(op) };
    const auto   entry = known.find(key);
    if (entry != known.end()) {
        return entry->second;
    }
    const int n_threads = 32 * n_simdgroups_of(op);
    return known[key]   = ggml_metal_pipeline_allows(get_pipeline(lib, op, false), n_threads) &&
                          ggml_metal_pipeline_allows(get_pipeline(lib, op, true), n_threads);
}

bool ggml_metal_kda_supported(ggml_metal_library_t lib, const ggml_tensor * op) {
    bool aligned = rows_aligned(ggml_kda_get_states(op).cache);
    if (op->op == GGML_OP_KDA_CONV) {
        for (int i = GGML_KDA_CONV_Q; i <= GGML_KDA_CONV_WV; ++i) {
            aligned = aligned && rows_aligned(op->src[i]);
        }
    } else {
        for (const int i : { GGML_KDA_SCAN_QKV, GGML_KDA_SCAN_F, GGML_KDA_SCAN_GATE }) {
            aligned = aligned && rows_aligned(op->src[i]);
        }
        for (const int i : { GGML_KDA_SCAN_DT_BIAS, GGML_KDA_SCAN_NORM }) {
            aligned = aligned && op->src[i]->view_offs % ALIGNMENT == 0;
        }
    }
    const int64_t head_size = head_size_of(op);
    if (!aligned || (head_size != 64 && head_size != 128)) {
        return false;
    }
    return kernels_fit(lib, op);
}

bool ggml_metal_kda_elides(const ggml_cgraph * gf, int node_n, const ggml_tensor * cpy) {
    const ggml_kda_state_copy copy = ggml_kda_find_state_copy(gf, node_n);
    // nodes for cells outside the batch must run between operator and copy
    return copy.to != nullptr && copy.gather == nullptr && copy.to == cpy->src[1];
}

static ggml_metal_kargs_kda_states states_of(const ggml_tensor * op, const ggml_tensor * to) {
    const ggml_kda_states st  = ggml_kda_get_states(op);
    const size_t          row = st.cache->nb[1];

    ggml_metal_kargs_kda_states args = {};
    args.ns_row                      = row / sizeof(float);
    args.size                        = st.cache->ne[0];
    args.offs                        = st.offset / sizeof(float);
    args.n_seqs                      = st.rows->ne[0];
    args.n_slots                     = st.n_written;
    args.zero_row                    = st.zero_row;
    if (to) {
        args.first_row = ((const char *) to->data - (const char *) st.cache->data) / row;
        args.slot_rows = to->nb[2] / row;
    }
    return args;
}

// The arguments after the sources, which both kernels have.
static void set_buffers(ggml_metal_encoder_t enc, const ggml_tensor * op, int n_src) {
    int ida = 1;
    for (int i = 0; i < n_src; ++i) {
        ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(op->src[i]), ida++);
    }
    ggml_metal_encoder_set_buffer(enc, ggml_metal_buffer_of(op), ida++);
}

static void
encode_conv(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * op, const ggml_tensor * to) {
    const ggml_kda_conv_params params = ggml_kda_conv_get_params(op);
    const ggml_tensor *        q      = op->src[GGML_KDA_CONV_Q];
    const ggml_tensor *        k      = op->src[GGML_KDA_CONV_K];
    const ggml_tensor *        v      = op->src[GGML_KDA_CONV_V];

    ggml_metal_kargs_kda_conv args = {
        /*.st       =*/states_of(op, to),
        /*.nb01     =*/q->nb[1],
        /*.nb02     =*/q->nb[2],
        /*.nb11     =*/k->nb[1],
        /*.nb12     =*/k->nb[2],
        /*.nb21     =*/v->nb[1],
        /*.nb22     =*/v->nb[2],
        /*.n_heads  =*/(int32_t) (q->ne[0] / params.head_size),
        /*.n_tokens =*/(int32_t) q->ne[1],
        /*.eps      =*/params.eps,
    };

    ggml_metal_encoder_set_pipeline(enc, get_pipeline(lib, op, to != nullptr));
    ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), 0);
    set_buffers(enc, op, GGML_KDA_CONV_N_SRC);

    const int nsg = n_simdgroups_of(op);
    const int nt  = OP_KDA_CONV_NT;
    ggml_metal_encoder_dispatch_threadgroups(enc, (3 * args.n_heads + nsg - 1) / nsg, (args.n_tokens + nt - 1) / nt,
                                             args.st.n_seqs, 32, nsg, 1);
}

static void
encode_scan(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * op, const ggml_tensor * to) {
    const ggml_kda_scan_params params = ggml_kda_scan_get_params(op);
    const ggml_tensor *        qkv    = op->src[GGML_KDA_SCAN_QKV];
    const ggml_tensor *        f      = op->src[GGML_KDA_SCAN_F];
    const ggml_tensor *        beta   = op->src[GGML_KDA_SCAN_BETA];
    const ggml_tensor *        gate   = op->src[GGML_KDA_SCAN_GATE];

    ggml_metal_kargs_kda_scan args = {
        /*.st          =*/states_of(op, to),
        /*.nb01        =*/qkv->nb[1],
        /*.nb02        =*/qkv->nb[2],
        /*.nb03        =*/qkv->nb[3],
        /*.nb11        =*/f->nb[1],
        /*.nb12        =*/f->nb[2],
        /*.nb13        =*/f->nb[3],
        /*.nb21        =*/beta->nb[1],
        /*.nb22        =*/beta->nb[2],
        /*.nb31        =*/gate->nb[1],
        /*.nb32        =*/gate->nb[2],
        /*.nb33        =*/gate->nb[3],
        /*.n_heads     =*/(int32_t) f->ne[1],
        /*.n_tokens    =*/(int32_t) f->ne[2],
        /*.eps         =*/params.eps,
        /*.lower_bound =*/params.lower_bound,
    };

    ggml_metal_encoder_set_pipeline(enc, get_pipeline(lib, op, to != nullptr));
    ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), 0);
    set_buffers(enc, op, GGML_KDA_SCAN_N_SRC);

    ggml_metal_encoder_dispatch_threadgroups(enc, args.n_heads, args.st.n_seqs, 1, 32, n_simdgroups_of(op), 1);
}

void ggml_metal_kda_encode(ggml_metal_library_t lib,
                           ggml_metal_encoder_t enc,
                           const ggml_tensor *  op,
                           const ggml_tensor *  to) {
    if (op->op == GGML_OP_KDA_CONV) {
        encode_conv(lib, enc, op, to);
    } else {
        encode_scan(lib, enc, op, to);
    }
}
