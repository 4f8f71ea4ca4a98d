"""The torch reference of a model of random_family.py: its tensors under hub names, and its config.

Input: a `FamilySpec` of bailingmoe3 or kimi-k3. Output: `Reference`. Independent of the converter: its tables are not
used. `exact_logits` has the logits of every family.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from random_checkpoint import Spec
from random_family import VOCAB_SIZE, Change, FamilySpec, tensors, unchanged
from synthetic_case import reference_of
from transformers_glm import glm_logits

from kimi_gguf.convert.model.config import LayerKind, ModelConfig
from kimi_gguf.convert.model.kimi_k3 import K3Config
from kimi_gguf.convert.model.ling3 import Ling3Config, Yarn
from kimi_gguf.validate.models import REFERENCES
from kimi_gguf.validate.reference import Names, Reference

KINDS = {"K": LayerKind.KDA, "M": LayerKind.MLA}
ATTENTION = {
    **{f"attn_{x}": f"{x}_proj" for x in "qkv"},
    **{f"ssm_conv1d_{x}": f"{x}_conv1d" for x in "qkv"},
    "ssm_beta": "b_proj",
    "ssm_norm": "o_norm",
    "attn_q_a": "q_a_proj",
    "attn_q_a_norm": "q_a_layernorm",
    "attn_q_b": "q_b_proj",
    "attn_gate": "g_proj",
    "attn_kv_a_mqa": "kv_a_proj_with_mqa",
    "attn_kv_a_norm": "kv_a_layernorm",
}
OWN_ATTENTION = {
    "bailingmoe3": {"ssm_f_a": "f_proj", "ssm_g_a": "g_proj"},
    "kimi-k3": {"ssm_f_a": "f_a_proj", "ssm_f_b": "f_b_proj", "ssm_g": "g_proj"},
}
MOE = {
    "ffn_gate_inp": "gate",
    **{f"ffn_{x}_shexp": f"shared_experts.{x}_proj" for x in ("gate", "up", "down")},
    "ffn_routed_down": "routed_expert_down_proj",
    "ffn_routed_up": "routed_expert_up_proj",
    "ffn_routed_norm": "routed_expert_norm",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    **{f"nextn.{x}": x for x in ("eh_proj", "enorm", "hnorm")},
    "layer_output_norm": "final_layernorm",
}
Weights = dict[str, torch.Tensor]


def reference_of_family(
    spec: FamilySpec, dtype: torch.dtype = torch.float64, change: Change = unchanged
) -> Reference:
    """The reference of the model that `write_family` writes; change: as there."""
    return REFERENCES[spec.architecture](config_of(spec), hub_weights(spec, change).__getitem__, dtype)


def exact_logits(spec: Spec | FamilySpec, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits [T, V] of any family for token ids [T], in float64: of the torch reference, or of transformers (GLM)."""
    if isinstance(spec, Spec):
        model = reference_of(spec, dtype=torch.float64)
    elif spec.architecture == "glm5-next":
        return glm_logits(spec, ids)
    else:
        model = reference_of_family(spec)
    found: NDArray[np.float64] = model.logits(torch.from_numpy(ids)).numpy()
    return found


