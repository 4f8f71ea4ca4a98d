"""Times single matmuls, by weight type: upstream, patched, and % of roofline.

Input: the libraries of both builds. Output: a row for each type and shape. Upstream uses the faster of
`--repack 0/1`. The least time is that of the multiply-adds at the peak rate of
their type, or of reading the weights, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.bench.operators import Case, measure_case, programs
from kimi_gguf.bench.roofline import measure_peaks
from kimi_gguf.engine.progress import Reporter
from kimi_gguf.engine.tensor_types import TENSOR_TYPES

WEIGHTS = (
    "Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "BF16", "F16",
)  # fmt: skip
K = 2304  # the 48B's hidden size
USED = 8  # experts per token
SECONDS = 0.2  # of a sample
UPSTREAM, PATCHED = ("product", "product-rows"), "product"


@dataclass(frozen=True)
class Shape:
    """A matmul of the table."""

    title: str
    rows: int
    tokens: int
    experts: int = 0
    copies: int = 1  # computed one after the other, so that the caches do not hold them

    def options(self, weights: str) -> tuple[str, ...]:
        """Arguments of the program."""
        return (
            f"weights={weights.lower().replace('_k', '_K')}", f"k={K}", f"rows={self.rows}", f"tokens={self.tokens}",
            f"experts={self.experts}", f"used={USED}", f"layers={self.copies}", f"seconds={SECONDS}", "least=3",
        )  # fmt: skip

    @property
    def macs(self) -> int:
        """Multiply-adds of a copy."""
        return K * self.rows * self.tokens * (USED if self.experts else 1)

    def weight_bytes(self, weights: str) -> int:
        """Bytes of a copy; every expert is used."""
        return TENSOR_TYPES[weights].nbytes((K, self.rows, max(self.experts, 1)))


SHAPES = (
    Shape("8 of 32 experts, 512 tokens", 1024, 512, experts=32),
    Shape("8 of 32 experts, 256 tokens", 1024, 256, experts=32),
    Shape("one matrix, 512 tokens", 4096, 512, copies=8),
    Shape("one matrix, 4 tokens", 65536, 4),
    Shape("one matrix, 1 token", 65536, 1),
)


def measure_matmuls(libraries: dict[str, Path], threads: int, reporter: Reporter) -> Iterator[dict[str, Any]]:
    """Measure each type and shape, A/B. Raises `EngineError`."""
    made = programs(libraries)
    for weights in WEIGHTS:
        peaks = measure_peaks(threads)
        for shape in SHAPES:
            case = Case(f"{weights}, {shape.title}", "", UPSTREAM, PATCHED, shape.options(weights))
            reporter.phase(case.title)
            row = measure_case(made, case, threads)
            computing, reading = shape.macs / peaks.matmul(weights), shape.weight_bytes(weights) / peaks.read
            floor = {
                "share": max(computing, reading) / row["patched"]["seconds"],
                "bound": "compute" if computing >= reading else "memory",
                "limits": vars(peaks),
            }
            yield row | {"weights": weights, "shape": shape.title, "floor": floor}
