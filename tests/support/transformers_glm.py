"""Logits of GLM-5.3-Flash's text model by transformers, in float64, from the tensors of a GGUF file.

Input: a `FamilySpec` of glm5-next and token ids [T]. Output: logits [T, V].
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from random_family import GLM_LIMIT, HYPER_CONNECTIONS, POOL, SINKHORN, FamilySpec
from transformers.models.glm5_next import modeling_glm5_next
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers_family import LAYER, Weights, all_tensors, config_sizes, joined, layer_tensors

NO_LIMIT = 1e30
OWN_LAYER = {
    "ssm_f_a": "self_attn.forget_gate.f_a_proj",
    "ssm_f_b": "self_attn.forget_gate.f_b_proj",
    "ssm_g_a": "self_attn.g_a_proj",
    "ssm_g_b": "self_attn.g_b_proj",
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
}
NAMES = {
    **{f"{old}.weight": f"{new}.weight" for old, new in (LAYER | OWN_LAYER).items()},
    **{f"hc_{x}_{y}.weight": f"{x}_hc.{y}" for x in ("attn", "ffn") for y in ("fn", "base", "scale")},
    "indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "indexer_compressor_ape.weight": "self_attn.indexer.index_kpool_compress_ape",
    "indexer_compressor_gate.weight": "self_attn.indexer.index_kpool_compress_gate",
}


def glm_logits(spec: FamilySpec, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits [T, V] of the model of `write_family`. KDA runs token by token, not in chunks."""
    count = len(spec.layers)
    config = Glm5NextTextConfig(
        **config_sizes(spec),
        n_routed_experts=spec.experts,
        mlp_layer_types=["dense", *["sparse"] * (count - 1)],
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
    )
    every = all_tensors(spec)
    model = modeling_glm5_next.Glm5NextTextModel(config).to(torch.float64).eval()
    model.load_state_dict(_state(spec, every))
    by_token = modeling_glm5_next.recurrent_kimi_delta_attention
    with torch.no_grad(), mock.patch.object(modeling_glm5_next, "chunk_kimi_delta_attention", by_token):
        hidden: torch.Tensor = model(torch.from_numpy(ids)[None], use_cache=False).last_hidden_state[0]
    return (hidden @ every["output.weight"].T).numpy()


def _state(spec: FamilySpec, every: Weights) -> Weights:
    """transformers' names and shapes."""
    found = {"embed_tokens.weight": every["token_embd.weight"], "norm.weight": every["output_norm.weight"]}
    for i, kind in enumerate(spec.layers):
        layer = layer_tensors(every, i)
        state = {NAMES[name]: tensor for name, tensor in layer.items() if name in NAMES} | joined(kind, layer)
        if kind == "K":
            state["self_attn.forget_gate.A_log"] = layer["ssm_a"].flatten().neg().log()
        found |= {f"layers.{i}.{name}": tensor for name, tensor in state.items()}
    return found
