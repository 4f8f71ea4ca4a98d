"""Synthetic checkpoints with the tensor names, shapes and dtypes of a published model, and a generated tokenizer.

Input: a folder, a config, a seed. Output: config.json, safetensors shards with their index, the tokenizer. Without a
seed the shards are sparse files: 98 GB of zeros that take a few megabytes on disk, for tests that need no values.
With a seed the values are random, for measurements in which quantization must take its real time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kimi_gguf.convert.model.families import family_of, hub_shapes, read_config
from kimi_gguf.convert.model.kimi_linear import published_config
from kimi_gguf.scripts.tokenizer_files import NUM_SPECIAL, write_ling_tokenizer, write_tokenizer

NUM_SHARDS = 20
BYTES = {"BF16": 2, "F32": 4}
POOL = 1 << 24  # number of random values; tensors are filled with sections of this pool
STD = 0.02

TensorInfo = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape
Config = Mapping[str, Any]


def smaller_config(layers: str, experts: int, vocab: int) -> dict[str, Any]:
    """The published config with fewer layers, experts and tokens. layers: a letter each, K for KDA, M for MLA."""
    config = published_config()
    config |= {"num_hidden_layers": len(layers), "num_experts": experts, "vocab_size": vocab}
    config |= {"bos_token_id": vocab - 256, "eos_token_id": vocab - 254, "pad_token_id": vocab - 1}
    for key, letter in (("kda_layers", "K"), ("full_attn_layers", "M")):
        config["linear_attn_config"][key] = [i for i, each in enumerate(layers, 1) if each == letter]
    return config


def ling_tiny_config() -> dict[str, Any]:
    """The keys of Ling-3.0-tiny's config.json that determine its tensors."""
    return {
        "architectures": ["BailingMoeV3ForCausalLM"],
        "eos_token_id": 156895,
        "first_k_dense_replace": 1,
        "gated_attention_proj_granularity_type": "head_wise",
        "head_dim": 128,
        "hidden_size": 1536,
        "intermediate_size": 4608,
        "kda_lower_bound": -5,
        "kda_safe_gate": True,
        "kv_lora_rank": 512,
        "layer_group_size": 4,
        "max_position_embeddings": 131072,
        "model_type": "bailing_hybrid",
        "moe_intermediate_size": 512,
        "n_group": 8,
        "no_kda_lora": True,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 24,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "pad_token_id": 156892,
        "q_lora_rank": 256,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_theta": 6000000,
        "routed_scaling_factor": 2.5,
        "short_conv_kernel_size": 4,
        "topk_group": 4,
        "v_head_dim": 128,
        "vocab_size": 157184,
    }


def tensors(config: Config) -> Iterator[TensorInfo]:
    """All tensors of a checkpoint with this config (published: 20,493 tensors, 49,122,681,728 parameters)."""
    model = read_config(json.dumps(config).encode(), "config.json")
    shapes, float32 = hub_shapes(model), family_of(model).float32
    for name in sorted(shapes, key=_place):
        yield name, "F32" if name.endswith(float32) else "BF16", shapes[name]


def _place(name: str) -> tuple[float, int]:
    """Sort key: by layer, then by expert, the order of published checkpoints."""
    match = re.match(r"model\.layers\.(\d+)\.(?:.+\.experts\.(\d+)\.)?", name)
    if match is None:
        return (-1 if "embed" in name else math.inf), 0
    return int(match[1]), 1 + int(match[2] or -1)


def num_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor's data."""
    return BYTES[info[1]] * math.prod(info[2])


def write_shard(file: Path, infos: list[TensorInfo], values: np.random.Generator | None) -> None:
    """Write one safetensors file: a valid header, then random values, or a hole (a sparse file)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in infos:
        end = offset + num_bytes((name, dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        if values is None:
            f.truncate(8 + len(text) + offset)
            return
        pool = values.standard_normal(POOL, dtype=np.float32) * np.float32(STD)
        stored = {"F32": pool, "BF16": (pool.view(np.uint32) >> 16).astype(np.uint16)}
        for info in infos:
            write_values(f, stored[info[1]], num_bytes(info) // BYTES[info[1]], values)


def write_values(f: IO[bytes], pool: NDArray[Any], count: int, values: np.random.Generator) -> None:
    """Write `count` values of the pool, in sections that start at random positions."""
    while count:
        start = int(values.integers(0, POOL // 2))
        piece = pool[start : start + count]
        f.write(piece.data)
        count -= len(piece)


def ranks(count: int) -> list[bytes]:
    """Tokens: all bytes, all pairs, then triples."""
    singles = [bytes([b]) for b in range(256)]
    pairs = [a + b for a, b in itertools.product(singles, singles)]
    triples = (a + b for a, b in itertools.product(pairs, singles))
    return list(itertools.islice(itertools.chain(singles, pairs, triples), count))


def write_synthetic(
    folder: Path, config: Config | None = None, num_shards: int = NUM_SHARDS, seed: int | None = None
) -> Path:
    """Write a synthetic checkpoint to `folder`, creating it if needed.

    config: None is the published config. seed: None writes sparse files.
    """
    config = published_config() if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    every = list(tensors(config))
    values = None if seed is None else np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    for s in range(num_shards):
        infos = every[s * len(every) // num_shards : (s + 1) * len(every) // num_shards]
        file = f"model-{s + 1:05d}-of-{num_shards:05d}.safetensors"
        write_shard(folder / file, infos, values)
        weight_map |= {name: file for name, _, _ in infos}
    index = {"metadata": {"total_size": sum(map(num_bytes, every))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config["model_type"] == "bailing_hybrid":
        first_special = config["pad_token_id"] - 1
        write_ling_tokenizer(folder, ranks(first_special), first_special)
    else:
        write_tokenizer(folder, ranks(config["vocab_size"] - NUM_SPECIAL), config["model_max_length"])
    return folder


MODELS = {"48B": published_config, "Ling-3.0-tiny": ling_tiny_config}


def main() -> None:
    """Run `python -m kimi_gguf.scripts.synthetic_checkpoint FOLDER`."""
    parser = argparse.ArgumentParser(
        description="Write a sparse checkpoint of a published model's full size; all values are zero."
    )
    parser.add_argument("--model", choices=MODELS, default="48B", help="the model (default: %(default)s)")
    parser.add_argument("folder", type=Path, help="folder to write to")
    options = parser.parse_args()
    print(write_synthetic(options.folder, MODELS[options.model]()))


if __name__ == "__main__":
    main()
