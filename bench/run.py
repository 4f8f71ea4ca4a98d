"""Runs `kimi-llama bench`: prepares builds and models, measures, shows and writes the results.

Input: parsed arguments. Output: tables on standard output, progress on standard error, a record and a page if
requested. The record on disk is complete after every cell, also if the run is interrupted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kimi_gguf.bench import hybrid, page, report
from kimi_gguf.bench.ab_run import Result, Runners, Settings, measure, measure_fitting
from kimi_gguf.bench.cells import (
    DEVICE_THREADS,
    SIZES,
    THREADS,
    UPSTREAM,
    UPSTREAM_ON_DEVICE,
    Cell,
    Variant,
    grid,
)
from kimi_gguf.bench.device import Device, find_device
from kimi_gguf.bench.device_operators import TIMED, measure_device_operators
from kimi_gguf.bench.in_turns import FITS, measure_in_turns, variants_alone
from kimi_gguf.bench.manifest import manifests_beside, read_manifest
from kimi_gguf.bench.matmuls import measure_matmuls
from kimi_gguf.bench.models import ModelFile, check_room, convert_demo, generate, open_model
from kimi_gguf.bench.operators import libraries_of, measure_operators
from kimi_gguf.bench.record import add, cell_data, load, model_data, new_record, save
from kimi_gguf.bench.report import Data
from kimi_gguf.bench.roofline import Peaks, demand, mean_of, measure_device_peaks, measure_peaks
from kimi_gguf.bench.runner import MATMUL_SWITCHES, environment_of
from kimi_gguf.bench.shapes import TYPES, chosen_model
from kimi_gguf.bench.workers import check_reachable, measure_workers
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.engine.addresses import addresses
from kimi_gguf.engine.build_spec import CPU_BACKENDS
from kimi_gguf.engine.builds import Engine, ensure, exists_or_compiles, options_of, select
from kimi_gguf.engine.errors import EngineError, UsageError
from kimi_gguf.engine.limits import available_memory
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.engine.toolchain import cores

DEMO_TYPES = ("Q8_0", "BF16")
OPTIONS_ALONE = ("--threads", "--depth", "--build", "--backend")  # that one build is measured with
OPTIONS_OF_WORKERS = (
    "--workers", "--demo", "--type", "--family", "--layers", "--experts", "--shapes", "--quick", "--batch", "--depth",
    "--build", "--backend", "--threads", "--ubatch", "--cache-type", "--libraries",
)  # fmt: skip
OPTIONS_OF_GENERATED = ("--type", "--family", "--layers", "--experts", "--shapes")
FREE_SHARE = 0.95  # of a device's free memory that is used


def run(parsed: argparse.Namespace, words: list[str]) -> int:
    """Measure, or draw a page. words: the command line, for the record. Returns the exit status."""
    if "--products" in words:
        print("kimi-llama bench: --products is now --matmuls", file=sys.stderr)
        words = ["--matmuls" if word == "--products" else word for word in words]
    try:
        if not parsed.records:
            parsed.build = parsed.backend
            parsed.backend, parsed.defines = options_of(parsed.build)
        check(parsed, words)
        if measures_models(parsed) and not exists_or_compiles(True, parsed.backend, parsed.defines):
            return run_alone(parsed, words)
        if parsed.draw is not None:
            manifest = read_manifest(parsed.draw)
            page.write_page(
                manifest.selected(), manifest.page, manifest.title, parsed.draw.name, manifest.method
            )
            return 0
        if parsed.workers:
            workers = addresses(parsed.workers)
            check_reachable(workers)  # before a build and a model are made
            with reporting() as reporter:
                engine = chosen_build(parsed)
                for make in makers(parsed, engine, reporter):
                    measure_workers(parsed, workers, engine, open_model(make()))
            return 0
        records = [record for file in parsed.records or () for record in load(file)]
        records = records or [Run(parsed, words).all()]
        if parsed.record is not None and not parsed.records:
            add(records[0], parsed.record)
        if parsed.page is not None:
            page.write_page(records, parsed.page)
        return 0
    except ConvertError as error:
        raise EngineError(str(error)) from None


def shown_command(words: Sequence[str]) -> str:
    """The command line without folders, and without `--record FILE`, which a manifest's commands do not have."""
    shown, rest = ["kimi-llama"], iter(words)
    for word in rest:
        if word == "--record":
            next(rest, None)
        elif not word.startswith("--record="):
            shown.append(Path(word).name if "/" in word else word)
    return " ".join(shown)


