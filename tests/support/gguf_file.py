"""Writes small GGUF files from keys and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from numpy.typing import NDArray


def write_gguf(
    path: Path,
    architecture: str = "kimi-linear",
    tensors: Mapping[str, NDArray[Any]] | None = None,
    **keys: Any,
) -> Path:
    """Write a file; return its path. keys: what GGUFWriter's methods add, such as name="demo" for `add_name`."""
    writer = GGUFWriter(path, architecture)
    for name, value in keys.items():
        getattr(writer, f"add_{name}")(value)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
