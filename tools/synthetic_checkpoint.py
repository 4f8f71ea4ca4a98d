"""Synthetic checkpoints with the tensor names, shapes and dtypes of a published model, and a generated tokenizer.

Input: a folder, a config, a seed. Output: config.json, safetensors shards with their index, the tokenizer. Without a
seed the shards are sparse files: 98 GB of zeros that take a few megabytes on disk, for tests that need no values.
With a seed the values are random, for measurements in which quantization must take its real time. Kimi K3, with routed
experts in MXFP4, is possible without a seed only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kimi_gguf.bench.published import KIMI_K3, LING_FLASH, LING_TINY
from kimi_gguf.convert.model.families import family_of, hub_shapes, places_of, read_config
from kimi_gguf.convert.model.kimi_linear import published_config
from kimi_gguf.convert.model.tensor_table import FLOAT32
from kimi_gguf.tools.tokenizer_files import NUM_SPECIAL, write_ling_tokenizer, write_tokenizer

NUM_SHARDS = 20
K3_SHARDS = 96
BYTES = {"BF16": 2, "F32": 4, "U8": 1}
POOL = 1 << 24  # number of random values; tensors are filled with sections of this pool
STD = 0.02

K3_FLOAT32 = (*FLOAT32, "conv1d.weight", "o_norm.weight", "e_score_correction_bias")

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
    return {"architectures": ["BailingMoeV3ForCausalLM"], **LING_TINY}


def ling_flash_config() -> dict[str, Any]:
    """The same of Ling-3.0-flash, with its MTP layer."""
    return {"architectures": ["BailingMoeV3ForCausalLM"], **LING_FLASH, "num_nextn_predict_layers": 1}


def ling_mtp_config() -> dict[str, Any]:
    """12 layers of Ling-3.0-tiny with half of its experts, and an MTP layer, which Ling-3.0-flash has."""
    fewer = {"num_hidden_layers": 12, "num_experts": 64, "num_nextn_predict_layers": 1}
    return ling_tiny_config() | fewer


def k3_config(layers: str = "KKKM" * 23 + "M", experts: int = 896, vocab: int = 163840) -> dict[str, Any]:
    """The text model of the published Kimi K3, or one with fewer layers, experts and tokens."""
    kinds = {
        "kda_layers": [i for i, each in enumerate(layers, 1) if each == "K"],
        "full_attn_layers": [i for i, each in enumerate(layers, 1) if each == "M"],
    }
    weights = {"num_bits": 4, "type": "float", "group_size": 32, "symmetric": True, "strategy": "group"}
    text = KIMI_K3 | {
        "bos_token_id": vocab - 256,
        "eos_token_id": vocab - 254,
        "linear_attn_config": KIMI_K3["linear_attn_config"] | kinds,
        "model_type": "kimi_linear",
        "num_experts": experts,
        "num_experts_per_token": min(16, experts),
        "num_hidden_layers": len(layers),
        "num_key_value_heads": 96,
        "pad_token_id": vocab - 1,
        "quantization_config": {
            "config_groups": {"group_0": {"format": "mxfp4-pack-quantized", "weights": weights}},
            "format": "mxfp4-pack-quantized",
            "quant_method": "compressed-tensors",
        },
        "topk_group": 1,
        "vocab_size": vocab,
    }
    return {"architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "text_config": text}


def tensors(config: Config) -> Iterator[TensorInfo]:
    """All tensors of a checkpoint with this config (published: 20,493 tensors, 49,122,681,728 parameters; of Kimi
    K3's text model 497,052 tensors)."""
    if config["model_type"] == "kimi_k3":
        yield from _k3_tensors(config)
        return
    model = read_config(json.dumps(config).encode(), "config.json")
    shapes, float32 = hub_shapes(model), family_of(model).float32
    for name in sorted(shapes, key=_place):
        yield name, "F32" if name.endswith(float32) else "BF16", shapes[name]


def _k3_tensors(config: Config) -> Iterator[TensorInfo]:
    """Those of K3 under their published names."""
    model = read_config(json.dumps(config).encode(), "config.json")
    shapes = hub_shapes(model)
    for name in sorted(shapes, key=_place):
        shape = shapes[name]
        prefixed, *packed = places_of(model, name, shape)[1:]
        if packed:
            yield from ((stored, "U8", stored_shape) for stored, stored_shape in packed[0].tensors)
        elif name.endswith(".A_log"):
            yield prefixed.stored, "F32", (128,)  # padded
        else:
            yield prefixed.stored, "F32" if name.endswith(K3_FLOAT32) else "BF16", shape


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
    if seed is not None and config is not None and config["model_type"] == "kimi_k3":
        raise ValueError("no random values for MXFP4")
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
        return folder
    text = config.get("text_config", config)
    context = text.get("model_max_length") or text["max_position_embeddings"]
    write_tokenizer(folder, ranks(text["vocab_size"] - NUM_SPECIAL), context)
    return folder


# Name -> config, number of shards.
MODELS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "48B": (published_config, NUM_SHARDS),
    "Ling-3.0-tiny": (ling_tiny_config, 4),
    "Ling-3.0-flash": (ling_flash_config, 32),
    "Ling-3.0-tiny-12L-64E-MTP": (ling_mtp_config, 2),
    "Kimi-K3": (k3_config, K3_SHARDS),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `tools/run synthetic_checkpoint FOLDER`."""
    parser = argparse.ArgumentParser(
        description="Write a sparse checkpoint of a published model's full size; all values are zero without --seed."
    )
    parser.add_argument("--seed", type=int, help="write random values; the files are not sparse then")
    parser.add_argument("--model", choices=MODELS, default="48B", help="the model (default: %(default)s)")
    parser.add_argument("folder", type=Path, help="folder to write to")
    options = parser.parse_args(arguments)
    config, shards = MODELS[options.model]
    print(write_synthetic(options.folder, config(), shards, options.seed))


if __name__ == "__main__":
    main()
