"""Measures a model that does not fit in memory twice: one process at a time, in turns A B C C B A, one or
several times.

Input: runners, cells, and the variants that fit alone. Output: a `Result` for each cell when all turns are over. The
runners' `about` receives the resident memory of each process, and the bytes that it read from disk per token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kimi_gguf.bench.ab_run import (
    LONG,
    MIB,
    LogitsAfterState,
    Result,
    Runners,
    Sampler,
    Settings,
    check_logits,
    context_size,
    logits_of,
)
from kimi_gguf.bench.cells import PATCHED, UBATCH, UPSTREAM, Cell, Variant, variants
from kimi_gguf.bench.load import resident_memory
from kimi_gguf.bench.report import describe
from kimi_gguf.bench.runner import Runner

FITS = 0.85  # share of the free memory that a copy of the weights, or a mapped file, may take


def variants_alone(nbytes: int, free: int) -> tuple[Variant, ...]:
    """The variants that fit alone, patched first. Without a copy a file may be larger than memory: it is mapped."""
    return PATCHED, *(variant for variant in UPSTREAM if not variant.repack or nbytes <= FITS * free)


@dataclass
class Collected:
    """What was measured of a cell so far."""

    samples: dict[str, list[float]] = field(default_factory=dict)  # by variant: seconds of a decode
    steps: int = 1  # decodes of one sample, the most of all variants
    others: list[float | None] = field(default_factory=list)


def measure_in_turns(
    runners: Runners,
    cells: Sequence[Cell],
    chosen: Sequence[Variant],
    settings: Settings,
    in_memory: bool,
    after_turn: Callable[[], None],
) -> list[Result]:
    """Measure each cell in each turn. Raises `EngineError`.

    in_memory: the model's file fits in memory, so that decodes may be repeated. Otherwise decodes read experts from
    disk; repeated, they would find them in memory. after_turn: called when the process of a turn has ended.
    """
    turns = Turns(runners, cells, settings, in_memory)
    processes = list(dict.fromkeys(variant.process for variant in chosen))
    order = [*processes, *reversed(processes)] * settings.rounds
    for turn, process in enumerate(order):
        for cell in cells:
            mine = [variant for variant in variants(cell, chosen) if variant.process == process]
            for variant in mine:
                if time.monotonic() < settings.until:
                    runners.reporter.phase(
                        f"turn {turn + 1} of {len(order)}: {variant.name}: {describe(vars(cell))}"
                    )
                    turns.measure(cell, variant)
        if (running := runners.running(process)) is not None:
            memory = resident_memory(running.pid)
            runners.about.resident[process] = {part: size / MIB for part, size in memory.items()}
            runners.stop(process)
        after_turn()
        if turn + 1 == len(processes):
            for logits in turns.logits.values():
                check_logits(runners.about, logits)
    results = []
    for cell, collected in turns.collected.items():
        if {variant.name for variant in variants(cell, chosen)} <= collected.samples.keys():
            known = [work for work in collected.others if work is not None]
            results.append(Result(cell, collected.samples, {}, collected.steps, max(known, default=None)))
        else:
            runners.skip([cell], "the time of --budget was used up")
    return results


class Turns:
    """The samples of all turns."""

    def __init__(self, runners: Runners, cells: Sequence[Cell], settings: Settings, in_memory: bool) -> None:
        """See `measure_in_turns`."""
        self.collected = {cell: Collected() for cell in cells}
        self.logits: dict[Path, LogitsAfterState] = {}  # by saved state
        self._runners, self._settings, self._in_memory = runners, settings, in_memory
        self._room = context_size(cells), max(*(cell.tokens for cell in cells), UBATCH)

    def measure(self, cell: Cell, variant: Variant) -> None:
        """Sample a variant in this turn: the mean of as many repetitions as fit into the time of a cell, at least one.

        The same decodes run before, untimed, because decodes that touch experts for the first time are slower. If
        decodes are long or the file does not fit in memory, nothing is repeated; one decode runs before.
        """
        collected, runners = self.collected[cell], self._runners
        place = runners.context(variant, cell, *self._room)
        state = runners.go_to(variant, cell, place)
        if cell.depth:
            self._keep_logits(cell, variant, state, place)
        seconds = self._settings.cell_seconds
        sampler = Sampler(cell, {variant: place}, seconds)
        first = sampler.sample(variant, 1)
        repeated = first < LONG and self._in_memory
        steps = max(1, min(cell.most_steps, int(seconds / first))) if first < LONG else 1
        if repeated:
            sampler.sample(variant, steps)
        sampler.forget()
        before = bytes_read(place[0].pid)
        began = time.monotonic()
        samples = [sampler.sample(variant, steps)]
        while repeated and time.monotonic() - began < seconds:
            samples.append(sampler.sample(variant, steps))
        after = bytes_read(place[0].pid)
        collected.samples.setdefault(variant.name, []).append(statistics.mean(samples))
        collected.others.append(sampler.others())
        collected.steps = max(collected.steps, steps)
        if before is not None and after is not None:
            tokens = cell.tokens * (steps + cell.warm) * len(samples)
            runners.about.read[f"{variant.name}, {describe(vars(cell))}"] = (after - before) / tokens

    def _keep_logits(self, cell: Cell, variant: Variant, state: Path, place: tuple[Runner, str]) -> None:
        """Keep the logits after the state, once for each variant."""
        threads = self._runners.threads
        if state not in self.logits:  # patched goes first
            self.logits[state] = LogitsAfterState(cell, {}, logits_of(place, threads, empty=True))
        if variant not in self.logits[state].rows:
            self.logits[state].rows[variant] = logits_of(place, threads)


def bytes_read(pid: int) -> int | None:
    """Bytes that the process has read from disk; None if unknown."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), None)
