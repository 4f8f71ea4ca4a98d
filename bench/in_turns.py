"""Measures a model that does not fit in memory twice: one process at a time, in turns A B C C B A.

Input: runners, cells, and the variants that fit alone. Output: a `Result` for each cell when all turns are over. The
runners' `about` receives the resident memory of each process, and the bytes that it read from disk per token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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

FITS = 0.85  # share of the free memory that upstream's copy of the weights may take
SECONDS = 2.0  # of a sample, at most, unless it is one decode


def variants_alone(nbytes: int, free: int) -> tuple[Variant, ...]:
    """The variants that fit alone, patched first. Without a copy a file may be larger than memory: it is mapped."""
    return PATCHED, *(variant for variant in UPSTREAM if not variant.repack or nbytes <= FITS * free)


@dataclass
class Collected:
    """What was measured of a cell so far."""

    samples: dict[str, list[float]] = field(default_factory=dict)  # by variant: seconds of a decode
    steps: int = 1
    others: list[float | None] = field(default_factory=list)


def measure_in_turns(
    runners: Runners, cells: Sequence[Cell], chosen: Sequence[Variant], settings: Settings
) -> list[Result]:
    """Measure each cell once in each turn. Raises `EngineError`."""
    collected = {cell: Collected() for cell in cells}
    logits: dict[Path, LogitsAfterState] = {}  # by saved state
    processes = list(dict.fromkeys(variant.process for variant in chosen))
    for turn, process in enumerate([*processes, *reversed(processes)]):
        for cell in cells:
            mine = [each for each in variants(cell, chosen) if each.process == process]
            for variant in mine:
                if time.monotonic() < settings.until:
                    runners.reporter.phase(f"turn {turn + 1}: {variant.name}: {describe(vars(cell))}")
                    measure_once(runners, cells, cell, variant, settings, collected[cell], logits)
        if (running := runners.running(process)) is not None:
            memory = resident_memory(running.pid)
            runners.about.resident[process] = {part: size / MIB for part, size in memory.items()}
            runners.stop(process)
        if turn + 1 == len(processes):
            for each in logits.values():
                check_logits(runners.about, each)
    results = []
    for cell, found in collected.items():
        if {name.split()[0] for name in found.samples} == {"patched", "upstream"}:
            known = [each for each in found.others if each is not None]
            results.append(Result(cell, found.samples, {}, found.steps, max(known, default=None)))
        else:
            runners.skip([cell], "the time of --budget was used up")
    return results


def measure_once(
    runners: Runners,
    cells: Sequence[Cell],
    cell: Cell,
    variant: Variant,
    settings: Settings,
    found: Collected,
    logits: dict[Path, LogitsAfterState],
) -> None:
    """Take a sample, after one decode that is not timed because it touches the weights first."""
    n_batch = max(*(each.tokens for each in cells), UBATCH)
    place = runners.context(variant, cell, context_size(cells), n_batch)
    state = runners.go_to(variant, cell, place)
    if cell.depth:
        if state not in logits:  # patched goes first
            logits[state] = LogitsAfterState(cell, {}, logits_of(place, runners.threads, empty=True))
        if variant not in logits[state].rows:
            logits[state].rows[variant] = logits_of(place, runners.threads)
    sampler = Sampler(cell, {variant: place}, settings.cell_seconds)
    first = sampler.sample(variant, 1)
    if first < LONG:
        found.steps = max(1, min(cell.most_steps, int(min(SECONDS, settings.cell_seconds) / first)))
    sampler.forget()
    before = bytes_read(place[0].pid)
    seconds = sampler.sample(variant, found.steps)
    after = bytes_read(place[0].pid)
    found.samples.setdefault(variant.name, []).append(seconds)
    found.others.append(sampler.others())
    if before is not None and after is not None:
        tokens = cell.tokens * (found.steps + cell.warm)
        runners.about.read[f"{variant.name}, {describe(vars(cell))}"] = (after - before) / tokens


def bytes_read(pid: int) -> int | None:
    """Bytes that the process has read from disk; None if unknown."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), None)
