"""Random PEFT adapters of a checkpoint of any layout, and the checkpoint with an adapter merged into it.

Input: a checkpoint's folder. Output: a folder with adapter_config.json and adapter_model.safetensors as PEFT 0.21 saves
them, and `merged`, which adds what PEFT's `merge_and_unload` adds, in float32.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 3, 6.0
PREFIX = "base_model.model."
EMBEDDING = "embed_tokens.weight"
Choice = Callable[[str], bool]


def matrices(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The stored tensors that PEFT adapts: matrices of modules, and parameters that hold all experts."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module = (
                tensor.dim() == 2 and name.endswith(".weight") and "res_" not in name and "vision" not in name
            )
            if (module and "mm_projector" not in name) or (tensor.dim() == 3 and "conv" not in name):
                yield name, tensor


def write_adapter(
    folder: Path, checkpoint: Path, choice: Choice = lambda name: True, seed: int = 0, **config: Any
) -> Path:
    """An adapter of the chosen matrices; config: keys of adapter_config.json, rank_pattern among them."""
    folder.mkdir()
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in matrices(checkpoint):
        if not choice(name):
            continue
        *many, rows, columns = weight.shape
        rank, n = rank_of(name, config), (many[0] if many else 1)
        if name.endswith(EMBEDDING):
            key = PREFIX + name.removesuffix(".weight") + ".lora_embedding_{}"
            shapes = (rank, rows), (columns, rank)
        elif many:  # in the order of their names, each parameter but the last is wrapped by the next one
            wrapped = ".base_layer" if name.endswith("down_proj") else ""
            key = PREFIX + name.rpartition(".")[0] + wrapped + ".lora_{}.weight"
            shapes = (rank * n, columns), (rows, rank * n)
        else:
            key = PREFIX + name.removesuffix(".weight") + ".lora_{}.weight"
            shapes = (rank, columns), (rows, rank)
        for half, shape in zip("AB", shapes, strict=True):
            size = 1.0 if half == "A" else 0.1 / columns**0.5
            tensors[key.format(half)] = size * torch.randn(shape, generator=rng)
    written = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(written))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def pattern_of(name: str, patterns: dict[str, float], default: float) -> float:
    """The value of the first pattern that a module's name, or its parameter's, ends with."""
    module = name.removesuffix(".weight")
    return next((value for key, value in patterns.items() if re.search(rf"(^|\.){key}$", module)), default)


def rank_of(name: str, config: dict[str, Any]) -> int:
    return int(pattern_of(name, config.get("rank_pattern", {}), config.get("r", RANK)))


def delta(name: str, shape: torch.Size, adapter: Path) -> tuple[float, torch.Tensor, torch.Tensor] | None:
    """(scale, B, A): the adapter adds scale * B A to a stored tensor; None if it has no pair for it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    module, rank = PREFIX + name.removesuffix(".weight"), rank_of(name, config)
    alpha = pattern_of(name, config.get("alpha_pattern", {}), config["lora_alpha"])
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if name.endswith(EMBEDDING):
        keys = [f"{module}.lora_embedding_{half}" for half in "AB"]
    elif len(shape) == 3:
        wrapped = ".base_layer" if name.endswith("down_proj") else ""
        keys = [f"{module.rpartition('.')[0]}{wrapped}.lora_{half}.weight" for half in "AB"]
    else:
        keys = [f"{module}.lora_{half}.weight" for half in "AB"]
    if keys[0] not in tensors:
        return None
    a, b = (tensors[key] for key in keys)
    if len(shape) == 3:  # as in ParamWrapper.get_delta_weight
        return scale, b.reshape(len(b), rank, shape[0]).permute(2, 0, 1), a.reshape(shape[0], rank, -1)
    return (scale, a.T, b.T) if name.endswith(EMBEDDING) else (scale, b, a)


def merged(folder: Path, checkpoint: Path, adapters: list[tuple[Path, float]], exactly: bool = False) -> Path:
    """A copy of the checkpoint with the adapters merged, each with its scale; merged matrices are F32.

    exactly: in float32, the ranks one after the other, rounded to the stored type; without, in float64.
    """
    shutil.copytree(checkpoint, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            for adapter, scale in adapters:
                found = delta(name, weight.shape, adapter)
                if found is None:
                    continue
                factor, b, a = found
                if exactly:
                    total = b[..., :1] * a[..., :1, :]
                    for k in range(1, a.shape[-2]):
                        total += b[..., k : k + 1] * a[..., k : k + 1, :]
                    tensors[name] = (
                        tensors[name].float() + torch.tensor(factor * scale, dtype=torch.float32) * total
                    )
                else:
                    tensors[name] = (
                        tensors[name].double() + scale * factor * (b.double() @ a.double())
                    ).float()
            if exactly:
                tensors[name] = tensors[name].to(weight.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder
