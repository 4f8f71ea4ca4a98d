"""The measuring itself: contenders take turns cell by cell, each behind the same saved state.

Flows in: builds, a model file, cells. Flows out: a `Result` for each cell as it is done. Pristine runs in every way
that could be its best; those that one sample shows to be near the best alternate with ours: A B A B.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kimi_gguf.bench.cells import OURS, UBATCH, Cell, Way, ways
from kimi_gguf.bench.contender import Contender, NoRoomError
from kimi_gguf.bench.files import atomically
from kimi_gguf.bench.limits import demand
from kimi_gguf.bench.load import Calm, calmly
from kimi_gguf.bench.models import ModelFile, bench_folder
from kimi_gguf.bench.report import describe
from kimi_gguf.bench.statistics import Summary, best, stable, summary, worth_measuring
from kimi_gguf.engine.progress import Reporter
from kimi_gguf.patches.errors import EngineError

LONG = 2.0  # seconds of a decode beside which what is touched for the first time does not count
SAMPLE_SECONDS = 0.3  # a sample has as many decodes as fit, up to the cell's own limit
# NMSE between the contenders' logits behind a shared state, above which it was not shared. With random weights one
# expert chosen otherwise moves them: pristine's own two layouts of Q4_K differ by 0.066. Another state gives 1.9.
SAME = 0.5
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    cell_seconds: float = 8.0  # of alternating, in each cell
    until: float = math.inf  # time.monotonic() at which no new cell begins


@dataclass(frozen=True)
class Result:
    """A cell's figures."""

    cell: Cell
    samples: dict[str, list[float]]  # by way: seconds of a decode, one for each sample
    screened: dict[str, float]  # ways of pristine that one sample ruled out: seconds of a decode
    steps: int  # decodes in a sample
    others: float | None  # processors that other work took away meanwhile, on average; None: not known here

    @property
    def ours(self) -> Summary:
        """Our build."""
        return summary(self.samples[OURS.name])

    @property
    def rival(self) -> str:
        """Pristine's best way here."""
        return best({name: samples for name, samples in self.samples.items() if name != OURS.name})

    @property
    def pristine(self) -> Summary:
        """Pristine at its best."""
        return summary(self.samples[self.rival])

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.pristine.median / self.ours.median


@dataclass
class Loaded:
    """What loading told, by process, and contexts by way."""

    load: dict[str, dict[str, Any]] = field(default_factory=dict)
    contexts: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[str, float] = field(default_factory=dict)  # way and depth -> NMSE of logits to ours
    fallbacks: dict[str, list[str]] = field(
        default_factory=dict
    )  # process -> what ran as upstream has it, and why
    left_out: dict[str, str] = field(default_factory=dict)  # variant -> why it was not run
    not_measured: list[dict[str, Any]] = field(default_factory=list)  # options of a cell, and the reason


