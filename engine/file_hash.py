"""SHA-256 of large files.

Input: paths. Output: hashes in hexadecimal. Raises `OSError`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

CHUNK: Final = 1 << 24  # bytes that are read at once


class Digest(Protocol):
    """A hash that grows, as hashlib makes it."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class FileHashes:
    """The hashes of the files of a model."""

    each: tuple[str, ...]  # of each file
    all: str  # of all files concatenated


def hash_files(paths: Sequence[Path], progress: Callable[[int, int], None]) -> FileHashes:
    """Hash files, reading each once. `progress` gets the number of bytes done and the total."""
    done, size = 0, sum(path.stat().st_size for path in paths)
    whole, digests = hashlib.sha256(), []
    for path in paths:
        of_file = whole if len(paths) == 1 else hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                for digest in {of_file, whole}:
                    digest.update(chunk)
                done += len(chunk)
                progress(done, size)
        digests.append(of_file.hexdigest())
    return FileHashes(tuple(digests), whole.hexdigest())