def other_options(words: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """The options of a command line that are not allowed."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [option for option in options if option not in allowed]


def check_workers(parsed: argparse.Namespace, words: Sequence[str]) -> None:
    """Raises `UsageError` for what --workers would ignore: it prints a table, with a fixed number of decodes."""
    if refused := other_options(words, OPTIONS_OF_WORKERS):
        raise UsageError(
            "--workers measures with fewer options, and makes no record",
            expected=f"no options but {', '.join(OPTIONS_OF_WORKERS)}",
            found=", ".join(refused),
            todo="leave them out",
        )
    for option, values in (("--threads", parsed.threads or ()), ("--cache-type", parsed.cache_type)):
        if len(values) > 1:
            values_given = ",".join(map(str, values))
            raise UsageError(
                f"--workers: expected one value of {option}, found {values_given}", todo="give one"
            )


def check(parsed: argparse.Namespace, words: Sequence[str]) -> None:
    """Check what argparse cannot. words: the command line. Raises `EngineError`, for wrong arguments `UsageError`."""
    if parsed.workers:
        check_workers(parsed, words)
    if parsed.records and parsed.page is None:
        raise UsageError(
            "--records measures nothing and needs --page", todo="name the page: --page out/bench.md"
        )
    if parsed.page is not None and not parsed.records and parsed.page.exists():
        raise EngineError(
            f"{parsed.page}: a run does not overwrite a page",
            todo="add the run with --record, then draw the page of all records: --draw or --records",
        )
    if parsed.page is not None and any(
        manifest.page.resolve() == parsed.page.resolve() for manifest in manifests_beside(parsed.page)
    ):
        raise EngineError(f"{parsed.page}: this page has a manifest", todo="write it with --draw")
    if parsed.json is not None and parsed.json.exists() and len(load(parsed.json)) != 1:
        raise EngineError(
            f"{parsed.json}: not the record of one run: --json would replace all of them",
            todo="add to it with --record, or name another file",
        )
    for file in (parsed.json, parsed.page, parsed.record):
        if file is not None and not file.parent.is_dir():
            raise EngineError(f"{file}: its folder does not exist", todo=f"make it: mkdir -p {file.parent}")
    if parsed.libraries is not None and not any(parsed.libraries.glob("*llama.*")):
        raise EngineError(
            f"{parsed.libraries}: no libraries of a build",
            expected="libllama in it",
            todo="give the folder of a build's shared libraries",
        )
    of_cpu = (parsed.hybrid, parsed.matmuls, parsed.operators and parsed.libraries)
    if parsed.operators and parsed.operators != TIMED and not on_device(parsed):
        raise UsageError(
            "single operators are chosen on a device only", todo="leave out the name after --operators"
        )
    if on_device(parsed) and any(of_cpu):
        raise UsageError(
            "--hybrid, --matmuls and --operators --libraries are measured on the CPU only",
            todo="leave out --backend and --device",
        )
    if parsed.matmuls and any(value is not None for value in (parsed.type, parsed.batch, parsed.depth)):
        raise UsageError(
            "--matmuls measures fixed types and shapes", todo="leave out --type, --batch and --depth"
        )
    if parsed.model is not None:
        open_model(parsed.model)  # before builds are made
        if ignored := [option for option in other_options(words, ()) if option in OPTIONS_OF_GENERATED]:
            raise UsageError(
                f"{parsed.model} is measured as it is",
                expected="no options of a generated model",
                found=", ".join(ignored),
                todo="leave them out, or leave out the file",
            )
    if parsed.demo and parsed.type and not set(parsed.type) <= set(DEMO_TYPES):
        raise UsageError(f"--demo: expected --type {' or '.join(DEMO_TYPES)}, found {','.join(parsed.type)}")


def chosen_build(parsed: argparse.Namespace, upstream: bool = False) -> Engine:
    """The build that runs, as for every other command, or upstream with the same options; its label is printed."""
    tests = on_device(parsed) and parsed.operators
    # both builds of a device are made by the same compilers, which select() does not ask for
    if upstream or tests or (on_device(parsed) and parsed.build == parsed.backend):
        engine = ensure(upstream, parsed.backend, tests=tests, defines=parsed.defines)
    else:
        engine = select(parsed.build)
    print(f"kimi-llama: build {engine.label()}", file=sys.stderr)
    return engine


def measures_models(parsed: argparse.Namespace) -> bool:
    """Whether the command needs builds of llama.cpp, and compares them."""
    return not parsed.records and parsed.draw is None and not parsed.workers


def run_alone(parsed: argparse.Namespace, words: Sequence[str]) -> int:
    """Measure the patched build with llama-bench: upstream is not built, and there is no compiler to build it.

    Returns the exit status. Raises `EngineError` for options that llama-bench would not get. A record compares builds,
    so there is none of one build.
    """
    missing = "upstream llama.cpp is not built, and there is no C++ compiler to build it for the comparison"
    if parsed.model is None:
        raise EngineError(
            missing,
            todo="install a compiler (kimi-llama doctor), or give a GGUF file to measure it without upstream",
        )
    if refused := other_options(words, OPTIONS_ALONE):
        raise EngineError(
            missing,
            expected=f"no options but {', '.join(OPTIONS_ALONE)}: one build is measured, which makes no record",
            found=", ".join(refused),
            todo="install a compiler (kimi-llama doctor), or leave them out",
        )
    if "," in str(parsed.model):
        raise EngineError(
            f"{parsed.model}: llama-bench reads this as several names",
            todo="rename it, or run the command in the file's folder, so that the name has no comma",
        )
    print(f"kimi-llama: {missing}: llama-bench measures the patched build alone", file=sys.stderr)
    engine = chosen_build(parsed)
    command = [str(engine.bin / "llama-bench"), "-m", str(parsed.model), "-fa", "1"]
    for option, values in (("-t", parsed.threads or [cores()]), ("-d", parsed.depth)):
        command += [option, ",".join(map(str, values))] if values else []
    sys.stdout.flush()
    return subprocess.run(command, check=False).returncode


def on_device(parsed: argparse.Namespace) -> bool:
    """Whether a GPU computes, not the CPU."""
    return parsed.backend not in CPU_BACKENDS or parsed.device is not None


class Run:
    """One measuring run."""

    def __init__(self, parsed: argparse.Namespace, words: list[str]) -> None:
        self.parsed = parsed
        self.began = time.monotonic()
        gpu = on_device(parsed)
        for name in filter(os.environ.get, MATMUL_SWITCHES):
            print(
                f"kimi-llama bench: {name} has no effect: patched is measured with its default",
                file=sys.stderr,
            )
        self.patched, self.upstream = (chosen_build(parsed, upstream) for upstream in (False, True))
        # on a device patched runs with the default KIMI_OPS: fallbacks are allowed and reported
        self.environments = {
            "patched": environment_of(self.patched, parsed.libraries, "" if gpu else "require"),
            "upstream": environment_of(self.upstream),
        }
        patched = self.environments["patched"]
        self.device = find_device(parsed.backend, patched, parsed.device) if gpu else None
        switch = patched["KIMI_OPS"]
        builds = {"patched": self.patched, "upstream": self.upstream}
        self.record = new_record(shown_command(words), builds, parsed.libraries, switch, self.device)
        self.threads: tuple[int, ...] = parsed.threads or (
            (min(DEVICE_THREADS, cores()),) if gpu else THREADS if parsed.grid else (cores(),)
        )

    def all(self) -> Data:
        """Measure what was requested; return the record."""
        with reporting() as reporter:
            if self.parsed.operators and self.device is not None:
                self.device_operators(self.device, reporter)
            elif self.parsed.operators:
                self.operators(reporter)
            elif self.parsed.matmuls:
                self.matmuls(reporter)
            elif self.parsed.hybrid:
                self.hybrid(reporter)
            else:
                self.models(reporter)
        self.keep()
        return self.record

    def keep(self) -> None:
        """Write the record so far."""
        if self.parsed.json is not None:
            save([self.record], self.parsed.json)

    def models(self, reporter: Reporter) -> None:
        """Cells of each model."""
        parsed = self.parsed
        files = makers(parsed, self.upstream, reporter)
        name = self.device.name if self.device else None
        on_machine = self.peaks(reporter) if self.device is None else {}
        on_gpu = self.device_peaks(self.device, reporter) if self.device else None
        batches, depths = SIZES[parsed.grid, self.device is not None]
        cells = grid(
            parsed.cache_type, parsed.sequences, parsed.depth or depths, self.threads, parsed.batch or batches,
            parsed.ubatch, name,
        )  # fmt: skip
        for make in files:
            model = open_model(make())
            check_device(model, self.device)
            with Runners(model, self.environments, reporter, max(self.threads), name) as runners:
                data = model_data(model, runners)
                self.record["models"].append(data)
                for result, peaks in self.results(runners, cells, on_machine, on_gpu):
                    cell = cell_data(result, demand(model, result.cell), peaks)
                    data["cells"].append(cell)
                    reporter.note("  ".join(report.cell_row(cell)))
                    self.keep()
            for line in report.not_measured_lines(data):
                reporter.note(line)
            if data["cells"]:
                report.show(f"{model.name}, {model.nbytes / 1e9:.2f} GB", report.cells_table(data["cells"]))
                print(report.verdict(data["cells"]))
                report.show("Memory, MiB", report.memory_table(data))
                if data["about"]["resident"]:
                    report.show("One process at a time", report.turns_table(data))

    def results(
        self, runners: Runners, cells: list[Cell], on_machine: dict[int, Peaks], on_gpu: Peaks | None
    ) -> Iterator[tuple[Result, Peaks | None]]:
        """Measure the cells of a loaded model, each with its peak rates. on_machine: the latest, by threads; updated.
        on_gpu: the peak rates of the device."""
        settings = Settings(self.parsed.seconds, self.began + self.parsed.budget, self.parsed.rounds)
        if self.device is None:
            upstream = () if self.parsed.in_turns else variants_in_memory(runners.model, runners.reporter)
            if not upstream:
                yield from self.results_in_turns(runners, cells, settings, on_machine)
                return
            without = (variant.name for variant in UPSTREAM if variant not in upstream)
            runners.about.left_out |= dict.fromkeys(without, "there is not enough free memory")
            for result in measure(runners, cells, upstream, settings):
                yield result, self.peaks_around(result.cell.threads, on_machine)
            return
        room = int(FREE_SHARE * self.device.free) - 2 * runners.model.nbytes
        for result in measure_fitting(runners, cells, UPSTREAM_ON_DEVICE, settings, room):
            yield result, on_gpu

    def results_in_turns(
        self, runners: Runners, cells: list[Cell], settings: Settings, on_machine: dict[int, Peaks]
    ) -> Iterator[tuple[Result, Peaks]]:
        """Measure the cells one process at a time. The peak rates of all cells: the mean of those before the first turn
        and after each. While a process is loaded, there may be no memory to measure them."""
        chosen, free = alone_in_memory(runners), available_memory()
        in_memory = free is None or runners.model.nbytes <= FITS * free
        peaks_of = {threads: [peaks] for threads, peaks in on_machine.items()}

        def after_turn() -> None:
            for threads, several in peaks_of.items():
                on_machine[threads] = self.peaks_again(threads)
                several.append(on_machine[threads])

        results = measure_in_turns(runners, cells, chosen, settings, in_memory, after_turn)
        runners.about.peaks += [vars(peaks) for several in peaks_of.values() for peaks in several]
        for result in results:
            yield result, mean_of(peaks_of[result.cell.threads])

    def peaks(self, reporter: Reporter) -> dict[int, Peaks]:
        """Measure, show and record them."""
        reporter.phase("measuring the peak rates of the machine")
        peaks = {threads: measure_peaks(threads, seconds=self.parsed.seconds) for threads in self.threads}
        self.record["limits"] = [vars(rates) for rates in peaks.values()]
        report.show("Peak rates of the machine", report.peaks_table(self.record["limits"]))
        return peaks

    def peaks_around(self, threads: int, peaks: dict[int, Peaks]) -> Peaks:
        """Peak rates for a cell: the mean of those before and after it. The latter replace the former in `peaks`.

        If other machines share the memory, its bandwidth changes from minute to minute.
        """
        before, peaks[threads] = peaks[threads], self.peaks_again(threads)
        return mean_of([before, peaks[threads]])

    def peaks_again(self, threads: int) -> Peaks:
        """Measure them once."""
        return measure_peaks(threads, times=1, seconds=self.parsed.seconds)

    def device_peaks(self, device: Device, reporter: Reporter) -> Peaks | None:
        """Measure, show and record them."""
        reporter.phase(f"measuring the peak rates of {device.name}")
        peaks = measure_device_peaks(device.name, self.upstream.lib, self.parsed.seconds)
        if peaks is None:
            reporter.note(f"{device.name}: no roofline: it does not support a copy or a matmul")
        else:
            self.record["limits"] = [vars(peaks)]
            report.show(f"Peak rates of {device.description}", report.device_peaks_table(vars(peaks)))
        return peaks

    def device_operators(self, device: Device, reporter: Reporter) -> None:
        """Time single operators on a device."""
        rows = self.record["device_operators"]
        engines, small = {"upstream": self.upstream, "patched": self.patched}, self.parsed.shapes == "tiny"
        for timed in measure_device_operators(engines, device.name, self.parsed.operators, small, reporter):
            rows += timed
            self.keep()
        for operator, table in page.device_operators_tables(rows):
            report.show(f"{operator} on {device.description}", table)

    def operators(self, reporter: Reporter) -> None:
        """Time single operators."""
        libraries = libraries_of(self.patched, self.upstream, self.parsed.libraries)
        for row in measure_operators(libraries, max(self.threads), reporter):
            self.record["operators"].append(row)
            reporter.note("  ".join(page.operators_table([row])[1]))
            self.keep()
        report.show("Single operators", page.operators_table(self.record["operators"]))

    def matmuls(self, reporter: Reporter) -> None:
        """Time single matmuls with each number of threads."""
        libraries = libraries_of(self.patched, self.upstream, self.parsed.libraries)
        for threads in self.threads:
            for row in measure_matmuls(libraries, threads, reporter):
                self.record["matmuls"].append(row)
                reporter.note("  ".join(page.matmuls_table([row])[1]))
                self.keep()
        report.show("Single matmuls", page.matmuls_table(self.record["matmuls"]))

    def hybrid(self, reporter: Reporter) -> None:
        """Compare the hybrid with the all-MLA model."""
        parsed = self.parsed
        cache_type, threads = parsed.cache_type[0], max(self.threads)
        sizes = (parsed.layers, parsed.experts, (parsed.type or TYPES)[0], parsed.shapes)
        models = [chosen_model(family, *sizes) for family in ("kimi-linear", "all-mla")]
        check_room(models, self.upstream, reporter)
        files = [open_model(generate(model, self.upstream, reporter)) for model in models]
        depths = sorted(depth for depth in parsed.depth or hybrid.DEPTHS if depth > 0)
        fitting = [depth for depth in depths if hybrid.enough_memory(depth, files, cache_type)]
        too_deep = [depth for depth in depths if depth not in fitting]
        for depth in too_deep:
            reporter.note(f"Not measured: depth {depth}: {hybrid.TOO_DEEP}")
        data: Data = {
            "models": [file.name for file in files], "cache_type": cache_type, "threads": threads,
            "seed": hybrid.SEED, "rows": [], "not_measured": dict.fromkeys(map(str, too_deep), hybrid.TOO_DEEP),
        }  # fmt: skip
        self.record["hybrid"] = data
        for row in hybrid.measure_hybrid(files, self.environments, fitting, cache_type, threads, reporter):
            data["rows"].append(row)
            reporter.note("  ".join(page.hybrid_table(data)[len(data["rows"])]))
            self.keep()
        report.show("Hybrid against all MLA", page.hybrid_table(data))


def makers(parsed: argparse.Namespace, engine: Engine, reporter: Reporter) -> list[Callable[[], Path]]:
    """For each model file, a function that makes it. Checks the disk space for generated models first."""
    if parsed.model is not None:
        return [lambda: parsed.model]
    if parsed.demo:
        return [lambda t=kind: convert_demo(t, reporter) for kind in parsed.type or DEMO_TYPES[:1]]  # type: ignore[misc]
    types = parsed.type or (TYPES if parsed.grid else TYPES[:1])
    sizes = (parsed.layers, parsed.experts)
    models = [chosen_model(parsed.family, *sizes, kind, parsed.shapes) for kind in types]
    check_room(models, engine, reporter)
    return [lambda m=model: generate(m, engine, reporter) for model in models]  # type: ignore[misc]


def variants_in_memory(model: ModelFile, reporter: Reporter) -> tuple[Variant, ...]:
    """The variants of upstream that fit in memory together with patched; none if only one process fits.

    Upstream holds a copy of the weights; patched and `--repack 0` read the mapped file.
    """
    free = available_memory()
    if free is None or 2 * model.nbytes <= free:
        return UPSTREAM
    reporter.note(
        f"{model.nbytes / 1e9:.1f} GB of weights, mapped and copied by upstream, {free / 1e9:.1f} GB of memory are "
        "free: the builds are loaded one after the other, twice"
    )
    return ()


def alone_in_memory(runners: Runners) -> tuple[Variant, ...]:
    """The variants that fit in memory alone; the others are recorded with the reason."""
    free, nbytes = available_memory() or 0, runners.model.nbytes
    chosen = variants_alone(nbytes, free)
    reason = (
        f"the copy of {nbytes / 1e9:.1f} GB of weights does not fit in {free / 1e9:.1f} GB of free memory"
    )
    without = (variant.name for variant in UPSTREAM if variant not in chosen)
    runners.about.left_out |= dict.fromkeys(without, reason)
    return chosen


def check_device(model: ModelFile, device: Device | None) -> None:
    """Raises `EngineError` if the model does not fit twice on the device, once for each build."""
    if device is not None and 2 * model.nbytes > FREE_SHARE * device.free:
        raise EngineError(
            f"{model.path}: too large to compare builds on {device.name}, {device.description}",
            expected=f"{2 * model.nbytes / 1e9:.1f} GB of free memory, for the weights in each of two builds",
            found=f"{device.free / 1e9:.1f} GB",
            todo="choose a smaller model: fewer --layers or --experts, another --type",
        )