class Arena:
    """The loaded contenders of one model; a context manager."""

    def __init__(
        self,
        model: ModelFile,
        environments: Mapping[str, Mapping[str, str]],
        told: Reporter,
        threads: int,
        device: str | None = None,
    ) -> None:
        """environments: by build, "pristine" and "patched". threads: for filling a context. device: for all layers."""
        self.model, self.told, self.threads, self.device = model, told, threads, device
        self.about = Loaded()
        self._environments = environments
        self._stack = ExitStack()
        self._processes: dict[str, Contender] = {}
        self._contexts: set[tuple[Contender, str]] = set()
        self._at: dict[str, tuple[str, int]] = {}  # process and context -> its kept state

    def __enter__(self) -> Arena:
        self.told.phase(f"reading {self.model.name}")
        read_through(self.model.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def process(self, way: Way) -> Contender:
        """The way's process, started and loaded on first use."""
        process = self._processes.get(way.process)
        if process is None:
            self.told.phase(f"loading {self.model.name}: {way.process}")
            process = self._stack.enter_context(Contender(way.process, self._environments[way.build]))
            self._processes[way.process] = process
            self.about.load[way.process] = process.ask(
                "load", gguf=str(self.model.path), repack=way.repack, device=self.device
            )
        return process

    def context(self, way: Way, cell: Cell, n_ctx: int, n_batch: int) -> tuple[Contender, str]:
        """The way's process and the name of its context for such cells."""
        name = f"{'fa' if way.flash else 'plain'} {cell.cache_type} {cell.sequences}x{n_ctx} {n_batch}"
        process = self.process(way)
        told = process.ask(
            "context", name=name, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=cell.ubatch, sequences=cell.sequences,
            flash=way.flash, cache_type=cell.cache_type, threads=self.threads,
        )  # fmt: skip
        self.about.contexts.setdefault(f"{way.name}, {name}", told["memory"])
        if told["fallbacks"]:
            self.about.fallbacks[way.process] = told["fallbacks"]
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

    def go_to(self, way: Way, cell: Cell, place: tuple[Contender, str]) -> Path:
        """Bring the way's context to the cell's depth: from a saved state, or by decoding with our build.

        Returns where the state is saved; there is none at depth 0.
        """
        process, name = place
        file = state_file(self.model, cell)
        key, wanted = f"{process.name} {name}", (f"{cell.cache_type} {cell.sequences}", cell.depth)
        if self._at.get(key) == wanted:
            return file
        if cell.depth == 0:
            process.ask("empty", name=name)
        else:
            if not file.is_file():
                if way != OURS:
                    raise AssertionError("ours goes first")
                self.told.phase(f"filling {cell.sequences} × {cell.depth} tokens ({cell.cache_type} cache)")
                atomically(file, lambda part: process.ask(
                    "fill", self.told.step, name=name, depth=cell.depth, file=str(part)))  # fmt: skip
            else:
                process.ask("restore", name=name, file=str(file))
        self._at[key] = wanted
        return file


def read_through(file: Path) -> None:
    """Read all of a file, so that whoever loads it first finds it in the page cache like those behind."""
    part = bytearray(1 << 22)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(part):
            pass


def state_file(model: ModelFile, cell: Cell) -> Path:
    """Where the state at a cell's depth is kept."""
    name = f"{model.path.stem}-{model.key}-{cell.cache_type}-{cell.sequences}x{cell.depth}.state"
    return bench_folder() / "states" / name


def measure(
    arena: Arena, cells: Sequence[Cell], pristine: Sequence[Way], settings: Settings
) -> Iterator[Result]:
    """Measure cell after cell, until the time is used up. Raises `EngineError`."""
    n_batch = max(*(cell.tokens for cell in cells), UBATCH)
    n_ctx = context_size(cells)
    left_out: set[Way] = set()
    for i, cell in enumerate(cells):
        if time.monotonic() >= settings.until:
            arena.skip(cells[i:], "the time of --budget was used up")
            return
        rivals = [way for way in ways(cell, pristine) if way not in left_out]
        places = {}
        for way in (OURS, *rivals):
            try:
                places[way] = arena.context(way, cell, n_ctx, n_batch)
            except NoRoomError as error:
                if way.flash:
                    raise
                arena.told.note(f"{way.name} is left out: {error.what}")
                arena.about.left_out[way.name] = error.what
                left_out.add(way)
                continue
            arena.go_to(way, cell, places[way])
        check_shared(arena, cell, places)
        arena.told.phase(describe(vars(cell)))
        yield measure_cell(arena, cell, places, settings)


def measure_fitting(
    arena: Arena, cells: Sequence[Cell], pristine: Sequence[Way], settings: Settings, room: int
) -> Iterator[Result]:
    """Measure on a device with `room` bytes beside the models: the deepest cells are left out until all fit.

    Contexts of one type of cache and number of sequences are there at a time.
    """
    for (cache_type, sequences), group in itertools.groupby(cells, key=lambda c: (c.cache_type, c.sequences)):
        left, measured = list(group), set[Cell]()
        while left:
            wanted = caches_bytes(arena.model, left, pristine)
            if wanted <= room:
                try:
                    for result in measure(arena, left, pristine, settings):
                        measured.add(result.cell)
                        yield result
                    break
                except NoRoomError as error:
                    reason = error.what
            else:
                reason = (
                    f"caches of {wanted / MIB:.0f} MiB, room for {max(room, 0) / MIB:.0f} beside the models"
                )
            depth = max(cell.depth for cell in left)
            arena.skip(
                (cell for cell in left if cell.depth == depth and cell not in measured),
                f"{sequences} × {depth} tokens ({cache_type} cache) do not fit the device: {reason}",
            )
            left = [cell for cell in left if cell.depth < depth and cell not in measured]
            arena.free_contexts()
        arena.free_contexts()


def context_size(cells: Sequence[Cell]) -> int:
    """Tokens of a sequence that a context for these cells has room for."""
    room = max(cell.depth + cell.batch * (cell.most_steps + max(cell.warm, 1)) for cell in cells)
    return -(-room // 256) * 256


def caches_bytes(model: ModelFile, cells: Sequence[Cell], pristine: Sequence[Way]) -> float:
    """Bytes of the latent caches in all contexts that these cells, alike in type and sequences, are measured in."""
    whole = replace(cells[0], depth=context_size(cells), batch=0)
    return demand(model, whole).cache_bytes * (1 + len(ways(cells[0], pristine)))


def measure_cell(
    arena: Arena, cell: Cell, places: Mapping[Way, tuple[Contender, str]], settings: Settings
) -> Result:
    """One cell: a first look at every way, then A B A B among ours and pristine's best ones."""
    sampler = Sampler(cell, places)
    first = {way: sampler.sample(way, 1) for way in places}
    steps = max(1, min(cell.most_steps, int(SAMPLE_SECONDS / first[OURS])))
    if steps > 1:  # the first decodes pay for what is touched for the first time: look again
        first = {way: sampler.sample(way, min(steps, 4)) for way in places}
    rivals = {way.name: seconds for way, seconds in first.items() if way != OURS}
    near = worth_measuring(rivals)
    taking = [OURS, *(way for way in places if way.name in near)]
    samples: dict[str, list[float]] = {way.name: [] for way in taking}
    if first[OURS] >= LONG:
        samples = {way.name: [first[way]] for way in taking}
    else:
        sampler.forget()
    deadline = time.monotonic() + settings.cell_seconds
    while not all(stable(each) for each in samples.values()):
        done = len(samples[OURS.name])
        if time.monotonic() >= deadline and done >= 2:
            break
        for way in taking if done % 2 == 0 else reversed(taking):
            samples[way.name].append(sampler.sample(way, steps))
    ruled_out = {name: seconds for name, seconds in rivals.items() if name not in near}
    return Result(cell, samples, ruled_out, steps, sampler.others())


class Sampler:
    """Samples of a cell, and how much other work there was around them."""

    def __init__(self, cell: Cell, places: Mapping[Way, tuple[Contender, str]]) -> None:
        self._cell, self._places = cell, places
        self._own = {process.pid for process, _ in places.values()}
        self._taken: list[Calm[dict[str, Any]]] = []

    def sample(self, way: Way, steps: int) -> float:
        """Seconds of a decode, the mean of `steps`."""
        process, name = self._places[way]
        cell = self._cell

        def ask() -> dict[str, Any]:
            return process.ask(
                "time", name=name, batch=cell.batch, steps=steps, warm=cell.warm, threads=cell.threads
            )

        self._taken.append(calmly(ask, cell.threads, self._own))
        seconds: list[float] = self._taken[-1].answer["seconds"]
        return sum(seconds) / len(seconds)

    def forget(self) -> None:
        """Count other work from here."""
        self._taken.clear()

    def others(self) -> float | None:
        """Processors that other work took away during the samples taken, on average; None where not known."""
        known = [(each.disturbance, each.took) for each in self._taken if each.disturbance is not None]
        return sum(work for work, _ in known) / sum(took for _, took in known) if known else None


def check_shared(arena: Arena, cell: Cell, places: Mapping[Way, tuple[Contender, str]]) -> None:
    """The next token's logits behind the shared state: every build and way must mean the same state by it."""
    mine = f"{cell.cache_type} cache, {cell.sequences} × {cell.depth}"
    if cell.depth == 0 or all(f"{way.name}, {mine}" in arena.about.shared for way in places):
        return
    with tempfile.TemporaryDirectory() as folder:
        logits = {}
        for i, (way, (process, name)) in enumerate(places.items()):
            file = Path(folder) / f"{i}.npy"
            process.ask("logits", name=name, threads=arena.threads, file=str(file))
            logits[way] = np.load(file).astype(np.float64)
    for way, theirs in logits.items():
        error = float(np.square(theirs - logits[OURS]).sum() / np.square(logits[OURS]).sum())
        if not error <= SAME:
            raise EngineError(
                f"{way.name}: behind a saved state of {cell.depth} tokens its logits are not ours",
                expected=f"NMSE up to {SAME}",
                found=f"{error:.2g}",
                todo="compare the builds with validate-kimi: one of them is wrong",
            )
        arena.about.shared[f"{way.name}, {mine}"] = error
