"""Logits of GLM-5.3-Flash's text model by transformers, in float64, from the tensors of a GGUF file.

Input: a `FamilySpec` of glm5-next and token ids [T]. Output: logits [T, V].
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from random_family import GLM_LIMIT, HYPER_CONNECTIONS, POOL, SINKHORN, VOCAB_SIZE, FamilySpec, tensors
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel

NO_LIMIT = 1e30
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "ssm_f_a": "self_attn.forget_gate.f_a_proj",
    "ssm_f_b": "self_attn.forget_gate.f_b_proj",
    "ssm_g_a": "self_attn.g_a_proj",
    "ssm_g_b": "self_attn.g_b_proj",
    "ssm_beta": "self_attn.b_proj",
    "ssm_norm": "self_attn.o_norm",
    "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    **{f"ffn_{x}_shexp": f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.gate",
}
PARAMETERS = {  # in transformers they are no weights of a module
    **{f"hc_{x}_{y}.weight": f"{x}_hc.{y}" for x in ("attn", "ffn") for y in ("fn", "base", "scale")},
    "indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "indexer_compressor_ape.weight": "self_attn.indexer.index_kpool_compress_ape",
    "indexer_compressor_gate.weight": "self_attn.indexer.index_kpool_compress_gate",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}


def glm_logits(spec: FamilySpec, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits [T, V] of the model of `write_family`."""
    count = len(spec.layers)
    config = Glm5NextTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=spec.hidden,
        intermediate_size=spec.ffn,
        moe_intermediate_size=spec.expert_ffn,
        num_hidden_layers=count,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        n_routed_experts=spec.experts,
        num_experts_per_tok=spec.experts_used,
        mlp_layer_types=["dense", *["sparse"] * (count - 1)],
        kv_lora_rank=spec.kv_lora,
        q_lora_rank=spec.q_lora,
        qk_nope_head_dim=spec.nope,
        qk_rope_head_dim=spec.rope,
        v_head_dim=spec.value,
        rms_norm_eps=spec.rms_norm_eps,
        index_topk=spec.index_top_k,
        index_kpool=POOL,
        index_head_dim=spec.index_head_dim,
        index_n_heads=spec.index_heads,
        indexer_types=["full"] * count,
        layer_types=["linear_attention" if kind == "K" else "indexed_attention" for kind in spec.layers],
        linear_head_dim=spec.kda_head_dim,
        linear_num_heads=spec.heads,
        linear_lower_bound=spec.lower_bound,
        swiglu_limit=GLM_LIMIT if spec.clamped else NO_LIMIT,
        hc_mult=HYPER_CONNECTIONS,
        hc_eps=1e-6,
        hc_sinkhorn_iters=SINKHORN,
        pad_token_id=None,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    every = {name: torch.from_numpy(np.array(data)).double() for name, data in tensors(spec)}
    model = Glm5NextTextModel(config).to(torch.float64).eval()
    model.load_state_dict(_state(spec, every))
    with torch.no_grad():
        hidden: torch.Tensor = model(torch.from_numpy(ids)[None], use_cache=False).last_hidden_state[0]
    return (hidden @ every["output.weight"].T).numpy()


def _state(spec: FamilySpec, every: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names and shapes."""
    found = {"embed_tokens.weight": every["token_embd.weight"], "norm.weight": every["output_norm.weight"]}
    for i, kind in enumerate(spec.layers):
        prefix, place = f"blk.{i}.", f"layers.{i}."
        layer = {name.removeprefix(prefix): every[name] for name in every if name.startswith(prefix)}
        for name, tensor in layer.items():
            if name in PARAMETERS:
                found[place + PARAMETERS[name]] = tensor
            elif name.removesuffix(".weight") in LAYER:
                found[f"{place}{LAYER[name.removesuffix('.weight')]}.weight"] = tensor
        if kind == "K":
            convs = [layer[f"ssm_conv1d_{x}.weight"].squeeze(0) for x in "qkv"]
            found[place + "self_attn.conv1d.weight"] = torch.cat(convs)
            found[place + "self_attn.forget_gate.A_log"] = layer["ssm_a"].flatten().neg().log()
            found[place + "self_attn.forget_gate.dt_bias"] = layer["ssm_dt.bias"]
        else:
            kv = torch.cat([layer["attn_k_b.weight"].transpose(1, 2), layer["attn_v_b.weight"]], dim=1)
            found[place + "self_attn.kv_b_proj.weight"] = kv.flatten(0, 1)
        if "ffn_gate_exps.weight" in layer:
            gate_up = torch.cat([layer["ffn_gate_exps.weight"], layer["ffn_up_exps.weight"]], dim=1)
            found[place + "mlp.experts.gate_up_proj"] = gate_up
            found[place + "mlp.experts.down_proj"] = layer["ffn_down_exps.weight"]
    return found
