"""What is measured: the grid of cells, and the ways of running either build.

Flows in: chosen batches, depths, threads, cache types, numbers of sequences. Flows out: `Cell`s in the order in
which a depth, once reached, is used for all that stands behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

BATCHES = (1, 2, 3, 4, 7, 8, 32, 512, 2048)
DEPTHS = (0, 4096, 16384)
THREADS = (1, 2)
QUICK_BATCHES = (1, 8, 512)
QUICK_DEPTHS = (0, 4096)
DEVICE_BATCHES = (1, 2, 4, 8, 512, 2048, 8192)
DEVICE_DEPTHS = (0, 8192, 65536)
DEVICE_QUICK_BATCHES = (1, 8, 512, 8192)
DEVICE_QUICK_DEPTHS = (0, 8192)
DEVICE_THREADS = 4  # of the processor, for what stays there: looking up the tokens' rows
UBATCH = 512  # llama.cpp's default
DEVICE_WARM = 4  # decodes before a sample on a device: graphs are captured after some that are alike
STEPS_TOKENS = 32  # tokens a sequence that the decodes of one sample may add to the depth


@dataclass(frozen=True)
class Cell:
    """One measurement: `batch` tokens of each of `sequences` sequences decoded behind `depth` tokens."""

    cache_type: str
    sequences: int
    depth: int
    threads: int
    batch: int
    ubatch: int = UBATCH
    device: str | None = None  # that computes it; None: the processor

    @property
    def tokens(self) -> int:
        """Tokens of one decode."""
        return self.batch * self.sequences

    @property
    def most_steps(self) -> int:
        """Decodes of one sample, at most."""
        return max(1, STEPS_TOKENS // self.batch)

    @property
    def warm(self) -> int:
        """Decodes before a sample, untimed."""
        few, many = (1, DEVICE_WARM) if self.device else (0, 1)
        return few if self.batch >= UBATCH else many


@dataclass(frozen=True)
class Way:
    """A way of running a build: what its process and its context are made with."""

    build: str  # "pristine" or "patched"
    repack: bool
    flash: bool

    @property
    def process(self) -> str:
        """Ways that share a loaded model share a process."""
        return f"{self.build}{'' if self.repack else ' --repack 0'}"

    @property
    def name(self) -> str:
        """As the table names it."""
        return f"{self.process}{'' if self.flash else ' -fa 0'}"


FLASH = (True, False)
OURS = Way("patched", repack=True, flash=True)
PRISTINE = tuple(Way("pristine", repack, flash) for repack, flash in itertools.product((True, False), FLASH))
PRISTINE_ON_DEVICE = tuple(Way("pristine", True, flash) for flash in FLASH)  # nothing is rearranged there


def ways(cell: Cell, pristine: Sequence[Way]) -> list[Way]:
    """The ways of running pristine here: quantised caches and several streams want flash attention."""
    plain = cell.cache_type in ("f32", "f16", "bf16") and cell.sequences == 1
    return [way for way in pristine if way.flash or plain]


def defaults(grid: bool, device: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batches and depths that nobody chose."""
    if device:
        return (DEVICE_BATCHES, DEVICE_DEPTHS) if grid else (DEVICE_QUICK_BATCHES, DEVICE_QUICK_DEPTHS)
    return (BATCHES, DEPTHS) if grid else (QUICK_BATCHES, QUICK_DEPTHS)


def grid(
    cache_types: Iterable[str],
    sequences: Iterable[int],
    depths: Iterable[int],
    threads: Iterable[int],
    batches: Iterable[int],
    ubatch: int = UBATCH,
    device: str | None = None,
) -> list[Cell]:
    """All combinations, deepest last, large batches last at each depth."""
    combined = itertools.product(
        dict.fromkeys(cache_types), sorted(set(sequences)), sorted(set(depths)), sorted(set(threads), reverse=True),
        sorted(set(batches)),
    )  # fmt: skip
    return [replace(Cell(*values), ubatch=ubatch, device=device) for values in combined]
