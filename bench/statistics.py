"""Medians and spreads of samples, and the choice of the fastest variant.

Input: seconds of each sample, by variant. Output: the figures of a table row.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STABLE = 0.01  # relative spread at which a median is accepted
LEAST, MOST = 3, 25  # fewest and most samples
CLOSE = 1.1  # upstream variants within this factor of the fastest are measured too


@dataclass(frozen=True)
class Summary:
    """The figures of one variant."""

    median: float  # seconds
    spread: float  # median absolute deviation from the median, relative to it


def summary(samples: Sequence[float]) -> Summary:
    """samples: seconds, at least one."""
    median = statistics.median(samples)
    distance = statistics.median(abs(sample - median) for sample in samples)
    return Summary(median, distance / median)


def stable(samples: Sequence[float]) -> bool:
    """Whether no more samples are needed."""
    if len(samples) < LEAST:
        return False
    return len(samples) >= MOST or (summary(samples).spread <= STABLE / 2 and len(samples) >= 2 * LEAST)


def worth_measuring(screened: Mapping[str, float]) -> list[str]:
    """The variants whose first sample is close to the fastest one, fastest first. screened: seconds."""
    best = min(screened.values())
    return sorted(
        (name for name, seconds in screened.items() if seconds <= CLOSE * best), key=screened.__getitem__
    )


def best(samples: Mapping[str, Sequence[float]]) -> str:
    """The variant with the smallest median."""
    return min(samples, key=lambda name: summary(samples[name]).median)
