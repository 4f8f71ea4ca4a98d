"""What is measured: the grid of cells, and the variants of each build.

Input: batches, depths, threads, cache types, numbers of sequences. Output: `Cell`s, ordered so that each depth is
reached once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

# (all cells of --grid, on a device) -> default batches and depths
SIZES = {
    (False, False): ((1, 8, 512), (0, 4096)),
    (True, False): ((1, 2, 3, 4, 7, 8, 32, 512, 2048), (0, 4096, 16384)),
    (False, True): ((1, 8, 512, 8192), (0, 8192)),
    (True, True): ((1, 2, 4, 8, 512, 2048, 8192), (0, 8192, 65536)),
}
THREADS = (1, 2)
DEVICE_THREADS = 4  # of the CPU, which still looks up the token embeddings
UBATCH = 512  # llama.cpp's default
DEVICE_WARM = 4  # decodes before a sample on a device: CUDA graphs are captured after some equal graphs
STEPS_TOKENS = 32  # most tokens per sequence that one sample adds to the depth


@dataclass(frozen=True)
class Cell:
    """One measurement: decoding `batch` tokens of each of `sequences` sequences after `depth` tokens."""

    cache_type: str
    sequences: int
    depth: int
    threads: int
    batch: int
    ubatch: int = UBATCH
    device: str | None = None  # None: the CPU

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
class Variant:
    """A build and the options of its process and context."""

    build: str  # "upstream" or "patched"
    repack: (
        bool  # llama.cpp may copy weights; patched then does so only if it is much faster and there is room
    )
    flash: bool

    @property
    def process(self) -> str:
        """Name of the process; variants that can share a loaded model share it."""
        return f"{self.build}{'' if self.repack else ' --repack 0'}"

    @property
    def name(self) -> str:
        """The name in records."""
        return f"{self.process}{'' if self.flash else ' -fa 0'}"


FLASH = (True, False)
PATCHED = Variant("patched", repack=True, flash=True)
UPSTREAM = tuple(
    Variant("upstream", repack, flash) for repack, flash in itertools.product((True, False), FLASH)
)
UPSTREAM_ON_DEVICE = tuple(Variant("upstream", True, flash) for flash in FLASH)  # devices do not repack


def variants(cell: Cell, chosen: Sequence[Variant]) -> list[Variant]:
    """The variants that can measure a cell: quantized caches and several sequences require flash attention."""
    plain = cell.cache_type in ("f32", "f16", "bf16") and cell.sequences == 1
    return [variant for variant in chosen if variant.flash or plain]


def grid(
    cache_types: Iterable[str],
    sequences: Iterable[int],
    depths: Iterable[int],
    threads: Iterable[int],
    batches: Iterable[int],
    ubatch: int = UBATCH,
    device: str | None = None,
) -> list[Cell]:
    """All combinations, ordered by depth, then by batch."""
    combined = itertools.product(
        dict.fromkeys(cache_types), sorted(set(sequences)), sorted(set(depths)), sorted(set(threads), reverse=True),
        sorted(set(batches)),
    )  # fmt: skip
    return [replace(Cell(*values), ubatch=ubatch, device=device) for values in combined]
