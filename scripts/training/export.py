"""Writes the demo checkpoint in the layout of a hub repository: config, shards, index, tokenizer, licence.

Input: a trained `DemoModel`, BPE ranks, held-out text. Output: a folder that `convert-kimi` reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kimi_gguf.convert.model.config import KimiConfig, LayerKind
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.scripts.training.model import DemoModel, hub_tensors, load_hub
from kimi_gguf.scripts.training.tokenizer import write_tokenizer

SHARDS = 2
INDEX_FILE = "model.safetensors.index.json"
HELDOUT_FILE = "heldout.txt"
LICENSE_FILE = "LICENSE-wordnet"


def hub_config(config: KimiConfig) -> dict[str, Any]:
    """`config.json` of a hub repository; layer lists count from 1."""
    layers = {
        kind: [number for number, layer in enumerate(config.layers, 1) if layer is kind] for kind in LayerKind
    }
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "bos_token_id": config.bos_token_id,
        "dtype": "bfloat16",
        "eos_token_id": config.eos_token_id,
        "first_k_dense_replace": config.num_dense_layers,
        "head_dim": config.hidden_size // config.num_heads,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "kv_lora_rank": config.kv_lora_rank,
        "linear_attn_config": {
            "full_attn_layers": layers[LayerKind.MLA],
            "head_dim": config.kda_head_dim,
            "kda_layers": layers[LayerKind.KDA],
            "num_heads": config.kda_num_heads,
            "short_conv_kernel_size": config.conv_kernel_size,
        },
        "mla_use_nope": True,
        "model_max_length": config.context_length,
        "model_type": "kimi_linear",
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_layer_freq": 1,
        "moe_renormalize": config.renormalize,
        "moe_router_activation_func": "sigmoid",
        "num_attention_heads": config.num_heads,
        "num_expert_group": config.num_expert_groups,
        "num_experts": config.num_experts,
        "num_experts_per_token": config.num_experts_per_token,
        "num_hidden_layers": len(config.layers),
        "num_key_value_heads": config.num_heads,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": config.num_shared_experts,
        "pad_token_id": config.pad_token_id,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "routed_scaling_factor": config.routed_scaling_factor,
        "tie_word_embeddings": False,
        "topk_group": config.topk_groups,
        "transformers_version": "4.57.1",
        "use_cache": True,
        "use_grouped_topk": True,
        "v_head_dim": config.v_head_dim,
        "vocab_size": config.vocab_size,
    }


def export(folder: Path, model: DemoModel, ranks: list[bytes], heldout: list[str], notice: str) -> None:
    """Writes all files of the repository except its README."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    _write_json(folder / "config.json", hub_config(config))
    _write_json(
        folder / "generation_config.json",
        {"eos_token_id": config.eos_token_id, "max_length": config.context_length},
    )
    write_tokenizer(folder, ranks, config.context_length)
    (folder / HELDOUT_FILE).write_text("".join(heldout), encoding="utf-8")
    (folder / LICENSE_FILE).write_text(notice, encoding="utf-8")
    _write_shards(folder, model)


def load(folder: Path, config: KimiConfig) -> DemoModel:
    """The model with the weights of an exported folder."""
    model = DemoModel(config)
    with open_checkpoint(folder) as checkpoint:
        load_hub(model, lambda name: torch.from_numpy(checkpoint.float32(name)))
    return model


def _write_shards(folder: Path, model: DemoModel) -> None:
    tensors = dict(hub_tensors(model))
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[written * SHARDS // total].append(name)
        written += tensor.nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
