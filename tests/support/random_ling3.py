"""Random Ling 3 checkpoints in every layout that exists on disk, for tests of the converter and of references.

Input: a `LingSpec` (shape, scale of the weights, seed). Output: a folder with config.json, safetensors and tokenizer
files. The weights depend only on the spec, so the layouts of one spec contain the same model. Layouts: "hub" (as
published), "resaved" (transformers' `save_pretrained`: hub names, but every attention output is `dense`; no MTP
layer), "native" (transformers' in-memory names: fused convolutions and experts; no MTP layer).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from ling_tokenizer import CHAT_TEMPLATE, SPECIAL, VOCAB_SIZE, tokenizer_json
from random_checkpoint import Weights, random_a_log, random_dt_bias, write_weights

Layout = Literal["hub", "resaved", "native"]


@dataclass(frozen=True)
class LingSpec:
    """Shape and statistics; `layers` has a letter per main layer, K for KDA and M for MLA.

    A hub config cannot express every order of layers: it has `group`, the layers of a group, whose last one is MLA;
    the layers after the last whole group are KDA (as in transformers) unless `layers` says otherwise.
    """

    layers: str = "KKMKKM"
    group: int = 3
    mtp: bool = False
    hidden: int = 64
    heads: int = 2
    kda_head_dim: int = 32
    conv: int = 4
    q_lora: int | None = None
    kv_lora: int = 64
    nope: int = 32
    rope: int = 16
    v_dim: int = 32
    intermediate: int = 96
    dense_layers: int = 1
    experts: int = 8
    experts_used: int = 2
    moe_intermediate: int = 32
    groups: int = 1
    topk_groups: int = 1
    scaling: float = 2.5
    lower_bound: float = -5.0
    limits: tuple[float, ...] | None = None  # expert_swiglu_limit_list
    shared_limits: tuple[float, ...] | None = None  # share_expert_swiglu_limit_list
    yarn: tuple[tuple[str, float], ...] | None = None  # further keys of rope_scaling
    rms_norm_eps: float = 1e-6
    std: float = 0.1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @property
    def kinds(self) -> str:
        """A letter per layer with the MTP layer, which is MLA."""
        return self.layers + ("M" if self.mtp else "")

    @property
    def id(self) -> str:
        lora = f"-q{self.q_lora}" if self.q_lora else ""
        mtp = "-mtp" if self.mtp else ""
        return f"{self.layers}{mtp}-h{self.heads}x{self.kda_head_dim}-e{self.experts}{lora}-s{self.seed}"


def config(spec: LingSpec, layout: Layout = "hub") -> dict[str, Any]:
    """The checkpoint's config.json with the keys of the published ones, or those that transformers writes."""
    yarn = None if spec.yarn is None else {"type": "yarn", **dict(spec.yarn)}
    common: dict[str, Any] = {
        "architectures": ["BailingMoeV3ForCausalLM"],
        "dtype": str(spec.dtype).removeprefix("torch."),
        "eos_token_id": SPECIAL["<|role_end|>"],
        "expert_swiglu_limit_list": None if spec.limits is None else list(spec.limits),
        "first_k_dense_replace": spec.dense_layers,
        "gated_attention_proj_granularity_type": "head_wise",
        "head_dim": spec.kda_head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "kda_lower_bound": spec.lower_bound,
        "kda_safe_gate": True,
        "kv_lora_rank": spec.kv_lora,
        "layer_group_size": spec.group,
        "model_type": "bailing_hybrid",
        "moe_intermediate_size": spec.moe_intermediate,
        "moe_shared_expert_intermediate_size": spec.moe_intermediate,
        "no_kda_lora": True,
        "num_attention_heads": spec.heads,
        "num_experts": spec.experts,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": spec.heads,
        "num_nextn_predict_layers": int(spec.mtp),
        "num_shared_experts": 1,
        "pad_token_id": SPECIAL["<|endoftext|>"],
        "q_lora_rank": spec.q_lora,
        "qk_nope_head_dim": spec.nope,
        "qk_rope_head_dim": spec.rope,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": 6000000,
        "routed_scaling_factor": spec.scaling,
        "score_function": "sigmoid",
        "share_expert_swiglu_limit_list": None if spec.shared_limits is None else list(spec.shared_limits),
        "short_conv_kernel_size": spec.conv,
        "tie_word_embeddings": False,
        "topk_group": spec.topk_groups,
        "v_head_dim": spec.v_dim,
        "vocab_size": VOCAB_SIZE,
    }
    if layout == "hub":
        return common | {
            "attention_dropout": 0.0,
            "group_norm_size": 1,
            "linear_silu": True,
            "max_position_embeddings": 4096,
            "moe_router_enable_expert_bias": True,
            "mtp_use_kda": False,
            "n_group": spec.groups,
            "norm_topk_prob": True,
            "num_experts_per_tok": spec.experts_used,
            "num_kv_heads_for_linear_attn": 0,
            "partial_rotary_factor": 0.5,
            "qk_head_dim": spec.nope + spec.rope,
            "rope_interleave": True,
            "rope_scaling": yarn,
            "rotary_dim": spec.rope,
            "router_dtype": "fp32",
            "scale_router_input": False,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "up_proj_norm": False,
            "use_bias": False,
            "use_kda_lora": False,
            "use_mla_nope": False,
            "use_nGPT": False,
            "use_qk_norm": True,
            "use_qkv_bias": False,
            "value_norm": False,
        }
    names = {"K": "linear_attention", "M": "full_attention"}
    rope: dict[str, Any] = {"partial_rotary_factor": 0.5, "rope_theta": 6000000, "rope_type": "default"}
    if spec.yarn is not None:
        rope |= {"rope_type": "yarn", "type": "yarn", **dict(spec.yarn)}
    return common | {
        "architectures": ["BailingHybridForCausalLM"],
        "attention_bias": False,
        "head_dim": spec.rope,
        "layer_types": [names[kind] for kind in spec.layers],
        "linear_conv_kernel_dim": spec.conv,
        "linear_head_dim": spec.kda_head_dim,
        "linear_num_heads": spec.heads,
        "mlp_layer_types": ["dense" if i < spec.dense_layers else "sparse" for i in range(len(spec.layers))],
        "model_max_length": 4096,
        "moe_renormalize": True,
        "num_expert_group": spec.groups,
        "num_experts_per_token": spec.experts_used,
        "rope_parameters": rope,
    }


