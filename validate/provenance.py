"""What a report must say about where its figures come from: hashes of the inputs, the reference.

Flows in: files. Flows out: plain dictionaries of text and numbers, ready for JSON. Files are
named without their folders: a report is meant to be shared.
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
from kimi_gguf.engine.gguf_check import all_parts
from kimi_gguf.validate.tensors import open_gguf

CHUNK = 1 << 24
Facts = dict[str, Any]


def file_facts(path: Path, progress: Callable[[int, int], None] | None = None) -> Facts:
    """Name, size in bytes and SHA-256; `progress` gets bytes done and in all."""
    return _facts([path], progress)


def _facts(paths: Sequence[Path], progress: Callable[[int, int], None] | None) -> Facts:
    """Of several files: the first one's name, and size and SHA-256 of all, one behind the other."""
    digest, done, size = hashlib.sha256(), 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, size)
    return {"name": paths[0].name, "bytes": size, "sha256": digest.hexdigest()}


def gguf_facts(path: Path, progress: Callable[[int, int], None] | None = None) -> Facts:
    """File facts, the model's name, and the type that most of its elements are stored in."""
    with open_gguf(path) as model:
        name, tensors = model.keys.get("general.name", ""), model.tensors.values()
    elements: Counter[str] = Counter()
    for tensor in tensors:
        elements[tensor.type.name] += tensor.elements
    return {
        **_facts(all_parts(path), progress),
        "model": str(name),
        "type": max(elements, key=lambda kind: elements[kind]),
        "elements_by_type": dict(elements),
        "tensors": len(tensors),
    }


def checkpoint_facts(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> Facts:
    """The checkpoint's configuration and weight files."""
    config = checkpoint.folder / "config.json"
    return {
        "name": checkpoint.folder.resolve().name,
        "parameters": sum(int(np.prod(checkpoint.shape(name))) for name in checkpoint.names()),
        "files": [file_facts(path, progress) for path in dict.fromkeys((config, *checkpoint.files))],
    }


def ids_facts(ids: np.ndarray[Any, Any], text_source: str, generated: int) -> Facts:
    """The token ids: where from, how many, hash of them as little-endian 32-bit integers."""
    return {
        "source": text_source,
        "count": len(ids),
        "generated": generated,
        "sha256": hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest(),
    }


def reference_facts(dtype: torch.dtype) -> Facts:
    """How the reference computes."""
    return {
        "implementation": "kimi_gguf.validate.reference, plain PyTorch",
        "precision": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }
