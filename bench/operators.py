"""Times single operators of one layer: KDA recurrence, convolutions, latent attention; upstream and patched.

Input: the libraries of both builds. Output: a row for each case: seconds per layer and call. native/operators.cpp
lists the graph of each case; it is compiled once for each build. Upstream uses the nodes of its own graph; if
there are two variants, the faster one counts.

    python -m kimi_gguf.bench.operators BUILD CASE [key=value ...]     one case; BUILD: patched or upstream

CASE is also a single matmul (product, product-rows). BUILD is the default build for CPUs, whatever `kimi-llama use`
says.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kimi_gguf.bench.load import undisturbed
from kimi_gguf.bench.programs import ask, ggml_flags, program
from kimi_gguf.engine.builds import Engine, ensure
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import Reporter

ROUNDS = 3  # runs of each program


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    title: str
    counted: str  # what is timed on each side
    upstream: tuple[str, ...]  # cases of the program; the fastest counts
    patched: str
    options: tuple[str, ...]


STATES = "layers=20"  # as many states as the 48B has: 40 MiB, more than the caches hold
DEEP = "keys=16384"
ALONE = "upstream: the recurrence only, without the cache; patched: with gates, norm and state"
STATE = "the same, and upstream gathers the state and copies it back"
ALL = "the same work in both: gates, recurrence, norm, output gate, state read and written"
NODES = "the same work in both: gather, convolutions, SiLU, norms of q and k, state written"
ATTENTION = "from the absorbed query to the weighted latent"
WHOLE = "from the projected query to the value per head; upstream has k_b and v_b around its attention"

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
            f"attention, 1 query on 16384 keys, {kind} cache", ATTENTION,
            ("absorbed", "absorbed-plain") if kind == "F16" else ("absorbed",), "absorbed",
            ("tokens=1", DEEP, "layers=4", f"type={kind.lower()}", "least=3"),
        )
        for kind in ("F16", "Q8_0", "Q4_0")
    ),
    Case("attention, 512 queries on 4096 keys", WHOLE, ("whole", "whole-plain"), "latent",
         ("tokens=512", "keys=4096", "least=2")),
    Case("attention, 512 queries on 16384 keys", WHOLE, ("whole", "whole-plain"), "latent",
         ("tokens=512", DEEP, "least=1")),
)  # fmt: skip


def counted(row: dict[str, Any]) -> str:
    """What is timed in a row of a record; the record may have older words for it."""
    same = (c.counted for c in CASES if c.title == row["title"] and row["upstream"]["case"] in c.upstream)
    return next(same, str(row["counted"]))


def programs(libraries: dict[str, Path]) -> dict[str, Path]:
    """Compile the program for each build. libraries: folders, by build. Raises `EngineError`."""
    return {build: program("operators", ggml_flags(folder)) for build, folder in libraries.items()}


def libraries_of(patched: Engine, upstream: Engine, instead: Path | None) -> dict[str, Path]:
    """The folder of each build's libraries. instead: used for the patched build."""
    return {"upstream": upstream.lib, "patched": instead.resolve() if instead else patched.lib}


def measure_operators(
    libraries: dict[str, Path], threads: int, reporter: Reporter
) -> Iterator[dict[str, Any]]:
    """Measure each case, A/B. Raises `EngineError`."""
    compiled = programs(libraries)
    for case in CASES:
        reporter.phase(f"{case.title}: {case.counted}")
        yield measure_case(compiled, case, threads)


def measure_case(compiled: dict[str, Path], case: Case, threads: int) -> dict[str, Any]:
    """Measure a case with the program of each build, A/B. Raises `EngineError`.

    `KIMI_REPACK` has no effect: a record shows the defaults.
    """
    environment = {name: value for name, value in os.environ.items() if name != "KIMI_REPACK"}
    turns = [*(("upstream", name) for name in case.upstream), ("patched", case.patched)]
    medians: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    disturbed = took = 0.0
    for _ in range(ROUNDS):
        for build, name in turns:
            run = partial(
                ask, compiled[build], name, f"threads={threads}", *case.options, environment=environment
            )
            result = undisturbed(run, threads)
            medians[build, name].append(json.loads(result.answer)["median"])
            disturbed += result.disturbance or 0.0
            took += result.took
    figures = {turn: statistics.median(seconds) for turn, seconds in medians.items()}
    best = min(case.upstream, key=lambda name: figures["upstream", name])
    upstream, patched = figures["upstream", best], figures["patched", case.patched]
    return {
        "title": case.title,
        "counted": case.counted,
        "threads": threads,
        "options": case.options,
        "upstream": {"case": best, "seconds": upstream},
        "patched": {"case": case.patched, "seconds": patched},
        "ratio": upstream / patched,
        "others": disturbed / took,
        "samples": {f"{build} {name}": seconds for (build, name), seconds in medians.items()},
    }


def main(words: Sequence[str]) -> int:
    """Measure one case and print the JSON of the program. Returns the exit code, 2 for wrong arguments."""
    if len(words) < 2 or words[0] not in ("patched", "upstream"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        engine = ensure(upstream=words[0] == "upstream")
        print(ask(program("operators", ggml_flags(engine.lib)), *words[1:]), end="")
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
