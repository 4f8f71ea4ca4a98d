"""Logits of Ling 3 by transformers, in float64, from the tensors of a GGUF file.

Input: a `FamilySpec` of bailingmoe3 and token ids [T]. Output: logits [T, V]. transformers does not clamp experts and
has no MTP layer here, so the spec must have neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from random_family import Change, FamilySpec, unchanged
from transformers import BailingHybridConfig, BailingHybridForCausalLM
from transformers_family import LAYER, Weights, all_tensors, config_sizes, joined, layer_tensors

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
OWN_LAYER = {
    "ssm_f_a": "self_attn.forget_gate.f_proj",
    "ssm_g_a": "self_attn.g_proj",
    "attn_gate": "self_attn.g_proj",
}


def ling_logits(spec: FamilySpec, ids: NDArray[np.int64], change: Change = unchanged) -> NDArray[np.float64]:
    """Logits [T, V] of the model that `write_family` writes; change: as there."""
    assert not spec.clamped and not spec.mtp
    groups = spec.groups or (1, 1)
    config = BailingHybridConfig(
        **config_sizes(spec),
        num_local_experts=spec.experts,
        n_group=groups[0],
        topk_group=groups[1],
        first_k_dense_replace=1,
        head_dim=spec.kda_head_dim,
        kda_lower_bound=spec.lower_bound,
        layer_types=["linear_attention" if kind == "K" else "full_attention" for kind in spec.layers],
        rope_parameters=_rope(spec),
        eos_token_id=None,
    )
    model = BailingHybridForCausalLM(config).to(torch.float64).eval()
    missing, unexpected = model.load_state_dict(_state(spec, change), strict=False)
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


def _state(spec: FamilySpec, change: Change) -> Weights:
    """transformers' names and shapes."""
    every = all_tensors(spec, change)
    found = {f"{new}.weight": every[f"{old}.weight"] for old, new in TOP.items()}
    for i, kind in enumerate(spec.layers):
        layer = layer_tensors(every, i)
        names = {old: new for old, new in (LAYER | OWN_LAYER).items() if f"{old}.weight" in layer}
        state = {f"{new}.weight": layer[f"{old}.weight"] for old, new in names.items()} | joined(kind, layer)
        if kind == "K":
            state["self_attn.forget_gate.A_log"] = layer["ssm_a"].flatten().log()
        found |= {f"model.layers.{i}.{name}": tensor for name, tensor in state.items()}
    return found
