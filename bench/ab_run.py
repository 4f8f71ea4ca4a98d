"""A/B runs: the runners alternate in each cell, each from the same saved state.

Input: builds, a model file, cells. Output: a `Result` for each cell. Each variant of upstream is sampled once; those
close to the fastest then alternate with patched: A B B A.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_gguf.bench.cells import PATCHED, UBATCH, Cell, Variant, variants
from kimi_gguf.bench.files import atomically
from kimi_gguf.bench.load import Attempt, undisturbed
from kimi_gguf.bench.models import ModelFile, bench_folder
from kimi_gguf.bench.report import describe
from kimi_gguf.bench.roofline import demand
from kimi_gguf.bench.runner import NoRoomError, Runner
from kimi_gguf.bench.statistics import Summary, best, stable, summary, worth_measuring
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import Reporter

LONG = 2.0  # seconds of a decode; in longer ones the first touch of memory is negligible
SAMPLE_SECONDS = 0.3  # a sample has as many decodes as fit, up to the cell's own limit
# Maximum NMSE between the runners' logits if they share a state, unless upstream's variants differ more among
# themselves. With random weights one expert mismatch is visible: upstream's own two layouts of Q4_K differ by 0.066.
SAME = 0.5
FLOORS = 1.5  # times the largest difference between upstream's variants
MIB = 2**20

Row = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    cell_seconds: float = 8.0  # of alternating, in each cell; one process at a time: of each variant and turn
    until: float = math.inf  # time.monotonic() at which no new cell begins
    rounds: int = 1  # one process at a time: how often all turns are repeated


@dataclass(frozen=True)
class Result:
    """A cell's figures."""

    cell: Cell
    samples: dict[str, list[float]]  # by variant: seconds of a decode, one for each sample
    screened: dict[str, float]  # variants of upstream that one sample ruled out: seconds of a decode
    steps: int  # decodes in a sample
    others: float | None  # average number of processors that other work used meanwhile; None: unknown

    @property
    def patched(self) -> Summary:
        """The patched build."""
        return summary(self.samples[PATCHED.name])

    @property
    def rival(self) -> str:
        """The fastest variant of upstream."""
        return best({name: samples for name, samples in self.samples.items() if name.startswith("upstream")})

    @property
    def upstream(self) -> Summary:
        """The fastest variant of upstream."""
        return summary(self.samples[self.rival])

    @property
    def ratio(self) -> float:
        """The speedup of patched over upstream."""
        return self.upstream.median / self.patched.median


@dataclass
class Loaded:
    """Information reported when the model was loaded and the contexts were created."""

    load: dict[str, dict[str, Any]] = field(default_factory=dict)
    contexts: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[str, float] = field(default_factory=dict)  # variant and depth -> NMSE of logits to patched
    fallbacks: dict[str, list[str]] = field(default_factory=dict)  # process -> operators not used, and why
    left_out: dict[str, str] = field(default_factory=dict)  # variant -> why it was not run
    not_measured: list[dict[str, Any]] = field(default_factory=list)  # options of a cell, and the reason
    resident: dict[str, dict[str, float]] = field(default_factory=dict)  # process -> MiB (in_turns.py)
    read: dict[str, float] = field(default_factory=dict)  # variant and cell -> bytes read from disk per token
    peaks: list[dict[str, Any]] = field(default_factory=list)  # peak rates around the turns (in_turns.py)


