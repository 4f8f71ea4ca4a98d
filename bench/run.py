"""What `kimi-llama bench` does: builds and models made ready, measured, shown, written.

Flows in: parsed arguments. Flows out: tables on standard output, progress on standard error, a record and a page
where asked. The record on disk is whole after every cell, however the run ends.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kimi_gguf.bench import hybrid
from kimi_gguf.bench.cells import (
    DEVICE_THREADS,
    PRISTINE,
    PRISTINE_ON_DEVICE,
    THREADS,
    Cell,
    Way,
    defaults,
    grid,
)
from kimi_gguf.bench.contender import environment_of
from kimi_gguf.bench.device import Device, find_device
from kimi_gguf.bench.device_operators import measure_device_operators
from kimi_gguf.bench.limits import Limits, demand, mean_of, measure_device_limits, measure_limits
from kimi_gguf.bench.load import available_memory
from kimi_gguf.bench.manifest import read_manifest
from kimi_gguf.bench.measure import Arena, Result, Settings, measure, measure_fitting
from kimi_gguf.bench.models import (
    ModelFile,
    bench_folder,
    convert_demo,
    generate,
    missing_bytes,
    open_model,
)
from kimi_gguf.bench.operators import libraries_of, measure_operators
from kimi_gguf.bench.page import (
    device_operators_tables,
    hybrid_table,
    operators_table,
    products_table,
    write_page,
)
from kimi_gguf.bench.products import measure_products
from kimi_gguf.bench.record import Data, add, cell_data, load_all, model_data, new_record, save
from kimi_gguf.bench.report import (
    cell_row,
    cells_table,
    device_limits_table,
    limits_table,
    memory_table,
    not_measured_lines,
    show,
    verdict,
)
from kimi_gguf.bench.shapes import TYPES, BenchModel
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.engine.builds import Engine, ensure, options_of
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.engine.toolchain import cores
from kimi_gguf.patches.errors import EngineError

DEMO_TYPES = ("Q8_0", "BF16")
FREE_SHARE = 0.95  # of a device's free memory that is counted with


def run(parsed: argparse.Namespace, words: list[str]) -> int:
    """Measure, or draw a page. words: the command line, for the record. Returns the exit status."""
    try:
        if not parsed.records:
            parsed.backend, parsed.defines = options_of(parsed.backend)
        check(parsed)
        if parsed.draw is not None:
            manifest = read_manifest(parsed.draw)
            write_page(manifest.selected(), manifest.page)
            return 0
        records = [each for file in parsed.records or () for each in load_all(file)]
        records = records or [Run(parsed, words).all()]
        if parsed.record is not None and not parsed.records:
            add(records[0], parsed.record)
        if parsed.page is not None:
            write_page(records, parsed.page)
        return 0
    except ConvertError as error:
        raise EngineError(str(error)) from None


def check(parsed: argparse.Namespace) -> None:
    """What argparse cannot say. Raises `EngineError`."""
    if parsed.records and parsed.page is None:
        raise EngineError(
            "--records measures nothing and wants --page", todo="name the page: --page docs/bench.md"
        )
    if parsed.page is not None and not parsed.records and parsed.page.exists():
        raise EngineError(
            f"{parsed.page}: a run does not overwrite a page",
            todo="add the run with --record, then draw the page of all records: --draw or --records",
        )
    if parsed.page is not None and any(
        read_manifest(each).page.resolve() == parsed.page.resolve()
        for each in parsed.page.parent.glob("bench*.toml")
    ):
        raise EngineError(f"{parsed.page}: this page has a manifest", todo="write it with --draw")
    for file in (parsed.json, parsed.page, parsed.record):
        if file is not None and not file.parent.is_dir():
            raise EngineError(f"{file}: its folder does not exist", todo=f"make it: mkdir -p {file.parent}")
    if parsed.libraries is not None and not any(parsed.libraries.glob("*llama.*")):
        raise EngineError(
            f"{parsed.libraries}: no build's libraries",
            expected="libllama in it",
            todo="give the folder of a build's shared libraries",
        )
    if on_device(parsed) and (parsed.hybrid or parsed.products or (parsed.operators and parsed.libraries)):
        raise EngineError(
            "--hybrid, --products and --operators --libraries are measured on the processor alone",
            todo="leave out --backend and --device",
        )
    if parsed.model is not None:
        open_model(parsed.model)  # before builds are made
    if parsed.demo and parsed.type and not set(parsed.type) <= set(DEMO_TYPES):
        raise EngineError(f"the demo as {', '.join(parsed.type)}", todo=f"choose {' or '.join(DEMO_TYPES)}")


def on_device(parsed: argparse.Namespace) -> bool:
    """Whether a GPU is to compute, and not the processor."""
    return parsed.backend != "cpu" or parsed.device is not None


class Run:
    """One measuring run."""

    def __init__(self, parsed: argparse.Namespace, words: list[str]) -> None:
        self.parsed = parsed
        self.began = time.monotonic()
        gpu = on_device(parsed)
        self.patched, self.pristine = (
            ensure(pristine, parsed.backend, tests=gpu and parsed.operators, defines=parsed.defines)
            for pristine in (False, True)
        )
        for engine in (self.patched, self.pristine):
            print(f"kimi-llama: build {engine.label()}", file=sys.stderr)
        # on a device ours runs as it does by default: what falls back there is told, and measured
        self.environments = environments(
            self.patched, self.pristine, parsed.libraries, "" if gpu else "require"
        )
        self.device: Device | None = None
        if gpu:
            self.device = find_device(parsed.backend, self.environments["patched"], parsed.device)
        switch = self.environments["patched"]["KIMI_OPS"]
        shown = [Path(word).name if "/" in word else word for word in words]
        self.record = new_record(
            ["kimi-llama", *shown], self.patched, self.pristine, parsed.libraries, switch, self.device
        )
        self.threads: tuple[int, ...] = parsed.threads or (
            (min(DEVICE_THREADS, cores()),) if gpu else THREADS if parsed.grid else (cores(),)
        )

    def all(self) -> Data:
        """Everything asked for; the record."""
        with reporting() as told:
            if self.parsed.operators and self.device is not None:
                self.device_operators(self.device, told)
            elif self.parsed.operators:
                self.operators(told)
            elif self.parsed.products:
                self.products(told)
            elif self.parsed.hybrid:
                self.hybrid(told)
            else:
                self.models(told)
        self.keep()
        return self.record

    def keep(self) -> None:
        """The record so far, on disk."""
        if self.parsed.json is not None:
            save(self.record, self.parsed.json)

    def models(self, told: Reporter) -> None:
        """Cells of each model."""
        parsed = self.parsed
        makers = self.makers(told)
        name = self.device.name if self.device else None
        on_machine = self.limits(told) if self.device is None else {}
        on_gpu = self.device_limits(self.device, told) if self.device else None
        batches, depths = defaults(parsed.grid, self.device is not None)
        cells = grid(
            parsed.cache_type, parsed.sequences, parsed.depth or depths, self.threads, parsed.batch or batches,
            parsed.ubatch, name,
        )  # fmt: skip
        for make in makers:
            model = open_model(make())
            check_device(model, self.device)
            with Arena(model, self.environments, told, max(self.threads), name) as arena:
                data = model_data(model, arena)
                self.record["models"].append(data)
                for result in self.results(arena, cells):
                    limit = on_gpu if name else self.limit_beside(result.cell.threads, on_machine)
                    cell = cell_data(result, demand(model, result.cell), limit)
                    data["cells"].append(cell)
                    told.note("  ".join(cell_row(cell)))
                    self.keep()
            for line in not_measured_lines(data):
                told.note(line)
            if data["cells"]:
                show(f"{model.name}, {model.nbytes / 1e9:.2f} GB", cells_table(data["cells"]))
                print(verdict(data["cells"]))
                show("Memory, MiB", memory_table(data))

    def results(self, arena: Arena, cells: list[Cell]) -> Iterator[Result]:
        """The cells of a loaded model, measured."""
        settings = Settings(self.parsed.seconds, self.began + self.parsed.budget)
        if self.device is None:
            pristine = ways_in_memory(arena.model, arena.told)
            without = (way.name for way in PRISTINE if way not in pristine)
            arena.about.left_out |= dict.fromkeys(without, "there is not enough free memory")
            return measure(arena, cells, pristine, settings)
        room = int(FREE_SHARE * self.device.free) - 2 * arena.model.nbytes
        return measure_fitting(arena, cells, PRISTINE_ON_DEVICE, settings, room)

    def makers(self, told: Reporter) -> list[Callable[[], Path]]:
        """How to come by each file; the disk that generated ones want is said first."""
        parsed = self.parsed
        if parsed.model is not None:
            return [lambda: parsed.model]
        if parsed.demo:
            return [lambda t=each: convert_demo(t, told) for each in parsed.type or DEMO_TYPES[:1]]  # type: ignore[misc]
        types = parsed.type or (TYPES if parsed.grid else TYPES[:1])
        models = [
            BenchModel(parsed.family, parsed.layers, parsed.experts, each, parsed.shapes) for each in types
        ]
        check_disk(models, self.pristine, told)
        return [lambda m=model: generate(m, self.pristine, told) for model in models]  # type: ignore[misc]

    def limits(self, told: Reporter) -> dict[int, Limits]:
        """Measured, shown and recorded."""
        told.phase("measuring the machine's limit")
        found = {threads: measure_limits(threads) for threads in self.threads}
        self.record["limits"] = [vars(each) for each in found.values()]
        show("The machine's limit", limits_table(self.record["limits"]))
        return found

    def limit_beside(self, threads: int, limits: dict[int, Limits]) -> Limits:
        """The machine's limit beside a cell: the mean of just before and just after it. `limits` goes on to the latter.

        A machine whose memory others share has another limit from minute to minute.
        """
        before, limits[threads] = limits[threads], measure_limits(threads, seconds=0.1, times=1)
        return mean_of([before, limits[threads]])

    def device_limits(self, device: Device, told: Reporter) -> Limits | None:
        """Measured, shown and recorded."""
        told.phase(f"measuring the limit of {device.name}")
        found = measure_device_limits(device.name, self.pristine.lib)
        if found is None:
            told.note(f"{device.name} tells no limit: it lacks a copy or products")
        else:
            self.record["limits"] = [vars(found)]
            show(f"The limit of {device.description}", device_limits_table(vars(found)))
        return found

    def device_operators(self, device: Device, told: Reporter) -> None:
        """The operators alone, on a device."""
        rows = self.record["device_operators"]
        for found in measure_device_operators(
            {"pristine": self.pristine, "patched": self.patched},
            device.name,
            self.parsed.shapes == "tiny",
            told,
        ):
            rows += found
            self.keep()
        for operator, table in device_operators_tables(rows):
            show(f"{operator} on {device.description}", table)

    def operators(self, told: Reporter) -> None:
        """The operators alone."""
        for row in measure_operators(
            libraries_of(self.patched, self.pristine, self.parsed.libraries), max(self.threads), told
        ):
            self.record["operators"].append(row)
            told.note("  ".join(operators_table([row])[1]))
            self.keep()
        show("Operators alone", operators_table(self.record["operators"]))

    def products(self, told: Reporter) -> None:
        """Products of weights alone, on each number of threads."""
        libraries = libraries_of(self.patched, self.pristine, self.parsed.libraries)
        for threads in self.threads:
            for row in measure_products(libraries, threads, told):
                self.record["products"].append(row)
                told.note("  ".join(products_table([row])[1]))
                self.keep()
        show("Products alone", products_table(self.record["products"]))

    def hybrid(self, told: Reporter) -> None:
        """The hybrid against its twin."""
        parsed = self.parsed
        chosen = (parsed.type or TYPES)[0]
        models = [
            BenchModel(family, parsed.layers, parsed.experts, chosen, parsed.shapes)
            for family in ("kimi-linear", "all-mla")
        ]
        check_disk(models, self.pristine, told)
        files = [open_model(generate(model, self.pristine, told)) for model in models]
        depths = sorted(depth for depth in parsed.depth or hybrid.DEPTHS if depth > 0)
        fitting = [depth for depth in depths if hybrid.enough_memory(depth, files, parsed.cache_type[0])]
        too_deep = [depth for depth in depths if depth not in fitting]
        for depth in too_deep:
            told.note(f"Not measured: depth {depth}: {hybrid.TOO_DEEP}")
        data: dict[str, Any] = {
            "models": [file.name for file in files],
            "cache_type": parsed.cache_type[0],
            "threads": max(self.threads),
            "seed": hybrid.SEED,
            "rows": [],
            "not_measured": dict.fromkeys(map(str, too_deep), hybrid.TOO_DEEP),
        }
        self.record["hybrid"] = data
        for row in hybrid.measure_hybrid(
            files, self.environments, fitting, parsed.cache_type[0], max(self.threads), told
        ):
            data["rows"].append(row)
            told.note("  ".join(hybrid_table(data)[len(data["rows"])]))
            self.keep()
        show("What the hybrid buys", hybrid_table(data))


def ways_in_memory(model: ModelFile, told: Reporter) -> tuple[Way, ...]:
    """The ways of running pristine for which memory is there. Raises `EngineError` where it is for none.

    Each build may hold a rearranged copy of the weights; `--repack 0` reads the file's own pages.
    """
    free = available_memory()
    if free is None or 3 * model.nbytes <= free:
        return PRISTINE
    wants = f"{model.nbytes / 1e9:.1f} GB of weights in each of two builds, {free / 1e9:.1f} GB of memory are free"
    if 2 * model.nbytes <= free:
        told.note(f"{wants}: pristine is measured without --repack 0")
        return tuple(way for way in PRISTINE if way.repack)
    raise EngineError(
        f"{model.path}: too large to compare builds here", found=wants, todo="choose a smaller model"
    )


def check_device(model: ModelFile, device: Device | None) -> None:
    """Raises `EngineError` where a device does not hold the model twice, once in each build's process."""
    if device is not None and 2 * model.nbytes > FREE_SHARE * device.free:
        raise EngineError(
            f"{model.path}: too large to compare builds on {device.name}, {device.description}",
            expected=f"{2 * model.nbytes / 1e9:.1f} GB of free memory, for the weights in each of two builds",
            found=f"{device.free / 1e9:.1f} GB",
            todo="choose a smaller model: fewer --layers or --experts, another --type",
        )


def environments(
    patched: Engine, pristine: Engine, libraries: Path | None, switch: str
) -> Mapping[str, Mapping[str, str]]:
    """How each build is loaded. switch: KIMI_OPS of ours if unset."""
    return {
        "patched": environment_of(patched.environment(), libraries, ours=True, switch=switch),
        "pristine": environment_of(pristine.environment(), None, ours=False),
    }


def check_disk(models: list[BenchModel], engine: Engine, told: Reporter) -> None:
    """Say what the generated files want, and stop where the disk does not have it. Raises `EngineError`."""
    needed = missing_bytes(models, engine)
    if not needed:
        return
    folder = bench_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    told.note(
        f"generated models want {needed / 1e9:.1f} GB of disk in {folder}, {free / 1e9:.0f} GB are free"
    )
    if needed > free:
        raise EngineError(
            "the disk is too small for the generated models",
            expected=f"{needed / 1e9:.1f} GB free in {folder}",
            found=f"{free / 1e9:.1f} GB",
            todo="make room, set KIMI_GGUF_CACHE, or choose fewer --layers, --experts or another --type",
        )
