"""Random Kimi-Linear checkpoints in every layout that exists on disk, for tests of the converter.

Input: a `Spec` (shape, scale of the weights, seed). Output: a folder with config.json, safetensors (sharded or
single), `tiktoken.model` and `tokenizer_config.json`. The weights depend only on the spec, so the layouts of
one spec contain the same model. Layouts: "hub" (as published), "resaved" (transformers' `save_pretrained`, every
dense layer under `block_sparse_moe`), "native" (transformers' in-memory names, fused convolutions and
experts, flat config).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

Layout = Literal["hub", "resaved", "native"]
Weights = dict[str, torch.Tensor]

MERGES = [
    " t", "he", "in", "re", "on", " a", "er", " the", "nd",
    " w", "or", "at", " s", " o", "is", "it", "en", "an",
]  # fmt: skip
BYTES = [bytes([byte]) for byte in range(256)]
RANKS = BYTES + [merge.encode() for merge in MERGES]
# The K2 family's names, by distance from the last rank; the markers of tool calls are not special.
SPECIAL = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}
TOOL_CALL_MARKS = range(11, 16)
NUM_RANKS = len(RANKS)
VOCAB_SIZE = NUM_RANKS + 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_{{ m['role'] }}|>{{ m['role'] }}<|im_middle|>{{ m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)


@dataclass(frozen=True)
class Spec:
    """Shape and statistics of a random checkpoint; `layers` has a letter per layer, K for KDA and M for MLA."""

    layers: str = "KKKM"
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
    experts: int = 4
    experts_used: int = 2
    shared_experts: int = 1
    moe_intermediate: int = 32
    groups: int = 1
    topk_groups: int = 1
    scaling: float = 2.446
    std: float = 0.1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @property
    def id(self) -> str:
        lora = f"-q{self.q_lora}" if self.q_lora else ""
        heads = f"h{self.heads}x{self.kda_head_dim}"
        return f"{self.layers}-{heads}-e{self.experts}{lora}-std{self.std:g}-s{self.seed}"


def config(spec: Spec, layout: Layout = "hub") -> dict[str, Any]:
    """The checkpoint's config.json; "native" has transformers' flat keys with 0-based layer types."""
    common: dict[str, Any] = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "bos_token_id": NUM_RANKS,
        "eos_token_id": NUM_RANKS + 2,
        "pad_token_id": NUM_RANKS + 255,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "kv_lora_rank": spec.kv_lora,
        "model_max_length": 4096,
        "moe_intermediate_size": spec.moe_intermediate,
        "moe_renormalize": True,
        "num_attention_heads": spec.heads,
        "num_expert_group": spec.groups,
        "num_experts": spec.experts,
        "num_experts_per_token": spec.experts_used,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": spec.heads,
        "num_shared_experts": spec.shared_experts,
        "q_lora_rank": spec.q_lora,
        "qk_nope_head_dim": spec.nope,
        "qk_rope_head_dim": spec.rope,
        "v_head_dim": spec.v_dim,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": spec.scaling,
        "tie_word_embeddings": False,
        "topk_group": spec.topk_groups,
        "vocab_size": VOCAB_SIZE,
    }
    if layout == "native":
        kinds = {"K": "linear_attention", "M": "full_attention"}
        is_moe = [i >= spec.dense_layers for i in range(len(spec.layers))]
        return common | {
            "attention_bias": False,
            "head_dim": spec.rope,
            "layer_types": [kinds[c] for c in spec.layers],
            "linear_conv_kernel_dim": spec.conv,
            "linear_head_dim": spec.kda_head_dim,
            "linear_num_heads": spec.heads,
            "mlp_layer_types": ["sparse" if moe else "dense" for moe in is_moe],
        }
    return common | {
        "first_k_dense_replace": spec.dense_layers,
        "head_dim": spec.hidden // spec.heads,
        "linear_attn_config": {
            "full_attn_layers": [i + 1 for i, c in enumerate(spec.layers) if c == "M"],
            "head_dim": spec.kda_head_dim,
            "kda_layers": [i + 1 for i, c in enumerate(spec.layers) if c == "K"],
            "num_heads": spec.heads,
            "short_conv_kernel_size": spec.conv,
        },
        "mla_use_nope": True,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "num_nextn_predict_layers": 0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "use_grouped_topk": True,
    }


def random_a_log(heads: int, rng: torch.Generator) -> torch.Tensor:
    """log(a) for a from 1 to 16, (heads), float32.

    Rounded from float64, here and in `random_dt_bias`: the last bit of torch's float32 functions depends on the
    processor and on the address, and files in tests/golden have these numbers.
    """
    return (1 + 15 * torch.rand(heads, generator=rng).double()).log().float()


def random_dt_bias(width: int, rng: torch.Generator) -> torch.Tensor:
    """The inverse softplus of steps from 0.001 to 0.1, whose logarithm is uniform, (width), float32."""
    low, high = math.log(0.001), math.log(0.1)
    dt = torch.exp(torch.rand(width, generator=rng).double() * (high - low) + low)
    return (dt + torch.log(-torch.expm1(-dt))).float()


def weights(spec: Spec) -> Weights:
    """Random weights under hub names; A_log and dt_bias float32, the rest in the spec's dtype."""
    rng = torch.Generator().manual_seed(spec.seed)
    out: Weights = {}

    def normal(name: str, *shape: int, std: float = spec.std, mean: float = 0.0) -> None:
        out[name] = (mean + std * torch.randn(*shape, generator=rng)).to(spec.dtype)

    def norm(name: str, size: int) -> None:
        normal(name, size, std=0.1, mean=1.0)

    def ffn(prefix: str, size: int, names: tuple[str, str, str]) -> None:
        gate, up, down = names
        normal(f"{prefix}{gate}.weight", size, spec.hidden)
        normal(f"{prefix}{up}.weight", size, spec.hidden)
        normal(f"{prefix}{down}.weight", spec.hidden, size)

    width = spec.heads * spec.kda_head_dim
    normal("model.embed_tokens.weight", VOCAB_SIZE, spec.hidden, std=max(spec.std, 0.02))
    for i, kind in enumerate(spec.layers):
        layer = f"model.layers.{i}."
        attn = f"{layer}self_attn."
        norm(f"{layer}input_layernorm.weight", spec.hidden)
        norm(f"{layer}post_attention_layernorm.weight", spec.hidden)
        if kind == "K":
            for x in "qkv":
                normal(f"{attn}{x}_proj.weight", width, spec.hidden)
                normal(f"{attn}{x}_conv1d.weight", width, 1, spec.conv, std=0.3)
            out[f"{attn}A_log"] = random_a_log(spec.heads, rng).reshape(1, 1, spec.heads, 1)
            out[f"{attn}dt_bias"] = random_dt_bias(width, rng)
            normal(f"{attn}f_a_proj.weight", spec.kda_head_dim, spec.hidden)
            normal(f"{attn}f_b_proj.weight", width, spec.kda_head_dim)
            normal(f"{attn}b_proj.weight", spec.heads, spec.hidden)
            normal(f"{attn}g_a_proj.weight", spec.kda_head_dim, spec.hidden)
            normal(f"{attn}g_b_proj.weight", width, spec.kda_head_dim)
            norm(f"{attn}o_norm.weight", spec.kda_head_dim)
            normal(f"{attn}o_proj.weight", spec.hidden, width)
        else:
            q_width = spec.heads * (spec.nope + spec.rope)
            if spec.q_lora is None:
                normal(f"{attn}q_proj.weight", q_width, spec.hidden)
            else:
                normal(f"{attn}q_a_proj.weight", spec.q_lora, spec.hidden)
                norm(f"{attn}q_a_layernorm.weight", spec.q_lora)
                normal(f"{attn}q_b_proj.weight", q_width, spec.q_lora)
            normal(f"{attn}kv_a_proj_with_mqa.weight", spec.kv_lora + spec.rope, spec.hidden)
            norm(f"{attn}kv_a_layernorm.weight", spec.kv_lora)
            normal(f"{attn}kv_b_proj.weight", spec.heads * (spec.nope + spec.v_dim), spec.kv_lora)
            normal(f"{attn}o_proj.weight", spec.hidden, spec.heads * spec.v_dim)
        if i < spec.dense_layers:
            ffn(f"{layer}mlp.", spec.intermediate, ("gate_proj", "up_proj", "down_proj"))
            continue
        moe = f"{layer}block_sparse_moe."
        normal(f"{moe}gate.weight", spec.experts, spec.hidden, std=max(spec.std, 0.1))
        normal(f"{moe}gate.e_score_correction_bias", spec.experts, std=0.1)
        for e in range(spec.experts):
            ffn(f"{moe}experts.{e}.", spec.moe_intermediate, ("w1", "w3", "w2"))
        if spec.shared_experts:
            size = spec.moe_intermediate * spec.shared_experts
            ffn(f"{moe}shared_experts.", size, ("gate_proj", "up_proj", "down_proj"))
    norm("model.norm.weight", spec.hidden)
    normal("lm_head.weight", VOCAB_SIZE, spec.hidden)
    return out


