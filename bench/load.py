"""Measures the load of other programs on the machine during a measurement, and the memory of a process.

Input: the process ids of the measurement itself. Output: the number of cores that other programs kept busy.
Source: proc(5), stat, pid/stat and pid/status. On systems without /proc both are unknown.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

IDLE = (3, 4)  # fields of the first line of /proc/stat that are not work: idle, iowait
GUEST = 8  # the fields from here are already part of the earlier fields
DISTURBED = 0.1  # cores that other work may keep busy; above it a sample is repeated, and a cell is marked
TICKS = 0.03  # CPU seconds: the error of counting in clock ticks
PATIENCE = 4  # most attempts for a disturbed sample; the last one is kept

Answer = TypeVar("Answer")


class Watch:
    """Counts the work of other programs from construction until `others()`."""

    def __init__(self, own: Collection[int]) -> None:
        """own: process ids of the measurement, in addition to this process."""
        self._own = {*own, os.getpid()}
        self._began = time.monotonic()
        self._before = self._ticks()

    def others(self) -> float | None:
        """The average number of cores that other work kept busy; 0.0 on an idle machine."""
        now = self._ticks()
        seconds = time.monotonic() - self._began
        if now is None or self._before is None or seconds <= 0:
            return None
        return max(0.0, (now - self._before) / os.sysconf("SC_CLK_TCK") / seconds)

    def _ticks(self) -> int | None:
        """Clock ticks of all work so far, without the work of the measurement."""
        try:
            fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
            mine = sum(self._of(pid) for pid in self._own)
        except (OSError, ValueError, IndexError):
            return None
        return sum(n for i, n in enumerate(fields[:GUEST]) if i not in IDLE) - mine

    @staticmethod
    def _of(pid: int) -> int:
        """User and system ticks of a process; for this process, children that have ended are included."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11 : 15 if pid == os.getpid() else 13]))


def resident_memory(pid: int) -> dict[str, int]:
    """Bytes of a process: private memory, pages of mapped files, the largest sum of both so far. Empty if unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    names = {"RssAnon": "private", "RssFile": "file", "VmHWM": "peak"}
    fields = (line.partition(":") for line in lines)
    return {names[name]: int(text.split()[0]) << 10 for name, _, text in fields if name in names}


@dataclass(frozen=True)
class Attempt(Generic[Answer]):
    """The result of an action, and the other work during it."""

    answer: Answer
    took: float  # seconds
    disturbance: float | None  # CPU seconds of other work; None: unknown


def undisturbed(
    action: Callable[[], Answer], threads: int, own: Collection[int] = (), seconds: float = math.inf
) -> Attempt[Answer]:
    """Run an action, and repeat it while other work disturbs it, at most PATIENCE times.

    threads: of the action; other work disturbs it if there are too few cores for both.
    own: processes that work for the action, in addition to this process and the children that it waits for.
    seconds: after this time it is not repeated.
    """
    spare = max(0, (os.cpu_count() or 1) - threads)
    until = time.monotonic() + seconds
    for _ in range(PATIENCE):
        watch, began = Watch(own), time.monotonic()
        answer = action()
        other_work, took = watch.others(), time.monotonic() - began
        disturbance = None if other_work is None else max(0.0, (other_work - spare) * took - TICKS)
        if disturbance is None or disturbance <= DISTURBED * took or time.monotonic() >= until:
            break
    return Attempt(answer, took, disturbance)
