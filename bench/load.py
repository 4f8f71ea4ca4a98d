"""What else the machine was doing while something was measured.

Flows in: the processes that are the measurement's own. Flows out: how many processors other work kept busy.
Source: proc(5), stat and pid/stat; on systems without it nothing is known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

IDLE = (3, 4)  # fields of /proc/stat's first line that are not work: idle, iowait
GUEST = 8  # from here on counted before
DISTURBED = 0.1  # processors that other work may keep busy before a sample is taken again, or a cell marked
TICKS = 0.03  # processor seconds that counting in clock ticks may be off
PATIENCE = 4  # times that a disturbed sample is taken, the last one as it is

Answer = TypeVar("Answer")


class Watch:
    """From its making to `others()`."""

    def __init__(self, own: Collection[int]) -> None:
        """own: process ids that count as ours, beside this process."""
        self._own = {*own, os.getpid()}
        self._began = time.monotonic()
        self._before = self._ticks()

    def others(self) -> float | None:
        """Processors that other work kept busy since, on average: 0.0 on a machine that does nothing else."""
        now = self._ticks()
        seconds = time.monotonic() - self._began
        if now is None or self._before is None or seconds <= 0:
            return None
        return max(0.0, (now - self._before) / os.sysconf("SC_CLK_TCK") / seconds)

    def _ticks(self) -> int | None:
        """Clock ticks of work so far, less our own."""
        try:
            fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
            mine = sum(self._of(pid) for pid in self._own)
        except (OSError, ValueError, IndexError):
            return None
        return sum(n for i, n in enumerate(fields[:GUEST]) if i not in IDLE) - mine

    @staticmethod
    def _of(pid: int) -> int:
        """User and system ticks of a process; of this one, with those of its children that have ended."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11 : 15 if pid == os.getpid() else 13]))


@dataclass(frozen=True)
class Calm(Generic[Answer]):
    """What was done, and how calm it was around it."""

    answer: Answer
    took: float  # seconds
    disturbance: float | None  # processor seconds of other work; None: not known


def calmly(action: Callable[[], Answer], threads: int, own: Collection[int] = ()) -> Calm[Answer]:
    """Do something again while other work disturbs it, at most PATIENCE times.

    threads: that the action keeps busy; other work disturbs where there are not processors enough for both.
    own: processes whose work is the action's, beside this process and children that it starts and waits for.
    """
    spare = max(0, (os.cpu_count() or 1) - threads)
    for _ in range(PATIENCE):
        watch, began = Watch(own), time.monotonic()
        answer = action()
        others, took = watch.others(), time.monotonic() - began
        disturbance = None if others is None else max(0.0, (others - spare) * took - TICKS)
        if disturbance is None or disturbance <= DISTURBED * took:
            break
    return Calm(answer, took, disturbance)


def available_memory() -> int | None:
    """Bytes that can be had without pushing others out; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] * 1024 if kib else None
