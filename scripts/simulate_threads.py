"""Simulate decodes on up to 128 cores, patched and upstream, and compare with reality on the cores there are.

    python -m kimi_gguf.scripts.simulate_threads
    python -m kimi_gguf.scripts.simulate_threads --earlier FOLDER "the build of 2026-11-22"

Output: docs/threads.md. The model is generated in the cache: layers of the 48B's shapes. The simulation is that of
bench/threads.py. --earlier also simulates a build of an earlier commit. Takes 15 minutes on two cores, which nothing
else should use, and 5 more for an earlier build.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from kimi_gguf.bench.cells import Cell
from kimi_gguf.bench.models import ModelFile, generate, open_model
from kimi_gguf.bench.report import markdown
from kimi_gguf.bench.roofline import demand
from kimi_gguf.bench.runner import Runner, environment_of
from kimi_gguf.bench.shapes import BenchModel
from kimi_gguf.bench.threads import (
    BANDWIDTH,
    BARRIER,
    Simulation,
    graphs_of,
    read_events,
    recorder,
    simulated,
)
from kimi_gguf.engine.builds import Engine, ensure, load
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.facts import machine_facts
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.scripts.record_page import machine_text

ROOT = Path(__file__).resolve().parents[1]
THREADS = (1, 2, 4, 8, 16, 32, 33, 48, 63, 64, 100, 128)
REAL = (1, 2)
# tokens of a decode, depth
DECODES = ((1, 256), (1, 4096), (4, 4096), (512, 0), (512, 4096))
CELLS = [Cell("f16", 1, depth, REAL[-1], batch) for batch, depth in DECODES]
STEPS = {1: 8, 4: 6, 512: 3}  # decodes that are recorded, by tokens
N_CTX = 6144 + 256  # at least the depth and (1 + STEPS) decodes
PAGE = """\
# Many threads, simulated

Written by `python -m kimi_gguf.scripts.simulate_threads`; do not edit.

{machine}. Measured {when}.

The machine has {cores} cores, so more threads are simulated. Each build runs with N threads on these cores, and the CPU
time of each task is recorded. The time on N cores is calculated from these records. Assumptions: each core reads memory
as fast as a core of this machine; all cores together read at most {bandwidth:.0f} GB/s between barriers, on average
over a decode; a barrier takes {barrier:.1f} µs per core. For each step between two barriers, the median of {least} to
{most} runs is used. Both builds run with default options and flash attention, which may not be upstream's fastest
variant. Several NUMA nodes are not simulated. Some numbers of threads (33, 63, 100) do not divide the work evenly.

Each cell: milliseconds upstream, milliseconds patched, speedup. Depth: tokens already in the cache. (m): the assumed
memory bandwidth limits at least one of the two builds. The model is {model}.

{table}
{earlier}Measured on this machine right after the simulation, without recording. In parentheses: the simulated time
minus the measured one, in percent of the measured one (negative: the simulation is too fast). Simulated speedups
are {below:.2f} to {above:.2f} times the measured ones.

{real}"""
EARLIER = """\
The same for {name}, instead of patched (`--earlier FOLDER NAME`):

{table}
"""
UPSTREAM, PATCHED = "upstream", "patched"


class Build:
    """
    A build with the model and a context for each decode, and its times.

    Two processes: one records, in which threads sleep while they wait, because there are more of them than cores; the
    other measures, in which they wait as they do by default.
    """

    def __init__(self, engine: Engine, model: ModelFile) -> None:
        self._model = model
        recording = {"LD_PRELOAD": str(recorder()), "OMP_WAIT_POLICY": "passive"}
        self._recording = self._started(engine, model, recording)
        self._measuring = self._started(engine, model, {})

    def _started(self, engine: Engine, model: ModelFile, variables: dict[str, str]) -> Runner:
        runner = Runner(UPSTREAM if engine.is_upstream else PATCHED, environment_of(engine) | variables)
        runner.ask("load", gguf=str(model.path), repack=True)
        for cell in CELLS:
            runner.ask(
                "context", name=str(cell.depth), n_ctx=N_CTX, n_batch=512, n_ubatch=512, sequences=1,
                flash=True, cache_type=cell.cache_type, threads=REAL[-1],
            )  # fmt: skip
        return runner

    def close(self) -> None:
        """End the processes."""
        self._recording.close()
        self._measuring.close()

    def fill(self, cell: Cell, folder: Path) -> None:
        """Bring the cell's contexts to its depth. The first build decodes, the others restore its state."""
        state, name = folder / f"state-{cell.depth}", str(cell.depth)
        for runner in (self._measuring, self._recording) if cell.depth else ():
            if state.exists():
                runner.ask("restore", name=name, file=str(state))
            else:
                runner.ask("fill", name=name, depth=cell.depth, file=str(state))

    def measured(self, cell: Cell, threads: int) -> float:
        """Seconds of a decode."""
        answer = self._measuring.ask(
            "time", name=str(cell.depth), batch=cell.batch, steps=STEPS[cell.batch], warm=1, threads=threads
        )
        return float(median(answer["seconds"]))

    def simulated(self, cell: Cell, threads: int, folder: Path) -> Simulation:
        """A decode on as many cores as threads."""
        file, steps = folder / "events", STEPS[cell.batch]
        self._recording.ask(
            "record_tasks",
            name=str(cell.depth),
            batch=cell.batch,
            steps=steps,
            threads=threads,
            file=str(file),
        )
        return simulated(graphs_of(read_events(file)), steps, demand(self._model, cell).nbytes)


