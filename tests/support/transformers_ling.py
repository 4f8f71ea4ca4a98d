"""Logits of Ling 3 by transformers, in float64, from the tensors of a GGUF file.

Input: a `FamilySpec` of bailingmoe3 and token ids [T]. Output: logits [T, V]. transformers does not clamp experts and
has no MTP layer here, so the spec must have neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from random_family import VOCAB_SIZE, FamilySpec, tensors
from transformers import BailingHybridConfig, BailingHybridForCausalLM

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "ssm_f_a": "self_attn.forget_gate.f_proj",
    "ssm_g_a": "self_attn.g_proj",
    "attn_gate": "self_attn.g_proj",
    "ssm_beta": "self_attn.b_proj",
    "ssm_norm": "self_attn.o_norm",
    "attn_output": "self_attn.o_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    **{f"ffn_{x}_shexp": f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.gate",
}


def ling_logits(spec: FamilySpec, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits [T, V] of the model of `write_family`."""
    assert not spec.clamped and not spec.mtp
    groups = spec.groups or (1, 1)
    config = BailingHybridConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=spec.hidden,
        intermediate_size=spec.ffn,
        moe_intermediate_size=spec.expert_ffn,
        num_hidden_layers=len(spec.layers),
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        num_local_experts=spec.experts,
        num_experts_per_tok=spec.experts_used,
        n_group=groups[0],
        topk_group=groups[1],
        first_k_dense_replace=1,
        rms_norm_eps=spec.rms_norm_eps,
        kv_lora_rank=spec.kv_lora,
        qk_nope_head_dim=spec.nope,
        qk_rope_head_dim=spec.rope,
        v_head_dim=spec.value,
        head_dim=spec.kda_head_dim,
        kda_lower_bound=spec.lower_bound,
        layer_types=["linear_attention" if kind == "K" else "full_attention" for kind in spec.layers],
        rope_parameters=_rope(spec),
        pad_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = BailingHybridForCausalLM(config).to(torch.float64).eval()
    missing, unexpected = model.load_state_dict(_state(spec), strict=False)
    assert not unexpected and not [name for name in missing if "inv_freq" not in name], (missing, unexpected)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.from_numpy(ids)[None]).logits[0]
    return logits.double().numpy()


def _rope(spec: FamilySpec) -> dict[str, Any]:
    if spec.yarn is None:
        return {"rope_type": "default", "rope_theta": 10000.0}
    factor, mscale_all_dim = spec.yarn
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": factor,
        "mscale": 1.0,
        "mscale_all_dim": mscale_all_dim,
        "original_max_position_embeddings": 64,
        "beta_fast": spec.betas[0],
        "beta_slow": spec.betas[1],
    }


def _state(spec: FamilySpec) -> dict[str, torch.Tensor]:
    """transformers' names and shapes."""
    every = {name: torch.from_numpy(np.array(data)).double() for name, data in tensors(spec)}
    found = {f"{new}.weight": every.pop(f"{old}.weight") for old, new in TOP.items()}
    for i, kind in enumerate(spec.layers):
        layer = {
            name.removeprefix(f"blk.{i}."): every[name] for name in every if name.startswith(f"blk.{i}.")
        }
        place = f"model.layers.{i}."
        for old, new in LAYER.items():
            if f"{old}.weight" in layer:
                found[f"{place}{new}.weight"] = layer[f"{old}.weight"]
        if kind == "K":
            convs = [layer[f"ssm_conv1d_{x}.weight"].squeeze(0) for x in "qkv"]
            found[place + "self_attn.conv1d.weight"] = torch.cat(convs)
            found[place + "self_attn.forget_gate.A_log"] = layer["ssm_a"].flatten().log()
            found[place + "self_attn.forget_gate.dt_bias"] = layer["ssm_dt.bias"]
        else:
            k_b, v_b = layer["attn_k_b.weight"], layer["attn_v_b.weight"]
            kv = torch.cat([k_b.transpose(1, 2), v_b], dim=1)
            found[place + "self_attn.kv_b_proj.weight"] = kv.flatten(0, 1)
        if "exp_probs_b.bias" in layer:
            gate_up = torch.cat([layer["ffn_gate_exps.weight"], layer["ffn_up_exps.weight"]], dim=1)
            found[place + "mlp.gate.e_score_correction_bias"] = layer["exp_probs_b.bias"]
            found[place + "mlp.experts.gate_up_proj"] = gate_up
            found[place + "mlp.experts.down_proj"] = layer["ffn_down_exps.weight"]
    return found
