"""What is said at once of a path that cannot be a model, before a program starts or a build is made."""

from __future__ import annotations

from pathlib import Path

from kimi_gguf.patches.errors import EngineError


def check_gguf(path: Path) -> None:
    """Raises `EngineError` for a missing file and for one that does not begin as a GGUF file."""
    if not path.is_file():
        raise EngineError(
            f"{path}: no such file",
            expected="a GGUF file",
            todo="make one with: convert-kimi CHECKPOINT -o model.gguf --type Q8_0",
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise EngineError(
            f"{path}: not a GGUF file",
            expected="the bytes b'GGUF' at its start",
            found=repr(magic),
            todo="give a GGUF file; convert-kimi makes one from a checkpoint",
        )
