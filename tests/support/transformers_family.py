"""What transformers_ling.py and transformers_glm.py share: sizes of the config, and names and shapes of a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from random_family import VOCAB_SIZE, Change, FamilySpec, tensors, unchanged

Weights = dict[str, torch.Tensor]

LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "ssm_beta": "self_attn.b_proj",
    "ssm_norm": "self_attn.o_norm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_q_{x}": f"self_attn.q_{x}_proj" for x in "ab"},
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    **{f"ffn_{x}_shexp": f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.gate",
}


def config_sizes(spec: FamilySpec) -> dict[str, Any]:
    """The settings that both configs have."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "moe_intermediate_size": spec.expert_ffn,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.heads,
        "num_experts_per_tok": spec.experts_used,
        "q_lora_rank": spec.q_rank,
        "kv_lora_rank": spec.kv_lora,
        "qk_nope_head_dim": spec.nope,
        "qk_rope_head_dim": spec.rope,
        "v_head_dim": spec.value,
        "rms_norm_eps": spec.rms_norm_eps,
        "pad_token_id": None,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }


def all_tensors(spec: FamilySpec, change: Change = unchanged) -> Weights:
    """The tensors of the GGUF file, by its names, in float64; change: as in `write_family`."""
    return {name: torch.from_numpy(np.array(change(name, data))).double() for name, data in tensors(spec)}


def layer_tensors(every: Weights, i: int) -> Weights:
    """Those of layer i, by their names in the layer."""
    prefix = f"blk.{i}."
    return {name.removeprefix(prefix): every[name] for name in every if name.startswith(prefix)}


def joined(kind: str, layer: Weights) -> Weights:
    """Tensors of a layer (kind K or M) that transformers stores joined, or under a name without `.weight`."""
    found = {}
    if kind == "K":
        found["self_attn.conv1d.weight"] = torch.cat(
            [layer[f"ssm_conv1d_{x}.weight"].squeeze(0) for x in "qkv"]
        )
        found["self_attn.forget_gate.dt_bias"] = layer["ssm_dt.bias"]
    else:
        kv = torch.cat([layer["attn_k_b.weight"].transpose(1, 2), layer["attn_v_b.weight"]], dim=1)
        found["self_attn.kv_b_proj.weight"] = kv.flatten(0, 1)
    if "ffn_gate_exps.weight" in layer:
        gate_up = torch.cat([layer["ffn_gate_exps.weight"], layer["ffn_up_exps.weight"]], dim=1)
        found["mlp.experts.gate_up_proj"] = gate_up
        found["mlp.experts.down_proj"] = layer["ffn_down_exps.weight"]
        found["mlp.gate.e_score_correction_bias"] = layer["exp_probs_b.bias"]
    return found