class Runners:
    """The runners of one model, loaded on first use; a context manager."""

    def __init__(
        self,
        model: ModelFile,
        environments: Mapping[str, Mapping[str, str]],
        reporter: Reporter,
        threads: int,
        device: str | None = None,
    ) -> None:
        """environments: by build, "upstream" and "patched". threads: for filling a context. device: for all layers."""
        self.model, self.reporter, self.threads, self.device = model, reporter, threads, device
        self.about = Loaded()
        self._environments = environments
        self._processes: dict[str, Runner] = {}
        self._contexts: set[tuple[Runner, str]] = set()
        self._at: dict[tuple[Runner, str], tuple[str, int]] = {}  # process and context -> its kept state

    def __enter__(self) -> Runners:
        self.reporter.phase(f"reading {self.model.name}")
        read_through(self.model.path)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self.stop(name)

    def running(self, name: str) -> Runner | None:
        """The process of this name, if it runs."""
        return self._processes.get(name)

    def stop(self, name: str) -> None:
        """End a process; its contexts are gone."""
        process = self._processes.pop(name)
        process.close()
        self._contexts = {place for place in self._contexts if place[0] is not process}
        self._at = {place: at for place, at in self._at.items() if place[0] is not process}

    def process(self, variant: Variant) -> Runner:
        """The variant's process, started and loaded on first use."""
        process = self._processes.get(variant.process)
        if process is None:
            self.reporter.phase(f"loading {self.model.name}: {variant.process}")
            process = Runner(variant.process, self._environments[variant.build])
            self._processes[variant.process] = process
            loaded = process.ask("load", gguf=str(self.model.path), repack=variant.repack, device=self.device)
            before = self.about.load.get(
                variant.process, loaded
            )  # from disk, unless it was in the page cache
            self.about.load[variant.process] = min(before, loaded, key=lambda load: load["seconds"])
        return process

    def context(self, variant: Variant, cell: Cell, n_ctx: int, n_batch: int) -> tuple[Runner, str]:
        """The variant's process and the name of its context for such cells."""
        name = f"{'fa' if variant.flash else 'plain'} {cell.cache_type} {cell.sequences}x{n_ctx} {n_batch}"
        process = self.process(variant)
        answer = process.ask(
            "context", name=name, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=cell.ubatch, sequences=cell.sequences,
            flash=variant.flash, cache_type=cell.cache_type, threads=self.threads,
        )  # fmt: skip
        self.about.contexts.setdefault(f"{variant.name}, {name}", answer["memory"])
        if answer["fallbacks"]:
            self.about.fallbacks[variant.process] = answer["fallbacks"]
        self._contexts.add((process, name))
        return process, name

    def skip(self, cells: Iterable[Cell], reason: str) -> None:
        """Record cells that cannot be measured, with the reason."""
        self.about.not_measured += [{**vars(cell), "reason": reason} for cell in cells]

    def free_contexts(self) -> None:
        """Free all contexts; the models stay."""
        for process, name in self._contexts:
            process.ask("free", name=name)
        self._contexts.clear()
        self._at.clear()

    def go_to(self, variant: Variant, cell: Cell, place: tuple[Runner, str]) -> Path:
        """Bring the variant's context to the cell's depth: load a saved state, or decode with the patched build.

        Returns where the state is saved; there is none at depth 0.
        """
        process, name = place
        file = state_file(self.model, cell)
        wanted = (f"{cell.cache_type} {cell.sequences}", cell.depth)
        if self._at.get(place) == wanted:
            return file
        if cell.depth == 0:
            process.ask("empty", name=name)
        elif file.is_file():
            process.ask("restore", name=name, file=str(file))
        else:
            assert variant.build == "patched", "the patched build goes first"
            self.reporter.phase(f"filling {cell.sequences} × {cell.depth} tokens ({cell.cache_type} cache)")
            fill = partial(process.ask, "fill", self.reporter.step, name=name, depth=cell.depth)
            atomically(file, lambda part: fill(file=str(part)))
        self._at[place] = wanted
        return file


def read_through(file: Path) -> None:
    """Read a file into the page cache, so that the first process loads it as fast as the following ones.

    A file that was just generated is also written to disk first: otherwise that goes on during the first cells.
    """
    part = bytearray(1 << 22)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(part):
            pass
        os.fsync(stream.fileno())


def state_file(model: ModelFile, cell: Cell) -> Path:
    """Where the state at a cell's depth is kept."""
    name = f"{model.path.stem}-{model.key}-{cell.cache_type}-{cell.sequences}x{cell.depth}.state"
    return bench_folder() / "states" / name