@dataclass(frozen=True)
class Times:
    """Of a cell, by number of threads and name of the build."""

    cell: Cell
    simulated: Mapping[int, Mapping[str, Simulation]]
    measured: Mapping[int, Mapping[str, float]]  # seconds

    @property
    def title(self) -> str:
        """As in the page."""
        return f"{self.cell.batch} {'token' if self.cell.batch == 1 else 'tokens'}, depth {self.cell.depth}"

    def speedup(self, build: str, threads: int) -> str:
        """Simulated milliseconds of upstream and of a build, and the ratio."""
        upstream, other = (self.simulated[threads][name] for name in (UPSTREAM, build))
        mark = " (m)" if upstream.is_limited or other.is_limited else ""
        times = f"{milliseconds(upstream.seconds)}, {milliseconds(other.seconds)}"
        return f"{times}, {upstream.seconds / other.seconds:.2f}{mark}"

    def bias(self, threads: int) -> float:
        """Simulated speedup / measured speedup."""
        simulated, measured = self.simulated[threads], self.measured[threads]
        speedup = simulated[UPSTREAM].seconds / simulated[PATCHED].seconds
        return speedup / (measured[UPSTREAM] / measured[PATCHED])

    def reality(self, threads: int) -> str:
        """Measured milliseconds, each with the deviation of the simulation, and the ratio."""
        measured, simulated = self.measured[threads], self.simulated[threads]
        both = [(measured[name], simulated[name].seconds) for name in (UPSTREAM, PATCHED)]
        (upstream, _), (patched, _) = both
        texts = (f"{milliseconds(a)} ({b / a - 1:+.0%})" for a, b in both)
        return f"{', '.join(texts)}, {upstream / patched:.2f}"


def engine_in(folder: Path) -> Engine:
    """The build in a folder. Raises `EngineError` if there is none."""
    engine = load(folder)
    if engine is None:
        raise EngineError(f"{folder}: expected a finished build, with bin, lib and manifest.json")
    return engine


def times_of(
    builds: Mapping[str, Build], model: ModelFile, folder: Path, reporter: Reporter
) -> Iterator[Times]:
    """Simulate and measure each cell. The last build is the fastest."""
    for cell in CELLS:
        for build in reversed(list(builds.values())):
            build.fill(cell, folder)
        simulated, measured = {}, {}
        for threads in THREADS:
            reporter.phase(f"{cell.batch} tokens, depth {cell.depth}, {threads} threads")
            simulated[threads] = {
                name: build.simulated(cell, threads, folder) for name, build in builds.items()
            }
            if threads in REAL:
                measured[threads] = {name: build.measured(cell, threads) for name, build in builds.items()}
        yield Times(cell, simulated, measured)


def milliseconds(seconds: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{1000 * seconds:.3g}" if seconds < 0.9995 else f"{1000 * seconds:.0f}"


def table(threads: Sequence[int], rows: Iterable[tuple[str, ...]]) -> str:
    """A table with a column for each number of threads."""
    return markdown([("threads", *map(str, threads)), *rows])


def page_text(model: str, times: Sequence[Times], earlier: str | None, created: datetime) -> str:
    """The page, measured on this machine. earlier: the name of an earlier build, if one was simulated."""

    def speedups(build: str) -> str:
        return table(THREADS, ((row.title, *(row.speedup(build, n) for n in THREADS)) for row in times))

    biases = [row.bias(threads) for row in times for threads in REAL]
    return PAGE.format(
        machine=machine_text(machine_facts()), when=created.date(),
        cores=REAL[-1], model=model, barrier=1e6 * BARRIER, bandwidth=BANDWIDTH / 1e9,
        least=min(STEPS.values()), most=max(STEPS.values()), table=speedups(PATCHED),
        below=min(biases), above=max(biases),
        earlier=EARLIER.format(name=earlier, table=speedups(earlier)) if earlier else "",
        real=table(REAL, ((row.title, *map(row.reality, REAL)) for row in times)),
    )  # fmt: skip


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        prog="simulate_threads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    page = ROOT / "docs" / "threads.md"
    parser.add_argument(
        "--page", type=Path, default=page, help="write the page to this file (default: docs/threads.md)"
    )
    parser.add_argument("--type", default="Q4_K_M", help="use this type for the model (default: %(default)s)")
    parser.add_argument(
        "--shapes", default="full", help="use layers of these shapes: full or tiny (default: %(default)s)"
    )
    parser.add_argument(
        "--earlier", nargs=2, metavar=("FOLDER", "NAME"),
        help="also simulate the build in this folder (with bin and lib), which the page calls by this name",
    )  # fmt: skip
    parsed = parser.parse_args()
    earlier: str | None = parsed.earlier[1] if parsed.earlier else None
    try:
        with reporting() as reporter, tempfile.TemporaryDirectory() as folder:
            engines = {UPSTREAM: ensure(upstream=True)}
            if earlier is not None:
                engines[earlier] = engine_in(Path(parsed.earlier[0]))
            engines[PATCHED] = ensure()
            chosen = BenchModel(layers=4, experts=64, type=parsed.type, shapes=parsed.shapes)
            model = open_model(generate(chosen, engines[UPSTREAM], reporter))
            with ExitStack() as stack:
                builds = {
                    name: stack.enter_context(closing(Build(engine, model)))
                    for name, engine in engines.items()
                }
                times = list(times_of(builds, model, Path(folder), reporter))
    except EngineError as error:
        sys.exit(f"simulate_threads: error: {error}")
    text = page_text(model.name, times, earlier, datetime.now(UTC))
    parsed.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
