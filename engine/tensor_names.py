"""The layer in a tensor's name in GGUF files, as in `blk.3.attn_norm.weight`.

Input: a name. Output: its layer, or the name without it.
"""

from __future__ import annotations

import re
from typing import Final

LAYERS: Final = "blk."
_LAYER: Final = re.compile(r"blk\.([0-9]{1,9})\.")


def layer_of(name: str) -> int:
    """The number of a tensor's layer; -1 if it is of none, as `output.weight` is."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def without_layer(name: str) -> str:
    """The name without its layer, such as `attn_norm.weight`."""
    return name[match.end() :] if (match := _LAYER.match(name)) else name
