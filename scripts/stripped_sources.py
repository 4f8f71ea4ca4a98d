"""C, C++ and CUDA sources without comments, to see whether what a page was made from has changed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def stripped(files: Iterable[Path]) -> str:
    """The files' text in the given order, without comments and blank lines; words are one space apart."""
    code = (line.partition("//")[0].split() for file in files for line in file.read_text().splitlines())
    return "\n".join(" ".join(words) for words in code if words)
