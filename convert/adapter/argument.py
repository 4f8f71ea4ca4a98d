"""Reads an adapter and its scale from the command line, as llama.cpp does: PATH or PATH:SCALE."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from kimi_gguf.convert.source.checkpoint import exists


def scaled_path(text: str) -> tuple[Path, float]:
    """The path of an adapter and its scale. What exists with a colon and a number in its name is that file."""
    path, colon, scale = text.rpartition(":")
    if not colon or exists(Path(text)):
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        return Path(text), 1.0
    if not path or not math.isfinite(value) or value == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected PATH:SCALE with a number that is not 0")
    return Path(path), value
