"""Pass/fail limits for a GGUF file, by its type.

Input: `Evidence`, what was measured. Output: `GateResult`s; the validation passes if all of them pass.

NaN fails every gate. docs/validation.md explains how the limits were chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kimi_gguf.validate.tensors import TensorProof

if TYPE_CHECKING:  # it imports torch
    from kimi_gguf.validate.measure import Measured


@dataclass(frozen=True)
class Limit:
    """`figure` of the `over` summary of each variant must be at most (or at least) `value`."""

    figure: str  # a field of Summary, or of Measured when `over` is ""
    over: str  # "all", "judged", "same_experts" or ""
    value: float
    title: str
    at_least: bool = False


@dataclass(frozen=True)
class GateResult:
    """The result of one gate, ready to be shown."""

    title: str
    variant: str  # title of the variant, or "" for the file as a whole
    found: float
    limit: float
    at_least: bool
    passed: bool


@dataclass(frozen=True)
class Evidence:
    """What was measured about a file: its type, its runs, upstream llama.cpp's runs, its tensors."""

    type: str  # F32, BF16, Q8_0, ...; of several types the one with the fewest bits
    runs: list[Measured]
    upstream: list[Measured]  # the same variants; empty without --upstream
    tensors: TensorProof


LIMITS: dict[str, tuple[Limit, ...]] = {
    "F32": (
        Limit("judged_share", "", 0.5, "share of positions without a near tie", at_least=True),
        Limit("nmse", "judged", 1e-10, "NMSE, near ties excluded"),
        Limit("nmse_worst", "judged", 1e-8, "worst NMSE, near ties excluded"),
    ),
    "F16": (
        Limit("nmse_median", "same_experts", 2e-7, "median NMSE, same experts"),
        Limit("other_experts_share", "", 0.02, "expert mismatch rate"),
    ),
    "BF16": (
        Limit("nmse_median", "same_experts", 1e-5, "median NMSE, same experts"),
        Limit("other_experts_share", "", 0.05, "expert mismatch rate"),
    ),
    "Q8_0": (
        Limit("kld_median", "all", 2.5e-4, "median KLD"),
        Limit("kld_p99", "all", 0.05, "99 % KLD"),
        Limit("top1", "all", 0.96, "top-1 agreement", at_least=True),
        Limit("other_experts_share", "", 0.1, "expert mismatch rate"),
    ),
}

# A layer diverges if the NMSE of its output is above this. It is not a gate; the report uses it to show where the
# error begins.
DIVERGED = {"F32": 1e-9, "F16": 1e-5, "BF16": 1e-3, "Q8_0": 1e-2}

# How much worse than upstream llama.cpp a typical position may be on the same file. This applies to every type but
# F32, which has its own limits. "Typical" is the geometric mean over positions: an arithmetic mean would be
# dominated by the few positions with expert mismatches, and which positions these are is chance. Two standard
# errors of the mean are added to the limit.
UPSTREAM_FACTOR = 1.05
STANDARD_ERRORS = 2
NO_WORSE = (  # (field of Positions, title)
    ("nmse", "typical NMSE, ratio to upstream"),
    ("kld", "typical KLD, ratio to upstream"),
)
SMALLEST = 1e-18  # below float64's precision for both metrics; keeps logarithms finite


def judge(evidence: Evidence) -> list[GateResult]:
    """All gates that apply to the file's type."""
    failed = evidence.tensors.failed
    results = [GateResult("tensors that differ from the checkpoint", "", failed, 0, False, failed == 0)]
    results += [_finite(measured) for measured in evidence.runs]
    for limit in LIMITS.get(evidence.type, ()):
        results += [_apply(limit, measured) for measured in evidence.runs]
    upstream = {measured.variant.key: measured for measured in evidence.upstream}
    for measured in evidence.runs:
        if evidence.type != "F32" and measured.variant.key in upstream:
            results += _against_upstream(measured, upstream[measured.variant.key])
    return results


def _finite(measured: Measured) -> GateResult:
    """Other gates have positions left out, and some types have no other gates."""
    bad = int(np.count_nonzero(~(np.isfinite(measured.at.nmse) & np.isfinite(measured.at.kld))))
    return GateResult("positions with NaN or infinity", measured.variant.title, bad, 0, False, bad == 0)


def _apply(limit: Limit, measured: Measured) -> GateResult:
    found = float(getattr(getattr(measured, limit.over) if limit.over else measured, limit.figure))
    passed = found >= limit.value if limit.at_least else found <= limit.value
    return GateResult(limit.title, measured.variant.title, found, limit.value, limit.at_least, passed)


def _against_upstream(measured: Measured, upstream: Measured) -> Iterator[GateResult]:
    def result(title: str, found: float, limit: float) -> GateResult:
        return GateResult(title, measured.variant.title, found, limit, False, found <= limit)

    for figure, title in NO_WORSE:
        found, base = (np.maximum(getattr(m.at, figure), SMALLEST) for m in (measured, upstream))
        ratios = np.log(found / base)
        chance = STANDARD_ERRORS * ratios.std() / np.sqrt(len(ratios))
        yield result(title, float(np.exp(ratios.mean())), UPSTREAM_FACTOR * float(np.exp(chance)))
    found, base = (np.count_nonzero(~m.at.top1) for m in (measured, upstream))
    # Where only one of the two agrees with the reference, each of them is equally likely to be that one.
    unlike = np.count_nonzero(measured.at.top1 != upstream.at.top1)
    limit = UPSTREAM_FACTOR * base + STANDARD_ERRORS * np.sqrt(unlike)
    yield result("top-1 mismatches, limit from upstream", float(found), float(limit))
