"""Random Kimi K3 checkpoints with the published names, shapes and dtypes, for tests.

Input: a `K3Spec` (shape, scale of the weights, seed). Output: a folder with config.json, safetensors shards with their
index, `tiktoken.model` and `tokenizer_config.json`. Routed experts have values that MXFP4 represents exactly, so that a
packed checkpoint and one in BF16 contain the same model. `weights` returns the values under canonical names, which have
no `language_model.` in front.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import NUM_RANKS, VOCAB_SIZE, Weights, write_tokenizer, write_weights

# Names of special tokens, by distance from the last rank.
SPECIAL = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|end_of_msg|>",
    3: "<|open|>",
    4: "<|close|>",
    5: "<|sep|>",
    9: "[EOT]",
    18: "<|media_begin|>",
    254: "[UNK]",
    255: "[PAD]",
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # values of four bits
GROUP = 32  # elements with one scale
PREFIX = "language_model."
EXPERT = re.compile(r".+\.experts\.\d+\.w[123]\.weight")
FLOAT32 = ("A_log", "dt_bias", "conv1d.weight", "o_norm.weight", "e_score_correction_bias")  # stored as F32


@dataclass(frozen=True)
class K3Spec:
    """Shape and statistics of a random checkpoint; `layers` has a letter per layer, K for KDA and M for MLA."""

    layers: str = "KKMK"
    hidden: int = 64
    heads: int = 2
    kda_head_dim: int = 32
    stored_heads: int = 4  # length of A_log in the file; only the first `heads` values are used
    conv: int = 4
    q_lora: int | None = 24
    kv_lora: int = 64
    nope: int = 32
    rope: int = 16
    v_dim: int = 32
    output_gate: bool = True
    intermediate: int = 96
    dense_layers: int = 1
    experts: int = 4
    experts_used: int = 2
    shared_experts: int = 2
    moe_intermediate: int = 64
    latent: int | None = 32  # width of the space of the routed experts
    latent_norm: bool = True
    groups: int = 1
    topk_groups: int = 1
    scaling: float = 1.5
    renormalize: bool = True
    res_block: int = 2  # 0: no residual attention
    situ_beta: float = 4.0
    situ_linear_beta: float | None = 25.0
    lower_bound: float = -5.0
    eps: float = 1e-5
    std: float = 0.1
    scales: tuple[int, int] = (121, 124)  # smallest and largest byte of the experts' scales; 127 means 1
    seed: int = 0

    @property
    def id(self) -> str:
        return f"{self.layers}-h{self.heads}x{self.kda_head_dim}-e{self.experts}-s{self.seed}"


def quantization_config() -> dict[str, Any]:
    """The published `quantization_config`: routed experts in MXFP4."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": GROUP,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": "torch.uint8",
        "strategy": "group",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }
    group = {
        "format": "mxfp4-pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    parts = ("self_attn", "shared_experts", r"mlp\.(gate|up|gate_up|down)_proj", "lm_head", "vision_tower")
    return {
        "config_groups": {"group_0": group},
        "format": "mxfp4-pack-quantized",
        "global_compression_ratio": None,
        "ignore": [f"re:.*{part}.*" for part in parts],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def config(spec: K3Spec, packed: bool = True) -> dict[str, Any]:
    """The checkpoint's config.json: the text model's is inside that of the multimodal model."""
    tokens = {"bos_token_id": NUM_RANKS, "eos_token_id": NUM_RANKS + 2, "pad_token_id": NUM_RANKS + 255}
    text: dict[str, Any] = tokens | {
        "activation_situ_beta": spec.situ_beta,
        "activation_situ_linear_beta": spec.situ_linear_beta,
        "architectures": ["KimiLinearForCausalLM"],
        "attn_res_block_size": spec.res_block,
        "dtype": "bfloat16",
        "first_k_dense_replace": spec.dense_layers,
        "hidden_act": "situ",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "kv_lora_rank": spec.kv_lora,
        "latent_moe_use_norm": spec.latent_norm,
        "linear_attn_config": {
            "full_attn_layers": [i + 1 for i, c in enumerate(spec.layers) if c == "M"],
            "gate_lower_bound": spec.lower_bound,
            "head_dim": spec.kda_head_dim,
            "kda_layers": [i + 1 for i, c in enumerate(spec.layers) if c == "K"],
            "num_heads": spec.heads,
            "short_conv_kernel_size": spec.conv,
            "use_full_rank_gate": True,
        },
        "max_position_embeddings": 4096,
        "mla_use_nope": True,
        "mla_use_output_gate": spec.output_gate,
        "model_type": "kimi_linear",
        "moe_intermediate_size": spec.moe_intermediate,
        "moe_layer_freq": 1,
        "moe_renormalize": spec.renormalize,
        "moe_router_activation_func": "sigmoid",
        "num_attention_heads": spec.heads,
        "num_expert_group": spec.groups,
        "num_experts": spec.experts,
        "num_experts_per_token": spec.experts_used,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": spec.heads,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": spec.shared_experts,
        "q_lora_rank": spec.q_lora,
        "qk_nope_head_dim": spec.nope,
        "qk_rope_head_dim": spec.rope,
        "rms_norm_eps": spec.eps,
        "routed_expert_hidden_size": spec.latent,
        "routed_scaling_factor": spec.scaling,
        "tie_word_embeddings": False,
        "topk_group": spec.topk_groups,
        "topk_method": "noaux_tc",
        "use_grouped_topk": True,
        "v_head_dim": spec.v_dim,
        "vocab_size": VOCAB_SIZE,
    }
    if packed:
        text["quantization_config"] = quantization_config()
    return tokens | {
        "architectures": ["KimiK3ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_kimi_k3.KimiK3Config"},
        "dtype": "bfloat16",
        "model_type": "kimi_k3",
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": {"text_hidden_size": spec.hidden, "vt_hidden_size": 16},
    }


def packed_experts(spec: K3Spec) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Canonical name -> (packed [rows, columns / 2], scales [rows, columns / 32]), both uint8."""
    rng = torch.Generator().manual_seed(spec.seed + 1000)
    latent = spec.latent or spec.hidden
    shapes = {"w1": (spec.moe_intermediate, latent), "w3": (spec.moe_intermediate, latent)}
    shapes["w2"] = (latent, spec.moe_intermediate)
    low, high = spec.scales
    out = {}
    for i in range(spec.dense_layers, len(spec.layers)):
        for e in range(spec.experts):
            for w, (rows, columns) in shapes.items():
                packed = torch.randint(0, 256, (rows, columns // 2), generator=rng, dtype=torch.uint8)
                scale = torch.randint(
                    low, high + 1, (rows, columns // GROUP), generator=rng, dtype=torch.int32
                )
                name = f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight"
                out[name] = packed, scale.to(torch.uint8)
    return out


def unpacked(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values as float32: element 2i in the low half of byte i, times 2^(scale - 127)."""
    pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    exponents = scales.int().repeat_interleave(GROUP, -1) - 127
    return torch.ldexp(E2M1[pairs.int()].double(), exponents).float()


def weights(spec: K3Spec) -> Weights:
    """Random weights under canonical names; those that are F32 in the published checkpoint are float32, the experts
    are dequantized to float32, the rest is bfloat16."""
    rng = torch.Generator().manual_seed(spec.seed)
    out: Weights = {}

    def normal(name: str, *shape: int, std: float = spec.std, mean: float = 0.0) -> None:
        dtype = torch.float32 if name.endswith(FLOAT32) else torch.bfloat16
        out[name] = (mean + std * torch.randn(*shape, generator=rng)).to(dtype)

    def norm(name: str, size: int) -> None:
        normal(name, size, std=0.1, mean=1.0)

    def ffn(prefix: str, size: int) -> None:
        normal(f"{prefix}gate_proj.weight", size, spec.hidden)
        normal(f"{prefix}up_proj.weight", size, spec.hidden)
        normal(f"{prefix}down_proj.weight", spec.hidden, size)

    def score(name: str) -> None:
        norm(f"{name}_norm.weight", spec.hidden)
        normal(f"{name}_proj.weight", 1, spec.hidden, std=spec.hidden**-0.5)

    width, experts = spec.heads * spec.kda_head_dim, packed_experts(spec)
    normal("model.embed_tokens.weight", VOCAB_SIZE, spec.hidden)
    for i, kind in enumerate(spec.layers):
        layer = f"model.layers.{i}."
        attn = f"{layer}self_attn."
        norm(f"{layer}input_layernorm.weight", spec.hidden)
        norm(f"{layer}post_attention_layernorm.weight", spec.hidden)
        if spec.res_block:
            score(f"{layer}self_attention_res")
            score(f"{layer}mlp_res")
        if kind == "K":
            for x in "qkv":
                normal(f"{attn}{x}_proj.weight", width, spec.hidden)
                normal(f"{attn}{x}_conv1d.weight", width, 1, spec.conv, std=0.3)
            out[f"{attn}A_log"] = torch.rand(spec.heads, generator=rng) * 2 - 1
            normal(f"{attn}dt_bias", width, std=1.0)
            normal(f"{attn}f_a_proj.weight", spec.kda_head_dim, spec.hidden)
            normal(f"{attn}f_b_proj.weight", width, spec.kda_head_dim)
            normal(f"{attn}b_proj.weight", spec.heads, spec.hidden)
            normal(f"{attn}g_proj.weight", width, spec.hidden)
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
            if spec.output_gate:
                normal(f"{attn}g_proj.weight", spec.heads * spec.v_dim, spec.hidden)
            normal(f"{attn}o_proj.weight", spec.hidden, spec.heads * spec.v_dim)
        if i < spec.dense_layers:
            ffn(f"{layer}mlp.", spec.intermediate)
            continue
        moe = f"{layer}block_sparse_moe."
        normal(f"{moe}gate.weight", spec.experts, spec.hidden)
        normal(f"{moe}gate.e_score_correction_bias", spec.experts)
        for name, (packed, scales) in experts.items():
            if name.startswith(moe):
                out[name] = unpacked(packed, scales)
        if spec.latent is not None:
            normal(f"{moe}routed_expert_down_proj.weight", spec.latent, spec.hidden)
            normal(f"{moe}routed_expert_up_proj.weight", spec.hidden, spec.latent)
            if spec.latent_norm:
                norm(f"{moe}routed_expert_norm.weight", spec.latent)
        ffn(f"{moe}shared_experts.", spec.moe_intermediate * spec.shared_experts)
    norm("model.norm.weight", spec.hidden)
    if spec.res_block:
        score("model.output_attn_res")
    normal("lm_head.weight", VOCAB_SIZE, spec.hidden)
    return out


def stored(spec: K3Spec, packed: bool = True) -> Weights:
    """The tensors of the files, with their names there; the vision model is two tensors."""
    out: Weights = {}
    experts = packed_experts(spec)
    for name, tensor in weights(spec).items():
        if name.endswith(".A_log"):
            padded = torch.full((max(spec.stored_heads, spec.heads),), math.nan)  # the padding is not used
            padded[: spec.heads] = tensor
            out[PREFIX + name] = padded
        elif EXPERT.fullmatch(name) and packed:
            out[f"{PREFIX}{name}_packed"], out[f"{PREFIX}{name}_scale"] = experts[name]
        else:
            out[PREFIX + name] = tensor.to(torch.bfloat16) if EXPERT.fullmatch(name) else tensor
    out["mm_projector.proj.0.weight"] = torch.zeros(4, 4, dtype=torch.bfloat16)
    out["vision_tower.patch_embed.proj.weight"] = torch.zeros(4, 3, 2, 2, dtype=torch.bfloat16)
    return out


def write_k3_tokenizer(folder: Path) -> Path:
    """The tokenizer of K3: its own special tokens, and no chat template."""
    named = {str(NUM_RANKS + i): {"content": name, "special": True} for i, name in SPECIAL.items()}
    write_tokenizer(folder, added_tokens_decoder=named)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings, indent=2))
    return folder


def write_checkpoint(folder: Path, spec: K3Spec, packed: bool = True, shards: int = 3) -> Path:
    """Write the whole checkpoint to `folder`, creating it if needed; `shards=1` writes `model.safetensors`."""
    write_k3_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config(spec, packed), indent=2))
    return write_weights(folder, stored(spec, packed), shards, digits=6)