def measure(
    runners: Runners, cells: Sequence[Cell], upstream: Sequence[Variant], settings: Settings
) -> Iterator[Result]:
    """Measure cell after cell, until the time is used up. Raises `EngineError`."""
    n_batch = max(*(cell.tokens for cell in cells), UBATCH)
    n_ctx = context_size(cells)
    left_out: set[Variant] = set()
    for i, cell in enumerate(cells):
        if time.monotonic() >= settings.until:
            runners.skip(cells[i:], "the time of --budget was used up")
            return
        rivals = [variant for variant in variants(cell, upstream) if variant not in left_out]
        places = {}
        for variant in (PATCHED, *rivals):
            try:
                places[variant] = runners.context(variant, cell, n_ctx, n_batch)
            except NoRoomError as error:
                if variant.flash:
                    raise
                runners.reporter.note(f"{variant.name} is left out: {error.what}")
                runners.about.left_out[variant.name] = error.what
                left_out.add(variant)
                continue
            runners.go_to(variant, cell, places[variant])
        check_shared(runners, cell, places)
        runners.reporter.phase(describe(vars(cell)))
        yield measure_cell(cell, places, settings)


def measure_fitting(
    runners: Runners, cells: Sequence[Cell], upstream: Sequence[Variant], settings: Settings, room: int
) -> Iterator[Result]:
    """Measure on a device with `room` bytes free next to the models: the deepest cells are left out until all fit.

    At any time only contexts with one cache type and one number of sequences exist.
    """
    for (cache_type, sequences), group in itertools.groupby(cells, key=lambda c: (c.cache_type, c.sequences)):
        left, measured = list(group), set[Cell]()
        while left:
            wanted = caches_bytes(runners.model, left, upstream)
            if wanted <= room:
                try:
                    for result in measure(runners, left, upstream, settings):
                        measured.add(result.cell)
                        yield result
                    break
                except NoRoomError as error:
                    reason = error.what
            else:
                free = f"{max(room, 0) / MIB:.0f} MiB free next to the models"
                reason = f"caches of {wanted / MIB:.0f} MiB, {free}"
            depth = max(cell.depth for cell in left)
            runners.skip(
                (cell for cell in left if cell.depth == depth and cell not in measured),
                f"{sequences} × {depth} tokens ({cache_type} cache) do not fit the device: {reason}",
            )
            left = [cell for cell in left if cell.depth < depth and cell not in measured]
            runners.free_contexts()
        runners.free_contexts()


