"""The operators alone: one layer's KDA recurrence, convolutions and latent attention, pristine against ours.

Flows in: either build's libraries. Flows out: a row for each case: what is counted, seconds of a layer and call.
One program is compiled once for each build (native/operators.cpp says what each case has in its graph) and the two
take turns. Pristine's nodes are those of its own graph; where it has two ways, the faster one counts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.bench.load import calmly
from kimi_gguf.bench.programs import ask, ggml_flags, program
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.progress import Reporter

ROUNDS = 3  # turns of each program


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    title: str
    counted: str  # what pristine's side has in it, where the two differ
    pristine: tuple[str, ...]  # cases of the program, of which the fastest counts
    ours: str
    options: tuple[str, ...]


STATES = "layers=20"  # as many states as the 48B has: 40 MiB, more than caches hold
DEEP = "keys=16384"
ALONE = "pristine: the recurrence alone, its state lying ready; ours: with gates, norm, state"
STATE = "the same, and pristine's state gathered and copied back"
ALL = "the same work on both sides: gates, recurrence, norm, output gate, state read and written"
NODES = "the same work on both sides: gather, convolutions, SiLU, norms of q and k, state written"
ATTENTION = "from the folded query to the weighted latent"
WHOLE = "from the projected query to a value per head: pristine with k_b and v_b around its attention"

CASES = (
    Case("KDA, 1 token", ALONE, ("gdn",), "scan", ("tokens=1", STATES)),
    Case("KDA, 1 token", STATE, ("gdn-state",), "scan", ("tokens=1", STATES)),
    Case("KDA, 1 token", ALL, ("gdn-mixer",), "scan", ("tokens=1", STATES)),
    Case("KDA, 64 tokens", ALONE, ("gdn",), "scan", ("tokens=64", STATES)),
    Case("KDA, 64 tokens", ALL, ("gdn-mixer",), "scan", ("tokens=64", STATES)),
    Case("KDA, 512 tokens", ALL, ("gdn-mixer",), "scan", ("tokens=512", "layers=4")),
    Case("convolutions, 1 token", NODES, ("conv-nodes",), "conv", ("tokens=1", STATES)),
    Case("convolutions, 64 tokens", NODES, ("conv-nodes",), "conv", ("tokens=64", STATES)),
    Case("convolutions, 512 tokens", NODES, ("conv-nodes",), "conv", ("tokens=512", "layers=4")),
    *(
        Case(
            f"attention, 1 query on 16384 keys, {kind} cache",
            ATTENTION,
            ("absorbed", "absorbed-plain") if kind == "F16" else ("absorbed",),
            "absorbed",
            ("tokens=1", DEEP, "layers=4", f"type={kind.lower()}", "least=3"),
        )
        for kind in ("F16", "Q8_0", "Q4_0")
    ),
    Case(
        "attention, 512 queries on 4096 keys",
        WHOLE,
        ("whole", "whole-plain"),
        "latent",
        ("tokens=512", "keys=4096", "least=2"),
    ),
    Case(
        "attention, 512 queries on 16384 keys",
        WHOLE,
        ("whole", "whole-plain"),
        "latent",
        ("tokens=512", DEEP, "least=1"),
    ),
)  # fmt: skip


def programs(libraries: dict[str, Path]) -> dict[str, Path]:
    """The program for each build. libraries: folders, by build. Raises `EngineError`."""
    return {build: program("operators", ggml_flags(folder)) for build, folder in libraries.items()}


def libraries_of(patched: Engine, pristine: Engine, instead: Path | None) -> dict[str, Path]:
    """Where each build's libraries are; `instead` of ours."""
    return {"pristine": pristine.lib, "patched": instead.resolve() if instead else patched.lib}


def measure_operators(libraries: dict[str, Path], threads: int, told: Reporter) -> Iterator[dict[str, Any]]:
    """Each case, in turns. Raises `EngineError`."""
    made = programs(libraries)
    for case in CASES:
        told.phase(f"{case.title}: {case.counted}")
        yield measure_case(made, case, threads)


def measure_case(made: dict[str, Path], case: Case, threads: int) -> dict[str, Any]:
    """A case by the program of each build, in turns. Raises `EngineError`."""
    turns = [*(("pristine", name) for name in case.pristine), ("patched", case.ours)]
    medians: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    disturbed = took = 0.0
    for _ in range(ROUNDS):
        for build, name in turns:
            words = (name, f"threads={threads}", *case.options)
            said = calmly(lambda made=made[build], words=words: ask(made, *words), threads)  # type: ignore[misc]
            medians[build, name].append(json.loads(said.answer)["median"])
            disturbed += said.disturbance or 0.0
            took += said.took
    figures = {turn: statistics.median(each) for turn, each in medians.items()}
    best = min(case.pristine, key=lambda name: figures["pristine", name])
    theirs, ours = figures["pristine", best], figures["patched", case.ours]
    return {
        "title": case.title,
        "counted": case.counted,
        "threads": threads,
        "options": case.options,
        "pristine": {"case": best, "seconds": theirs},
        "patched": {"case": case.ours, "seconds": ours},
        "ratio": theirs / ours,
        "others": disturbed / took,
        "samples": {f"{build} {name}": each for (build, name), each in medians.items()},
    }