def weights(spec: LingSpec) -> Weights:
    """Random weights under hub names; A_log, dt_bias and expert_bias float32, the rest in the spec's dtype."""
    rng = torch.Generator().manual_seed(spec.seed)
    out: Weights = {}

    def normal(name: str, *shape: int, std: float = spec.std, mean: float = 0.0) -> None:
        out[name] = (mean + std * torch.randn(*shape, generator=rng)).to(spec.dtype)

    def norm(name: str, size: int) -> None:
        normal(f"{name}.weight", size, std=0.1, mean=1.0)

    def ffn(prefix: str, size: int) -> None:
        normal(f"{prefix}gate_proj.weight", size, spec.hidden)
        normal(f"{prefix}up_proj.weight", size, spec.hidden)
        normal(f"{prefix}down_proj.weight", spec.hidden, size)

    width = spec.heads * spec.kda_head_dim
    normal("model.word_embeddings.weight", VOCAB_SIZE, spec.hidden, std=max(spec.std, 0.02))
    for i, kind in enumerate(spec.kinds):
        layer = f"model.layers.{i}."
        attn = f"{layer}attention."
        norm(f"{layer}input_layernorm", spec.hidden)
        norm(f"{layer}post_attention_layernorm", spec.hidden)
        if kind == "K":
            for x in "qkv":
                normal(f"{attn}{x}_proj.weight", width, spec.hidden)
                normal(f"{attn}{x}_conv1d.weight", width, 1, spec.conv, std=0.3)
            for x in "fg":
                normal(f"{attn}{x}_proj.weight", width, spec.hidden)
            out[f"{attn}A_log"] = random_a_log(spec.heads, rng)
            out[f"{attn}dt_bias"] = random_dt_bias(width, rng)
            normal(f"{attn}b_proj.weight", spec.heads, spec.hidden)
            norm(f"{attn}o_norm", spec.kda_head_dim)
            normal(f"{attn}o_proj.weight", spec.hidden, width)
        else:
            q_width = spec.heads * (spec.nope + spec.rope)
            if spec.q_lora is None:
                normal(f"{attn}q_proj.weight", q_width, spec.hidden)
            else:
                normal(f"{attn}q_a_proj.weight", spec.q_lora, spec.hidden)
                norm(f"{attn}q_a_layernorm", spec.q_lora)
                normal(f"{attn}q_b_proj.weight", q_width, spec.q_lora)
            normal(f"{attn}kv_a_proj_with_mqa.weight", spec.kv_lora + spec.rope, spec.hidden)
            norm(f"{attn}kv_a_layernorm", spec.kv_lora)
            normal(f"{attn}kv_b_proj.weight", spec.heads * (spec.nope + spec.v_dim), spec.kv_lora)
            normal(f"{attn}g_proj.weight", spec.heads, spec.hidden)
            normal(f"{attn}dense.weight", spec.hidden, spec.heads * spec.v_dim)
        if i < spec.dense_layers:
            ffn(f"{layer}mlp.", spec.intermediate)
            continue
        normal(f"{layer}mlp.gate.weight", spec.experts, spec.hidden, std=max(spec.std, 0.1))
        out[f"{layer}mlp.gate.expert_bias"] = 0.1 * torch.randn(spec.experts, generator=rng)
        for e in range(spec.experts):
            ffn(f"{layer}mlp.experts.{e}.", spec.moe_intermediate)
        ffn(f"{layer}mlp.shared_experts.", spec.moe_intermediate)
    if spec.mtp:
        layer = f"model.layers.{len(spec.layers)}."
        normal(f"{layer}eh_proj.weight", spec.hidden, 2 * spec.hidden)
        for name in ("enorm", "hnorm", "final_layernorm"):
            norm(layer + name, spec.hidden)
    norm("model.norm", spec.hidden)
    normal("lm_head.weight", VOCAB_SIZE, spec.hidden)
    return out


