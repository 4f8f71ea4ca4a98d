"""Writes files so that an interrupted write leaves no partial file.

Input: a path, and a function that writes the file. Output: the complete file.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a temporary file next to `file`, then rename it. The temporary file never stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.unfinished")
    try:
        write(part)
        part.replace(file)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