def context_size(cells: Sequence[Cell]) -> int:
    """Tokens of a sequence that a context for these cells has room for."""
    room = max(cell.depth + cell.batch * (cell.most_steps + max(cell.warm, 1)) for cell in cells)
    return -(-room // 256) * 256


def caches_bytes(model: ModelFile, cells: Sequence[Cell], upstream: Sequence[Variant]) -> float:
    """Bytes of the latent caches in all contexts for these cells, which have equal cache types and sequences."""
    whole = replace(cells[0], depth=context_size(cells), batch=0)
    return demand(model, whole).cache_bytes * (1 + len(variants(cells[0], upstream)))


def measure_cell(cell: Cell, places: Mapping[Variant, tuple[Runner, str]], settings: Settings) -> Result:
    """Measure one cell: sample every variant once, then alternate A B A B with the fastest variants of upstream."""
    sampler = Sampler(cell, places, settings.cell_seconds)
    first = {variant: sampler.sample(variant, 1) for variant in places}
    steps = max(1, min(cell.most_steps, int(SAMPLE_SECONDS / first[PATCHED])))
    if steps > 1:  # the first decodes include the first touch of memory: sample again
        first = {variant: sampler.sample(variant, min(steps, 4)) for variant in places}
    rivals = {variant.name: seconds for variant, seconds in first.items() if variant != PATCHED}
    near = worth_measuring(rivals)
    taking = [PATCHED, *(variant for variant in places if variant.name in near)]
    samples: dict[str, list[float]] = {variant.name: [] for variant in taking}
    if first[PATCHED] >= LONG:
        samples = {variant.name: [first[variant]] for variant in taking}
    else:
        sampler.forget()
    deadline = time.monotonic() + settings.cell_seconds
    while not all(stable(seconds) for seconds in samples.values()):
        done = len(samples[PATCHED.name])
        if time.monotonic() >= deadline and done >= 2:
            break
        for variant in taking if done % 2 == 0 else reversed(taking):
            samples[variant.name].append(sampler.sample(variant, steps))
    ruled_out = {name: seconds for name, seconds in rivals.items() if name not in near}
    return Result(cell, samples, ruled_out, steps, sampler.others())


class Sampler:
    """Samples of a cell, and the load of other programs meanwhile."""

    def __init__(self, cell: Cell, places: Mapping[Variant, tuple[Runner, str]], seconds: float) -> None:
        """seconds: after this time a disturbed sample is not repeated."""
        self._cell, self._places, self._seconds = cell, places, seconds
        self._own = {process.pid for process, _ in places.values()}
        self._taken: list[Attempt[dict[str, Any]]] = []

    def sample(self, variant: Variant, steps: int) -> float:
        """Seconds of a decode, the mean of `steps`."""
        (process, name), cell = self._places[variant], self._cell
        run = partial(
            process.ask,
            "time",
            name=name,
            batch=cell.batch,
            steps=steps,
            warm=cell.warm,
            threads=cell.threads,
        )
        self._taken.append(undisturbed(run, cell.threads, self._own, self._seconds))
        seconds: list[float] = self._taken[-1].answer["seconds"]
        return sum(seconds) / len(seconds)

    def forget(self) -> None:
        """Start counting other work again."""
        self._taken.clear()

    def others(self) -> float | None:
        """Average number of processors that other work used during the samples; None: unknown."""
        known = [
            (attempt.disturbance, attempt.took) for attempt in self._taken if attempt.disturbance is not None
        ]
        return sum(work for work, _ in known) / sum(took for _, took in known) if known else None


def check_shared(runners: Runners, cell: Cell, places: Mapping[Variant, tuple[Runner, str]]) -> None:
    """Check that all variants compute the same logits after the shared state."""
    about = runners.about
    if cell.depth == 0 or all(described(variant, cell) in about.shared for variant in places):
        return
    rows = {variant: logits_of(place, runners.threads) for variant, place in places.items()}
    check_logits(about, LogitsAfterState(cell, rows, logits_of(places[PATCHED], runners.threads, empty=True)))


def described(variant: Variant, cell: Cell) -> str:
    """The name of a comparison of logits."""
    return f"{variant.name}, {cell.cache_type} cache, {cell.sequences} × {cell.depth}"


@dataclass(frozen=True)
class LogitsAfterState:
    """Logits of a token, float64 [n_vocab]: after a cell's saved state, and of patched in an empty context."""

    cell: Cell
    rows: dict[Variant, Row]  # patched first
    empty: Row


def logits_of(place: tuple[Runner, str], threads: int, empty: bool = False) -> Row:
    """The logits of one more token of the first sequence. empty: of the same token in an empty context.

    Raises `EngineError` if the context's state is not the one that was restored.
    """
    process, name = place
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.npy"
        process.ask("logits", name=name, threads=threads, file=str(file), empty=empty)
        row: Row = np.load(file).astype(np.float64)
        return row


def check_logits(about: Loaded, logits: LogitsAfterState) -> None:
    """Compare each variant's logits with those of patched. Raises `EngineError`.

    The limit is always nearer to patched than to a context without the state: half the NMSE of its logits, at most.
    """
    patched = next(iter(logits.rows.values()))
    scale = float(np.square(patched).sum())

    def nmse(a: Row, b: Row) -> float:
        return float(np.square(a - b).sum()) / scale

    upstream = [row for variant, row in logits.rows.items() if variant.build == "upstream"]
    floor = max((nmse(a, b) for a, b in itertools.combinations(upstream, 2)), default=0.0)
    of_empty = nmse(logits.empty, patched)
    limit = min(of_empty / 2, max(SAME, FLOORS * floor))
    for variant, row in logits.rows.items():
        error = nmse(row, patched)
        if not error <= limit:
            raise EngineError(
                f"{variant.name}: after a saved state of {logits.cell.depth} tokens its logits differ from patched",
                expected=f"an NMSE up to {limit:.2g} (upstream's variants differ by {floor:.2g}, an empty context by "
                f"{of_empty:.2g})",
                found=f"{error:.2g}",
                todo="compare the builds with validate-kimi: one of them is wrong",
            )
        about.shared[described(variant, logits.cell)] = error
