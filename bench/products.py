"""Products of weights alone, type by type: pristine against ours, and against the machine's limit.

Flows in: either build's libraries. Flows out: a row for each type and shape. Weights lie as llama.cpp puts them by
default on our side; pristine is at its best over `--repack 0/1`. The limit is the products that are formed over the
processor's rate for their kind, or the weights' bytes over the memory's rate, whichever takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from kimi_gguf.bench.limits import measure_limits
from kimi_gguf.bench.operators import Case, measure_case, programs
from kimi_gguf.engine.progress import Reporter

WEIGHTS = (
    "Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "BF16", "F16",
)  # fmt: skip
K = 2304  # the 48B's hidden size
USED = 8  # experts of a token
PRISTINE, OURS = ("product", "product-rows"), "product"


@dataclass(frozen=True)
class Shape:
    """What a product of the table has to do."""

    title: str
    rows: int
    tokens: int
    experts: int = 0
    copies: int = 1  # one behind the other, so that caches do not hold them

    def options(self, weights: str) -> tuple[str, ...]:
        """For the program."""
        return (
            f"weights={weights.lower().replace('_k', '_K')}", f"k={K}", f"rows={self.rows}", f"tokens={self.tokens}",
            f"experts={self.experts}", f"used={USED}", f"layers={self.copies}", "seconds=0.2", "least=3",
        )  # fmt: skip

    @property
    def products(self) -> int:
        """Multiply-adds of a copy."""
        return K * self.rows * self.tokens * (USED if self.experts else 1)

    def weight_bytes(self, weights: str) -> float:
        """Of a copy; every expert is met."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[weights]]
        return K * self.rows * max(self.experts, 1) * float(block_bytes / block)


SHAPES = (
    Shape("8 of 32 experts, 512 tokens", 1024, 512, experts=32),
    Shape("8 of 32 experts, 256 tokens", 1024, 256, experts=32),
    Shape("one matrix, 512 tokens", 4096, 512, copies=8),
    Shape("one matrix, 4 tokens", 65536, 4),
    Shape("one matrix, 1 token", 65536, 1),
)


def measure_products(libraries: dict[str, Path], threads: int, told: Reporter) -> Iterator[dict[str, Any]]:
    """Each type and shape, in turns. Raises `EngineError`."""
    made = programs(libraries)
    for weights in WEIGHTS:
        limits = measure_limits(threads)
        for shape in SHAPES:
            case = Case(f"{weights}, {shape.title}", "", PRISTINE, OURS, shape.options(weights))
            told.phase(case.title)
            row = measure_case(made, case, threads)
            forming, reading = (
                shape.products / limits.products(weights),
                shape.weight_bytes(weights) / limits.read,
            )
            yield row | {
                "weights": weights,
                "shape": shape.title,
                "floor": {
                    "share": max(forming, reading) / row["patched"]["seconds"],
                    "bound": "products" if forming >= reading else "memory",
                    "limits": vars(limits),
                },
            }
