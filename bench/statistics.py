"""From samples to figures: medians, spreads, ratios, and pristine at its best.

Flows in: seconds of each sample, by contender. Flows out: what a table row says.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STABLE = 0.01  # relative spread at which a median is believed
LEAST, MOST = 3, 25  # samples of a stable one, at the least and at the most
CLOSE = 1.1  # a way of running pristine within this factor of its best is measured along


@dataclass(frozen=True)
class Summary:
    """Of one contender's samples."""

    median: float  # seconds
    spread: float  # median distance from the median, relative to it
    samples: int


def summary(samples: Sequence[float]) -> Summary:
    """samples: seconds, at least one."""
    median = statistics.median(samples)
    distance = statistics.median(abs(sample - median) for sample in samples)
    return Summary(median, distance / median, len(samples))


def stable(samples: Sequence[float]) -> bool:
    """Whether more samples would tell nothing new."""
    if len(samples) < LEAST:
        return False
    return len(samples) >= MOST or (summary(samples).spread <= STABLE / 2 and len(samples) >= 2 * LEAST)


def worth_measuring(screened: Mapping[str, float]) -> list[str]:
    """The contenders whose one sample comes near the best one, best first. screened: seconds."""
    best = min(screened.values())
    return sorted(
        (name for name, seconds in screened.items() if seconds <= CLOSE * best), key=screened.__getitem__
    )


def best(samples: Mapping[str, Sequence[float]]) -> str:
    """The contender with the smallest median."""
    return min(samples, key=lambda name: summary(samples[name]).median)