def mtp_logits(model: Reference, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits [T, V] of the model's MTP layer."""
    tokens = torch.from_numpy(ids)
    found: NDArray[np.float64] = model.mtp_logits(tokens, model.hidden(tokens)).numpy()
    return found


def config_of(spec: FamilySpec) -> ModelConfig:
    """The config of the model."""
    groups = spec.groups or (1, 1)
    common: dict[str, Any] = {
        "architecture": spec.architecture,
        "hidden_size": spec.hidden,
        "vocab_size": VOCAB_SIZE,
        "context_length": 4096,
        "rms_norm_eps": spec.rms_norm_eps,
        "layers": tuple(KINDS[kind] for kind in spec.layers),
        "kda_num_heads": spec.heads,
        "kda_head_dim": spec.kda_head_dim,
        "conv_kernel_size": 4,
        "kda_lower_bound": spec.lower_bound,
        "num_heads": spec.heads,
        "q_lora_rank": spec.q_rank,
        "kv_lora_rank": spec.kv_lora,
        "qk_nope_head_dim": spec.nope,
        "qk_rope_head_dim": spec.rope,
        "v_head_dim": spec.value,
        "rope_theta": 10000.0,
        "intermediate_size": spec.ffn,
        "num_dense_layers": 1,
        "moe_intermediate_size": spec.expert_ffn,
        "num_experts": spec.experts,
        "num_experts_per_token": spec.experts_used,
        "num_shared_experts": 1,
        "num_expert_groups": groups[0],
        "topk_groups": groups[1],
        "routed_scaling_factor": 2.5,
        "renormalize": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if spec.architecture == "bailingmoe3":
        count = len(spec.kinds)
        return Ling3Config(
            **common,
            shared_expert_size=spec.expert_ffn,
            num_mtp_layers=int(spec.mtp),
            swiglu_limits=(0.5 if spec.clamped else 0.0,) * count,
            shared_swiglu_limits=(0.7 if spec.clamped else 0.0,) * count,
            yarn=Yarn(spec.yarn[0], 64, *spec.betas, 1.0, spec.yarn[1], None) if spec.yarn else None,
        )
    return K3Config(
        **common,
        routed_hidden_size=spec.hidden // 2,
        situ_beta=3.0,
        situ_linear_beta=spec.situ_linear_beta,
        attn_res_block_size=spec.res_block,
    )


def hub_weights(spec: FamilySpec, change: Change = unchanged) -> Weights:
    """All tensors under canonical hub names; change: as in `write_family`."""
    names = REFERENCES[spec.architecture].names
    every = {name: torch.from_numpy(np.array(change(name, data))) for name, data in tensors(spec)}
    found = {
        names.embedding: every["token_embd.weight"],
        "model.norm.weight": every["output_norm.weight"],
        "lm_head.weight": every["output.weight"],
    }
    if "output_res_score.weight" in every:
        found |= _split_score("model.output_attn_res", every["output_res_score.weight"])
    attention = ATTENTION | OWN_ATTENTION[spec.architecture]
    for i in range(len(spec.kinds)):
        prefix, p = f"blk.{i}.", f"model.layers.{i}."
        layer = {name.removeprefix(prefix): every[name] for name in every if name.startswith(prefix)}
        for prefix, table in ((names.attention, attention), (names.moe, MOE), ("", LAYER)):
            for old, new in table.items():
                if f"{old}.weight" in layer:
                    found[f"{p}{prefix}{new}.weight"] = layer[f"{old}.weight"]
        found |= {p + name: tensor for name, tensor in _reshaped(layer, names).items()}
    return found


def _reshaped(layer: Weights, names: Names) -> Weights:
    """What is not only renamed."""
    attention = names.attention
    output = "o_proj" if "ssm_a" in layer else names.mla_output
    found = {f"{attention}{output}.weight": layer["attn_output.weight"]}
    for x in "qkv":
        if f"ssm_conv1d_{x}.weight" in layer:  # [1, C, 1, W] -> [C, 1, W]
            found[f"{attention}{x}_conv1d.weight"] = layer[f"ssm_conv1d_{x}.weight"][0]
    if "ssm_a" in layer:
        found[attention + "A_log"] = layer["ssm_a"].abs().double().log()
        found[attention + "dt_bias"] = layer["ssm_dt.bias"]
    else:
        parts = [layer["attn_k_b.weight"].transpose(1, 2), layer["attn_v_b.weight"]]
        found[attention + "kv_b_proj.weight"] = torch.cat(parts, 1).flatten(0, 1)
    if "exp_probs_b.bias" in layer:
        found[names.moe + names.routing_bias] = layer["exp_probs_b.bias"]
        for part, name in zip(("gate", "up", "down"), names.expert, strict=True):
            for e, expert in enumerate(layer[f"ffn_{part}_exps.weight"]):
                found[f"{names.moe}experts.{e}.{name}.weight"] = expert
    for old, new in (("attn_res_score", "self_attention_res"), ("ffn_res_score", "mlp_res")):
        if f"{old}.weight" in layer:
            found |= _split_score(new, layer[f"{old}.weight"])
    return found


def _split_score(name: str, score: torch.Tensor) -> Weights:
    """Two factors of the product that the GGUF file has; the norm's are powers of two, so that it is exact."""
    norm = torch.tensor([0.5, 1.0, 2.0]).repeat(len(score))[: len(score)]
    return {f"{name}_norm.weight": norm, f"{name}_proj.weight": (score / norm)[None]}
