"""Simulates the time of a decode on more cores than the machine has.

Input: the events that native/tasks.cpp records while a graph runs with N threads on the cores there are: the CPU time
of each thread's part of each phase (what is computed between two barriers), and of each chunk that threads fetch from
ggml's counter. Output: the time on N cores: in each phase the cores begin with the threads' first parts, then whichever
is free first takes the next chunk; the phase ends with the last of them. All phases together are not shorter than the
memory needs to deliver their bytes at BANDWIDTH; a core reads as fast as it does here. To this, BARRIER for each
barrier and core is added, because nothing is read at barriers.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from kimi_gguf.bench.programs import NATIVE, program
from kimi_gguf.engine.builds import upstream_source

EVENT = np.dtype([("kind", "<i4"), ("value", "<i4"), ("nanoseconds", "<i8")])
GRAPH, FINISHED, GO_ON, CHUNK = range(4)

# Assumptions about a machine with many cores.
BARRIER = 0.1e-6  # seconds per core: each writes the same cache line
BANDWIDTH = 300e9  # bytes per second: eight channels of DDR5-4800

Events = NDArray[np.void]


@dataclass(frozen=True)
class Phase:
    """What is computed between two barriers, in seconds."""

    first: tuple[float, ...]  # by thread, until it fetches a chunk or waits
    chunks: tuple[float, ...]  # in the order in which they are fetched

    @property
    def span(self) -> float:
        """The time on as many cores as threads."""
        cores = list(self.first)
        heapq.heapify(cores)
        for chunk in self.chunks:
            heapq.heapreplace(cores, cores[0] + chunk)
        return max(cores)


def recorder() -> Path:
    """The library of native/tasks.cpp, for LD_PRELOAD."""
    include = upstream_source() / "llama.cpp" / "ggml" / "include"
    return program("tasks", (*NATIVE, "-shared", "-fPIC", "-isystem", str(include), "-ldl"))


def read_events(file: Path) -> list[Events]:
    """The events of each thread that computed."""
    data, threads, at = file.read_bytes(), [], 0
    while at < len(data):
        count = int.from_bytes(data[at : at + 8], "little")
        at += 8
        if count:
            threads.append(np.frombuffer(data, EVENT, count, at))
        at += count * EVENT.itemsize
    return threads


def graphs_of(threads: Sequence[Events]) -> list[list[Phase]]:
    """The phases of each graph."""
    alone = [_phases(events) for events in threads]
    found = []
    for parts in zip(*alone, strict=True):
        phases = []
        for of_threads in zip(*parts, strict=True):
            chunks = dict(chunk for _, several in of_threads for chunk in several)
            first = tuple(part for part, _ in of_threads)
            phases.append(Phase(first, tuple(chunks[number] for number in sorted(chunks))))
        found.append(phases)
    return found


_Part = tuple[
    float, list[tuple[int, float]]
]  # of a thread in a phase: seconds until the first chunk; of each chunk


def _phases(events: Events) -> list[list[_Part]]:
    """By graph, a thread's part of each phase. The time of reading the clock is subtracted."""
    kinds, values, times = (events[name].tolist() for name in EVENT.names or ())
    starts = [i for i, kind in enumerate(kinds) if kind == GRAPH]
    clock = median(times[i + 1] - times[i] for i in starts)

    def seconds(i: int) -> float:
        return float(max(0, times[i] - times[i - 1] - clock)) * 1e-9

    graphs = []
    for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True):
        phases: list[_Part] = []
        first, chunks = 0.0, list[tuple[int, float]]()
        for i in range(start + 1, end):
            if kinds[i] == GO_ON:
                first, chunks = 0.0, []
            elif kinds[i - 1] == CHUNK:
                chunks.append((values[i - 1], seconds(i)))
            else:
                first = seconds(i)
            if kinds[i] == FINISHED:
                phases.append((first, chunks))
        graphs.append(phases)
    return graphs


@dataclass(frozen=True)
class Simulation:
    """A decode on many cores, in seconds."""

    phases: float  # if the bandwidth of all cores together has no limit
    memory: float  # in which the memory delivers what all phases read
    barriers: float

    @property
    def is_limited(self) -> bool:
        """Whether the memory limits it."""
        return self.phases < self.memory

    @property
    def seconds(self) -> float:
        """The time of the decode."""
        return max(self.phases, self.memory) + self.barriers


def simulated(graphs: Sequence[Sequence[Phase]], decodes: int, nbytes: float) -> Simulation:
    """A decode that reads nbytes, on as many cores as there were threads: of each phase the median of all decodes."""
    each = len(graphs) // decodes
    computing, waiting = 0.0, 0.0
    for number in range(each):
        same = graphs[number::each]
        spans = zip(*([phase.span for phase in phases] for phases in same), strict=True)
        computing += sum(map(median, spans))
        waiting += len(same[0]) * BARRIER * _cores(same[0])
    return Simulation(computing, nbytes / BANDWIDTH, waiting)


def _cores(phases: Sequence[Phase]) -> int:
    cores = len(phases[0].first)
    return cores if cores > 1 else 0
