"""Simulate decodes on up to 128 cores, patched and upstream, and compare with reality on the cores there are.

    python -m kimi_gguf.scripts.simulate_threads

Output: docs/threads.md. The model is generated in the cache: layers of the 48B's shapes. The simulation is that of
bench/threads.py. Takes ten minutes on two cores, which nothing else should use.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from kimi_gguf.bench.cells import Cell
from kimi_gguf.bench.models import ModelFile, generate, open_model
from kimi_gguf.bench.report import markdown
from kimi_gguf.bench.roofline import demand
from kimi_gguf.bench.runner import Runner, environment_of
from kimi_gguf.bench.shapes import BenchModel
from kimi_gguf.bench.threads import BANDWIDTH, BARRIER, floor, graphs_of, read_events, recorder, simulated
from kimi_gguf.engine.builds import Engine, ensure
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.facts import machine_facts
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.scripts.record_page import machine_text

ROOT = Path(__file__).resolve().parents[1]
THREADS = (1, 2, 4, 8, 16, 32, 33, 48, 63, 64, 100, 128)
REAL = (1, 2)
# name -> tokens of a decode, depth
DECODES = {"1 token": (1, 256), "4 tokens": (4, 256), "512 tokens": (512, 0)}
STEPS = {1: 8, 4: 6, 512: 3}  # decodes that are recorded, by tokens
N_CTX = 2048  # at least (1 + STEPS) decodes
PAGE = """\
# Many threads, simulated

Written by `python -m kimi_gguf.scripts.simulate_threads`; do not edit.

{machine}. Measured {when}.

The machine has {cores} cores, so more threads are simulated. Each build runs with N threads on these cores, and the CPU
time of each task is recorded. The time on N cores is calculated from these records. Assumptions: each core
reads memory as fast as a core of this machine, all cores together read at most {bandwidth:.0f} GB/s, and a barrier
takes {barrier:.1f} µs per core. For each step between two barriers, the median of {least} to {most} runs is used. Both
builds run with default options and flash attention, which may not be upstream's fastest variant.

Each cell: milliseconds upstream, milliseconds patched, speedup. Depth: tokens already in the cache. (m): the assumed
memory bandwidth limits at least one of the two builds. The model is {model}.

{table}
Measured on this machine right after the simulation, without recording. In parentheses: the simulated time minus the
measured one, in percent of the measured one (negative: the simulation is too fast).

{real}"""


class Build:
    """
    A build with the model and a context for each decode, and its times.

    Two processes: one records, in which threads sleep while they wait, because there are more of them than cores; the
    other measures, in which they wait as they do by default.
    """

    def __init__(self, engine: Engine, model: ModelFile) -> None:
        self.name = "upstream" if engine.is_upstream else "patched"
        recording = {"LD_PRELOAD": str(recorder()), "OMP_WAIT_POLICY": "passive"}
        self._recording = self._started(engine, model, recording)
        self._measuring = self._started(engine, model, {})

    def _started(self, engine: Engine, model: ModelFile, variables: dict[str, str]) -> Runner:
        runner = Runner(self.name, environment_of(engine) | variables)
        runner.ask("load", gguf=str(model.path), repack=True)
        for cell in map(cell_of, DECODES):
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
        """Bring the cell's contexts to its depth."""
        if cell.depth:
            for runner in (self._recording, self._measuring):
                runner.ask("fill", name=str(cell.depth), depth=cell.depth, file=str(folder / "state"))

    def measured(self, cell: Cell, threads: int) -> float:
        """Seconds of a decode."""
        answer = self._measuring.ask(
            "time", name=str(cell.depth), batch=cell.batch, steps=STEPS[cell.batch], warm=1, threads=threads
        )
        return float(median(answer["seconds"]))

    def simulated(self, cell: Cell, threads: int, folder: Path) -> float:
        """Seconds of a decode on as many cores as threads."""
        file, steps = folder / "events", STEPS[cell.batch]
        self._recording.ask(
            "record_tasks",
            name=str(cell.depth),
            batch=cell.batch,
            steps=steps,
            threads=threads,
            file=str(file),
        )
        return simulated(graphs_of(read_events(file)), steps)


def cell_of(name: str) -> Cell:
    batch, depth = DECODES[name]
    return Cell("f16", 1, depth, REAL[-1], batch)


def rows_of(
    builds: list[Build], model: ModelFile, folder: Path, reporter: Reporter
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """For each decode its simulated and its measured row."""
    for name in DECODES:
        cell = cell_of(name)
        for build in builds:
            build.fill(cell, folder)
        found, real = [], []
        for threads in THREADS:
            reporter.phase(f"{name}, {threads} threads")
            least = floor(demand(model, cell).nbytes)
            times = [build.simulated(cell, threads, folder) for build in builds]
            found.append(cell_text([max(least, each) for each in times], limited=min(times) < least))
            if threads in REAL:
                real.append(real_text([build.measured(cell, threads) for build in builds], times))
        title = f"{name}, depth {cell.depth}"
        yield (title, *found), (title, *real)


def cell_text(seconds: list[float], limited: bool) -> str:
    """Milliseconds upstream and patched, and the ratio."""
    upstream, patched = seconds
    mark = " (m)" if limited else ""
    return f"{milliseconds(upstream)}, {milliseconds(patched)}, {upstream / patched:.2f}{mark}"


def real_text(seconds: list[float], simulated: list[float]) -> str:
    """Milliseconds upstream and patched, each with the deviation of the simulation, and the ratio."""
    both = (f"{milliseconds(a)} ({b / a - 1:+.0%})" for a, b in zip(seconds, simulated, strict=True))
    upstream, patched = seconds
    return f"{', '.join(both)}, {upstream / patched:.2f}"


def milliseconds(seconds: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{1000 * seconds:.3g}" if seconds < 0.9995 else f"{1000 * seconds:.0f}"


def page_text(
    model: str, found: Sequence[tuple[str, ...]], real: Sequence[tuple[str, ...]], created: datetime
) -> str:
    """The page, measured on this machine. found, real: the rows of `rows_of`."""
    return PAGE.format(
        machine=machine_text(machine_facts()), when=created.date(),
        cores=REAL[-1], model=model, barrier=1e6 * BARRIER, bandwidth=BANDWIDTH / 1e9,
        least=min(STEPS.values()), most=max(STEPS.values()),
        table=markdown([("threads", *(f"{n}" for n in THREADS)), *found]),
        real=markdown([("threads", *(f"{n}" for n in REAL)), *real]),
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
    parsed = parser.parse_args()
    try:
        with reporting() as reporter, tempfile.TemporaryDirectory() as folder:
            engines = [ensure(upstream=True), ensure()]
            chosen = BenchModel(layers=4, experts=64, type=parsed.type, shapes=parsed.shapes)
            model = open_model(generate(chosen, engines[0], reporter))
            with ExitStack() as stack:
                builds = [stack.enter_context(closing(Build(engine, model))) for engine in engines]
                rows = list(rows_of(builds, model, Path(folder), reporter))
    except EngineError as error:
        sys.exit(f"simulate_threads: error: {error}")
    found, real = zip(*rows, strict=True)
    text = page_text(model.name, found, real, datetime.now(UTC))
    parsed.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
