"""Writes the demo checkpoint in the layout of a hub repository: config, shards, index, tokenizer, licence.

Input: a trained `DemoModel`, BPE ranks, held-out text. Output: a folder that `convert-kimi` reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from model import DemoModel, hub_config, hub_tensors, load_hub
from safetensors.torch import save_file

from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.tools.tokenizer_files import write_tokenizer

SHARDS = 2
INDEX_FILE = "model.safetensors.index.json"
HELDOUT_FILE = "heldout.txt"
LICENSE_FILE = "LICENSE-wordnet"


def export(folder: Path, model: DemoModel, ranks: list[bytes], heldout: list[str], notice: str) -> None:
    """Writes all files of the repository except its README."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hub_config()
    length = config["model_max_length"]
    _write_json(folder / "config.json", config)
    generation = {"eos_token_id": config["eos_token_id"], "max_length": length}
    _write_json(folder / "generation_config.json", generation)
    write_tokenizer(folder, ranks, length)
    (folder / HELDOUT_FILE).write_text("".join(heldout), encoding="utf-8")
    (folder / LICENSE_FILE).write_text(notice, encoding="utf-8")
    _write_shards(folder, model)


def load(folder: Path, config: ModelConfig) -> DemoModel:
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
