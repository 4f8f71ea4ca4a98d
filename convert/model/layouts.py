"""Maps a tensor's canonical hub name to its location in each known checkpoint layout.

Input: a canonical hub name and shape. Output: the possible locations, each with the name and shape of a stored tensor
and the range of its elements. In a valid checkpoint exactly one of them exists. A location may be two tensors: weights
in MXFP4, four bits each, and their scales.

The rules of each family are in its module.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

from kimi_gguf.convert.source.mxfp4 import GROUP


@dataclass(frozen=True, slots=True)
class Place:
    """A contiguous range of a stored tensor that holds a whole canonical tensor."""

    stored: str
    stored_shape: tuple[int, ...]
    first: int  # element of the stored tensor where the canonical one begins
    # MXFP4: the tensor with a scale per group; `stored` holds two elements per byte.
    scales: str | None = None

    @property
    def tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and shape of each stored tensor."""
        if self.scales is None:
            return ((self.stored, self.stored_shape),)
        rows, columns = self.stored_shape
        return (self.stored, (rows, columns // 2)), (self.scales, (rows, columns // GROUP))


@dataclass(frozen=True)
class Rule:
    """A tensor `canonical` (a regular expression for the whole name) may be stored as `stored` (a format string of the
    expression's named groups).

    `experts`: the stored tensor's first dimension is the expert, which is the group `e` of the expression.
    `part`: (i, n), the tensor is the i-th of n equal parts along the first dimension (of the expert's slice).
    `scales`: a format string as well; the tensor, a matrix, is stored in MXFP4 with these scales.
    """

    canonical: str
    stored: str
    experts: bool = False
    part: tuple[int, int] = (0, 1)
    scales: str | None = None


@cache
def _compiled(rules: tuple[Rule, ...]) -> tuple[tuple[re.Pattern[str], Rule], ...]:
    return tuple((re.compile(rule.canonical), rule) for rule in rules)


def places(rules: tuple[Rule, ...], name: str, shape: tuple[int, ...], num_experts: int) -> list[Place]:
    """The places of the canonical tensor `name` of `shape` by a family's rules, the hub's own first."""
    found = [Place(name, shape, 0)]
    for pattern, rule in _compiled(rules):
        match = pattern.fullmatch(name)
        if match is None:
            continue
        index, count = rule.part
        stored_shape = (shape[0] * count, *shape[1:])
        first = index * math.prod(shape)
        if rule.experts:
            first += int(match["e"]) * math.prod(stored_shape)
            stored_shape = (num_experts, *stored_shape)
        groups = match.groupdict()  # for format strings: Match.expand took a quarter of a plan of Kimi K3
        scales = rule.scales.format_map(groups) if rule.scales else None
        found.append(Place(rule.stored.format_map(groups), stored_shape, first, scales))
    return found
