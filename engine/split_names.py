"""Names of a model that is split over several GGUF files, as llama.cpp expects them: its files
(NAME-00001-of-00003.gguf) and the keys in each that say how they belong together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

MAX_PARTS: Final = 65535  # split.count is an unsigned number of 16 bits
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
# Equal in all files of one model, and in no other's: a hash of all that the headers say. Our own key.
SET: Final = "kimi_gguf.split.set"
_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def part_paths(path: Path, count: int) -> list[Path]:
    """The files that an output `path` of `count` parts stands in; one part is `path` itself."""
    if count == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def place_in_set(path: Path) -> tuple[int, list[Path]] | None:
    """(number from 1 on, all parts) of a file that is called as a part; None for any other name."""
    match = _PART.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return None
    count = int(match[3])
    if count == 1:
        return 1, [path]
    return int(match[2]), part_paths(path.with_name(f"{match[1]}.gguf"), count)