def in_layout(hub: Weights, spec: Spec, layout: Layout) -> Weights:
    """The same weights with another layout's names (as in transformers 5.23's conversion mapping)."""
    if layout == "hub":
        return hub
    if layout == "resaved":
        return {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in hub.items()}
    out: Weights = {}
    gates = ("f_a_proj.weight", "f_b_proj.weight", "dt_bias", "A_log")
    for name, tensor in hub.items():
        if "_conv1d." in name:
            if ".q_conv1d." in name:
                parts = [hub[name.replace(".q_", f".{x}_")] for x in "qkv"]
                out[name.replace(".q_conv1d.", ".conv1d.")] = torch.cat(parts)
        elif ".experts." in name:
            stem, rest = name.split(".block_sparse_moe.experts.")
            if rest == "0.w1.weight":
                prefix = f"{stem}.block_sparse_moe.experts."
                gate, down, up = (
                    torch.stack([hub[f"{prefix}{e}.w{n}.weight"] for e in range(spec.experts)])
                    for n in (1, 2, 3)
                )
                out[f"{stem}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
                out[f"{stem}.mlp.experts.down_proj"] = down
        elif name.endswith(gates):
            out[name.replace(".self_attn.", ".self_attn.forget_gate.")] = tensor
        else:
            out[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
    return out


def write_tokenizer(folder: Path, ranks: Sequence[bytes] = RANKS, **settings: object) -> Path:
    """`tiktoken.model` and `tokenizer_config.json` as on the hub; `settings` replaces keys of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    same = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    written: dict[str, object] = {
        "added_tokens_decoder": {
            str(len(ranks) + i): {"content": name, **same, "special": i not in TOOL_CALL_MARKS}
            for i, name in SPECIAL.items()
        },
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "[EOS]",
        "model_max_length": 4096,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(written | settings, indent=2))
    return folder


def write_checkpoint(folder: Path, spec: Spec, layout: Layout = "hub", shards: int = 2) -> Path:
    """Write the whole checkpoint to `folder`, creating it if needed; `shards=1` writes `model.safetensors`."""
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config(spec, layout), indent=2))
    tensors = in_layout(weights(spec), spec, layout)
    return write_weights(folder, tensors, shards)


def write_weights(folder: Path, tensors: Weights, shards: int, digits: int = 5) -> Path:
    """`model.safetensors`, or several shards and their index; digits: of the number of shards in their names."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:0{digits}d}.safetensors"
        part = names[s * len(names) // shards : (s + 1) * len(names) // shards]
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder
