"""File names of a split model, NAME-00001-of-00003.gguf as llama.cpp requires, and the keys that number the splits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

MAX_SPLITS: Final = 65535  # split.count is an unsigned 16-bit integer
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
# A hash of the header; the same in all splits of one model, and different for every other model. A key of this
# project.
SET: Final = "kimi_gguf.split.set"
_SPLIT: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def split_paths(path: Path, count: int) -> list[Path]:
    """The file names of an output `path` with `count` splits; a single one is `path` itself."""
    if count == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def place_in_set(path: Path) -> tuple[int, list[Path]] | None:
    """(number of the split, from 1; all splits) for the name of a split; None for any other name."""
    match = _SPLIT.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return None
    count = int(match[3])
    if count == 1:
        return 1, [path]
    return int(match[2]), split_paths(path.with_name(f"{match[1]}.gguf"), count)
