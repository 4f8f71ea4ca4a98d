"""Facts about the inputs of a report: hashes of the files, number of tokens, precision of the reference.

Input: files. Output: dictionaries of strings and numbers, ready for JSON. File names have no folders, because
reports are shared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimi_gguf.convert.source.checkpoint import Checkpoint
from kimi_gguf.engine.file_hash import hash_files
from kimi_gguf.engine.gguf_check import all_splits
from kimi_gguf.engine.tensor_types import TENSOR_TYPES
from kimi_gguf.validate.models import REFERENCES
from kimi_gguf.validate.tensors import open_gguf

Facts = dict[str, Any]


def readable(text: str) -> str:
    """A text for a report: bytes of a name that are not UTF-8 become backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _file_facts(paths: Sequence[Path], progress: Callable[[int, int], None]) -> Facts:
    """The first file's name, size in bytes and SHA-256 of all files concatenated, and the SHA-256 of each file.

    `progress` gets the number of bytes done and the total.
    """
    hashes = hash_files(paths, progress)
    return {
        "name": readable(paths[0].name),
        "bytes": sum(path.stat().st_size for path in paths),
        "sha256": hashes.all,
        "files_sha256": list(hashes.each),
    }


def gguf_facts(path: Path, progress: Callable[[int, int], None]) -> Facts:
    """File facts, the model's name, the type of most of its elements, and the type with the fewest bits."""
    with open_gguf(path) as model:
        name, tensors = model.keys.get("general.name", ""), model.tensors.values()
    elements: Counter[str] = Counter()
    for tensor in tensors:
        elements[tensor.type.name] += tensor.elements
    return {
        **_file_facts(all_splits(path), progress),
        "model": readable(str(name)),
        "type": max(elements, key=lambda kind: elements[kind]),
        "lowest_type": min(elements, key=lambda kind: TENSOR_TYPES[kind].nbytes((1 << 15,))),
        "elements_by_type": dict(elements),
        "tensors": len(tensors),
    }


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """The files of a checkpoint that are hashed: its config, then the weights."""
    return list(dict.fromkeys((checkpoint.folder / "config.json", *checkpoint.files)))


def lora_facts(lora: Sequence[tuple[Path, float]], progress: Callable[[int, int], None]) -> Facts:
    """The adapters with which the file runs; nothing without any."""
    adapters = [{**_file_facts([path], progress), "scale": scale} for path, scale in lora]
    return {"lora": adapters} if adapters else {}


def checkpoint_facts(checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> Facts:
    """Name, parameter count, and the hashes of the config and weight files, and of merged adapters."""
    adapters = [vars(adapter) | {"name": readable(adapter.name)} for adapter in checkpoint.merged]
    return {
        **({"adapters": adapters} if adapters else {}),
        "name": readable(checkpoint.folder.resolve().name),
        "parameters": sum(int(np.prod(shape)) for shape in checkpoint.shapes.values()),
        "files": [_file_facts([path], progress) for path in files_of(checkpoint)],
    }


def ids_facts(ids: np.ndarray[Any, Any], text_source: str, generated: int) -> Facts:
    """Source, count, and the SHA-256 of the ids as little-endian 32-bit integers."""
    return {
        "source": readable(text_source),
        "count": len(ids),
        "generated": generated,
        "sha256": hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest(),
    }


def reference_facts(architecture: str, dtype: torch.dtype) -> Facts:
    """Implementation, precision and device of the reference."""
    return {
        "implementation": f"{REFERENCES[architecture].__module__}, plain PyTorch",
        "precision": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }
