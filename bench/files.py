"""Files that are whole or not there.

Flows in: a name and what writes the file. Flows out: the file under its name.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside its place, then give it its name; nothing else is ever left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.unfinished")
    try:
        write(part)
        part.replace(file)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
