#include "llama-kda.h"

#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

static_assert(LLAMA_MANY_TOKENS == GGML_KDA_SCAN_CHUNKED_FROM, "from as many tokens KDA_SCAN computes chunks");

// a constant of the reference, independent of rms_norm_eps
static constexpr float KDA_L2_NORM_EPS = 1e-6f;

// What the tensors of a layer do not tell: which architectures have KDA layers, and whether their ssm_a is exp(A_log)
// instead of -exp(A_log).
struct Family {
    llm_arch arch;
    bool     positive_a;
};

static constexpr Family families[] = {
    { LLM_ARCH_KIMI_LINEAR, false },
    { LLM_ARCH_BAILINGMOE3, true },
    { LLM_ARCH_GLM5_NEXT, false },
    { LLM_ARCH_KIMI_K3, false },
};

static const Family * family_of(llm_arch arch) {
    const auto * end    = std::end(families);
    const auto * family = std::find_if(families, end, [&](const Family & candidate) { return candidate.arch == arch; });
    return family == end ? nullptr : family;
}

// Logs the reason, once per context: upstream's graph is used instead. Throws if `ops` requires the operators.
static bool refuse(const llama_kimi_ops & ops, const std::string & reason) {
    if (ops.require) {
        throw std::runtime_error("KIMI_OPS=require: KDA operators cannot be used: " + reason);
    }
    LLAMA_LOG_WARN("kda: operators not used, upstream's graph instead: %s\n", reason.c_str());
    return false;
}

bool llama_kda_is_family(const llama_model & model) {
    return family_of(model.arch) != nullptr;
}

bool llama_kda_wanted(const llama_model & model, const llama_kimi_ops & ops) {
    if (!llama_kda_is_family(model)) {
        return false;
    }
    if (!ops.conv && !ops.scan) {
        LLAMA_LOG_INFO("kda: operators switched off by KIMI_OPS, upstream's graph instead\n");
        return false;
    }
    if (!ops.conv || !ops.scan) {
        return refuse(ops, "conv and scan go together, KIMI_OPS names one of them");
    }
    const auto & hparams = model.hparams;
    if (!ggml_kda_head_size_supported(hparams.n_embd_head_kda)) {
        return refuse(ops, "no kernel for head size " + std::to_string(hparams.n_embd_head_kda));
    }
    if (hparams.ssm_d_conv != GGML_KDA_CONV_WIDTH) {
        return refuse(ops, "no kernel for convolutions of width " + std::to_string(hparams.ssm_d_conv));
    }
    for (int il = 0; il < (int) hparams.n_layer(); ++il) {
        if (!hparams.is_recr(il)) {
            continue;
        }
        const auto & layer = model.layers[il];
        for (const ggml_tensor * t :
             { layer.ssm_q_conv, layer.ssm_k_conv, layer.ssm_v_conv, layer.ssm_dt_b, layer.ssm_a, layer.ssm_o_norm }) {
            if (t && t->type != GGML_TYPE_F32) {  // a file of draft layers has no others
                return refuse(ops, std::string(t->name) + " is " + ggml_type_name(t->type) + ", not f32");
            }
        }
    }
    return true;
}

bool llama_kda_resolve(const llama_model &                                                        model,
                       const llama_kimi_ops &                                                     ops,
                       const std::function<const std::vector<llm_graph_fused_node> &(uint32_t)> & probe) {
    for (const uint32_t n_tokens : { 1, 64 }) {
        for (const auto & node : probe(n_tokens)) {
            if (node.op != LLM_FUSED_OP_KDA) {
                continue;
            }
            ggml_backend_dev_t dev = model.dev_layer(node.il);
            if (dev && !ggml_backend_dev_supports_op(dev, node.tensor)) {
                return refuse(ops, std::string(ggml_backend_dev_name(dev)) + ", which holds layer " +
                                       std::to_string(node.il) + ", does not have " + ggml_op_name(node.tensor->op));
            }
        }
    }
    LLAMA_LOG_INFO("kda: operators in use\n");
    return true;
}

// Appends the copies of states to the cells that follow those of the batch. They read the cache after the operator has
// read it, and write to it before the new states are stored.
static void copy_extra_states(const llm_graph_context & g, llm_graph_input_rs * inp, ggml_tensor * cache) {
    const auto *  mctx    = inp->mctx;
    const int64_t n_seqs  = g.ubatch.n_seqs;
    const int64_t n_extra = mctx->get_n_rs() - n_seqs;
    if (n_extra == 0) {
        return;
    }
    const int32_t zero_row = mctx->get_rs_z();
    if (zero_row >= 0) {
        ggml_tensor * row = ggml_view_1d(g.ctx0, cache, cache->ne[0], zero_row * cache->nb[1]);
        ggml_build_forward_expand(g.gf, ggml_fill_inplace(g.ctx0, row, 0.0f));
    }
    ggml_tensor * from = ggml_get_rows(g.ctx0, cache, inp->s_copy_extra);
    ggml_tensor * to =
        ggml_view_2d(g.ctx0, cache, cache->ne[0], n_extra, cache->nb[1], (mctx->get_head() + n_seqs) * cache->nb[1]);
    ggml_build_forward_expand(g.gf, ggml_cpy(g.ctx0, from, to));
}

