"""Maps a tensor's canonical hub name to its location in each known checkpoint layout.

Input: a canonical hub name and shape. Output: the possible locations, each with the name and shape of a stored tensor
and the range of its elements. In a valid checkpoint exactly one of them exists.

The layouts: the hub's; transformers' `save_pretrained` (hub names, but dense FFNs under `block_sparse_moe`);
transformers' in-memory names (`forget_gate`, q, k and v convolutions in one tensor, experts in one tensor).
Source: `conversion_mapping.py` of transformers 5.23, `kimi_linear`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Place:
    """A contiguous range of a stored tensor that holds a whole canonical tensor."""

    stored: str
    stored_shape: tuple[int, ...]
    first: int  # element of the stored tensor where the canonical one begins


@dataclass(frozen=True)
class Rule:
    """A tensor `canonical` (a regular expression for the whole name) may be stored as `stored` (its template).

    `experts`: the stored tensor's first dimension is the expert, which is the group `e` of the expression.
    `part`: (i, n), the tensor is the i-th of n equal parts along the first dimension (of the expert's slice).
    """

    canonical: str
    stored: str
    experts: bool = False
    part: tuple[int, int] = (0, 1)


_LAYER: Final = r"(?P<layer>model\.layers\.\d+)\."
_ATTN: Final = _LAYER + r"self_attn\."
_MOE: Final = _LAYER + r"block_sparse_moe\."
_EXPERT: Final = _MOE + r"experts\.(?P<e>\d+)\."

RULES: Final = (
    # transformers' save_pretrained: every FFN under block_sparse_moe
    Rule(_LAYER + r"mlp\.(?P<rest>(gate|up|down)_proj\.weight)", r"\g<layer>.block_sparse_moe.\g<rest>"),
    # transformers' in-memory names
    Rule(_MOE + r"(?P<rest>(gate|shared_experts)\..+)", r"\g<layer>.mlp.\g<rest>"),
    Rule(_EXPERT + r"(?P<rest>w[123]\.weight)", r"\g<layer>.mlp.experts.\g<e>.\g<rest>"),
    Rule(_EXPERT + r"w1\.weight", r"\g<layer>.mlp.experts.gate_up_proj", experts=True, part=(0, 2)),
    Rule(_EXPERT + r"w3\.weight", r"\g<layer>.mlp.experts.gate_up_proj", experts=True, part=(1, 2)),
    Rule(_EXPERT + r"w2\.weight", r"\g<layer>.mlp.experts.down_proj", experts=True),
    Rule(_ATTN + r"(?P<rest>f_[ab]_proj\.weight|dt_bias|A_log)", r"\g<layer>.self_attn.forget_gate.\g<rest>"),
    *(
        Rule(_ATTN + rf"{x}_conv1d\.weight", r"\g<layer>.self_attn.conv1d.weight", part=(i, 3))
        for i, x in enumerate("qkv")
    ),
)
_COMPILED: Final = tuple((re.compile(rule.canonical), rule) for rule in RULES)


def places(name: str, shape: tuple[int, ...], num_experts: int) -> list[Place]:
    """The places of the canonical tensor `name` of `shape`, the hub's own first."""
    found = [Place(name, shape, 0)]
    for pattern, rule in _COMPILED:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        index, count = rule.part
        stored_shape = (shape[0] * count, *shape[1:])
        first = index * math.prod(shape)
        if rule.experts:
            first += int(match["e"]) * math.prod(stored_shape)
            stored_shape = (num_experts, *stored_shape)
        found.append(Place(match.expand(rule.stored), stored_shape, first))
    return found