def in_layout(hub: Weights, spec: LingSpec, layout: Layout) -> Weights:
    """The same weights with another layout's names (as in transformers 5.23's conversion mapping)."""
    if layout == "hub":
        return hub
    extra = f"model.layers.{len(spec.layers)}."
    main = {name: tensor for name, tensor in hub.items() if not name.startswith(extra)}
    if layout == "resaved":
        return {name.replace(".attention.o_proj.", ".attention.dense."): main[name] for name in main}
    renamed = (
        ("model.word_embeddings.", "model.embed_tokens."),
        (".attention.dense.", ".self_attn.o_proj."),
        (".attention.", ".self_attn."),
        (".mlp.gate.expert_bias", ".mlp.gate.e_score_correction_bias"),
    )
    out: Weights = {}
    for name, tensor in main.items():
        if "_conv1d." in name:
            if ".q_conv1d." in name:
                parts = [hub[name.replace(".q_", f".{x}_")] for x in "qkv"]
                out[name.replace(".attention.q_conv1d.", ".self_attn.conv1d.")] = torch.cat(parts)
        elif ".experts." in name:
            stem, rest = name.split(".experts.")
            if rest == "0.gate_proj.weight":
                gate, up, down = (
                    torch.stack([hub[f"{stem}.experts.{e}.{x}_proj.weight"] for e in range(spec.experts)])
                    for x in ("gate", "up", "down")
                )
                out[f"{stem}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
                out[f"{stem}.experts.down_proj"] = down
        else:
            for old, new in renamed:
                name = name.replace(old, new)
            if name.endswith((".A_log", ".dt_bias", ".f_proj.weight")):
                name = name.replace(".self_attn.", ".self_attn.forget_gate.")
            out[name] = tensor
    return out


def write_tokenizer(folder: Path, **settings: object) -> Path:
    """tokenizer.json and tokenizer_config.json; `settings` replaces keys of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    written: dict[str, object] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "cls_token": "[CLS]",
        "eos_token": "<|endoftext|>",
        "gmask_token": "[gMASK]",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(written | settings, indent=2))
    return folder


def write_checkpoint(folder: Path, spec: LingSpec, layout: Layout = "hub", shards: int = 2) -> Path:
    """Write the whole checkpoint to `folder`, creating it if needed; `shards=1` writes `model.safetensors`."""
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config(spec, layout), indent=2))
    return write_weights(folder, in_layout(weights(spec), spec, layout), shards)