// Appends to the graph: op, and the copy of its new states to the cache. The new states follow the n_out output values
// of op; snapshot s of each sequence goes to group s of the cells.
static void store_states(const llm_graph_context & g,
                         llm_graph_input_rs *      inp,
                         ggml_tensor *             cache,
                         ggml_tensor *             op,
                         int64_t                   n_out,
                         int                       il) {
    const auto *  mctx    = inp->mctx;
    const int64_t n_seqs  = g.ubatch.n_seqs;
    const int64_t n_slots = mctx->get_n_states(g.ubatch.n_seq_tokens);
    const size_t  state   = cache->nb[1];

    g.res->add_fused_node({ LLM_FUSED_OP_KDA, op, il });
    ggml_build_forward_expand(g.gf, op);
    copy_extra_states(g, inp, cache);

    ggml_tensor * from =
        ggml_view_3d(g.ctx0, op, cache->ne[0], n_seqs, n_slots, state, state * n_seqs, n_out * sizeof(float));
    ggml_tensor * to = ggml_view_3d(g.ctx0, cache, cache->ne[0], n_seqs, n_slots, state, state * mctx->get_size(),
                                    state * mctx->get_head());
    ggml_build_forward_expand(g.gf, ggml_cpy(g.ctx0, from, to));
}

ggml_tensor * llama_kda_mixer(
    const llm_graph_context & g, const llama_layer & layer, llm_graph_input_rs * inp, ggml_tensor * x, int il) {
    ggml_context * ctx = g.ctx0;

    const int64_t D = g.hparams.n_embd_head_kda;
    const int64_t H = g.hparams.n_head();  // as for loading weights; a file may have no head count of KDA layers
    const int64_t C = D * H;
    const int64_t T = g.ubatch.n_seq_tokens;
    const int64_t S = g.ubatch.n_seqs;

    const int32_t n_snapshots = inp->mctx->get_n_states(T);
    const int32_t zero_row    = inp->mctx->get_rs_z();

    // the matmuls of x, next to each other so that a backend can compute them together
    ggml_tensor * qkv[3];  // [C, T, S], from one matmul or three
    if (layer.wqkv) {
        ggml_tensor * all = g.build_lora_mm(layer.wqkv, x);
        for (int i = 0; i < 3; ++i) {
            qkv[i] = ggml_view_3d(ctx, all, C, T, S, all->nb[1], all->nb[1] * T, i * C * sizeof(float));
        }
        ggml_build_forward_expand(g.gf, all);
    } else {
        ggml_tensor * const weights[] = { layer.wq, layer.wk, layer.wv };
        for (int i = 0; i < 3; ++i) {
            qkv[i] = g.build_lora_mm(weights[i], x);
            ggml_build_forward_expand(g.gf, qkv[i]);
            if (S > 1) {
                qkv[i] = ggml_reshape_3d(ctx, qkv[i], C, T, S);
            }
        }
    }
    // the gates' projections: two matrices of low rank, or one
    ggml_tensor * f    = g.build_lora_mm(layer.ssm_f_a, x);
    ggml_tensor * gate = g.build_lora_mm(layer.ssm_g ? layer.ssm_g : layer.ssm_g_a, x);
    ggml_tensor * beta = g.build_lora_mm(layer.ssm_beta, x);
    for (ggml_tensor * t : { f, gate, beta }) {
        ggml_build_forward_expand(g.gf, t);
    }
    f    = layer.ssm_f_b ? g.build_lora_mm(layer.ssm_f_b, f) : f;
    gate = layer.ssm_g_b ? g.build_lora_mm(layer.ssm_g_b, gate) : gate;
    g.cb(f, "kda_f", il);
    g.cb(gate, "kda_gate", il);
    g.cb(beta, "kda_beta", il);

    ggml_tensor * conv_cache = inp->mctx->get_r_l(il);
    ggml_tensor * conv_src[] = { qkv[0],           qkv[1],           qkv[2],     layer.ssm_q_conv,
                                 layer.ssm_k_conv, layer.ssm_v_conv, conv_cache, inp->s_copy_main };
    ggml_tensor * conv       = ggml_kda_conv(ctx, conv_src, { (int32_t) D, n_snapshots, zero_row, KDA_L2_NORM_EPS });
    g.cb(conv, "kda_conv", il);
    store_states(g, inp, conv_cache, conv, 3 * C * T * S, il);
    ggml_tensor * packed = ggml_view_4d(ctx, conv, D, 3 * H, T, S, D * sizeof(float), conv->nb[1], conv->nb[1] * T, 0);

    f    = ggml_reshape_4d(ctx, f, D, H, T, S);
    gate = ggml_reshape_4d(ctx, gate, D, H, T, S);
    beta = S > 1 ? ggml_reshape_3d(ctx, beta, H, T, S) : beta;

    ggml_tensor * cache      = inp->mctx->get_s_l(il);
    ggml_tensor * a          = family_of(g.arch)->positive_a ? ggml_neg(ctx, layer.ssm_a) : layer.ssm_a;
    ggml_tensor * scan_src[] = { packed, f, layer.ssm_dt_b, a, beta, gate, layer.ssm_o_norm, cache, inp->s_copy_main };
    ggml_tensor * scan       = ggml_kda_scan(
        ctx, scan_src, { n_snapshots, zero_row, g.hparams.f_norm_rms_eps, g.hparams.kda_gate_lower_bound });
    g.cb(scan, "kda_scan", il);
    store_states(g, inp, cache, scan, C * T * S, il);

    ggml_tensor * out = g.build_lora_mm(layer.wo, ggml_view_2d(ctx, scan, C, T * S, scan->nb[1], 0));
    g.cb(out, "kda_out", il);
    return out;
}
