"""Measures our operators and a model on a device, in stages that can be run alone and resumed.

Input: a device, or the CPU as one (`--rehearse`). Output: a text or a record for each stage in a folder, and a page.

A stage is finished if its output is complete and what it was made from is unchanged: the builds, the device, the model
and the command. The folder's file `stages.state` has both for every finished stage.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.bench.cli import seconds
from kimi_gguf.bench.device import find_device
from kimi_gguf.bench.device_operators import TIMED
from kimi_gguf.bench.files import atomically
from kimi_gguf.bench.runner import environment_of
from kimi_gguf.engine import build as building
from kimi_gguf.engine.archive import file_sha256
from kimi_gguf.engine.build_spec import make_build_spec
from kimi_gguf.engine.builds import Engine, cache_folder, ensure, load
from kimi_gguf.engine.errors import EngineError, UnfinishedError
from kimi_gguf.engine.progress import reporting
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.patches.pin import load_pin

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "llama.cpp.tar.xz"  # in a prepared folder, next to wheels/
LIMIT = 540.0  # seconds
FAILED, WRONG, UNFINISHED, INTERRUPTED = 1, 2, 3, 130
# Operator -> its cases that may have our kernels (a pattern; "": all), and those of a rehearsal.
TESTED = {
    "KDA_CONV": ("", ""),
    "KDA_SCAN": ("", ""),
    "LATENT_ATTN": ("", ""),
    "FLASH_ATTN_EXT": ("hsk=576,hsv=512", "hsk=576,hsv=512,.*kv=113,nb=1,"),
    "MUL_MAT": ("type_b=f32,.*n=1,k=", "type_a=q4_0,type_b=f32,.*n=1,k=256,"),
    "MUL_MAT_ID": ("type_b=f32,.*n=1,k=", "type_a=q4_0,type_b=f32,.*n=1,k=256"),
    "MUL_MAT_VEC_FUSION": ("", "type=q4_0,.*k=256"),
}
GROUPS = ("build", "test", "times", "model", "page")

EXAMPLES = """\
stages: build (patched, upstream), test and times (one for each operator), model (by depth and cache type), page.
A stage is repeated only if its output is incomplete, if the builds, the device, the model or its command changed, or
with --again. Each has --limit seconds; a build that reaches the limit continues when the command is run again, any
other stage starts again.

  tools/bench-gpu                            a generated model of eight layers of the 48B's shapes; half an hour is
                                             expected; no device has run all stages yet
  tools/bench-gpu MODEL.gguf                 your own model
  tools/bench-gpu --list                     what is finished, what is left
  tools/bench-gpu --stage build              one group of stages, or one stage: --stage test-KDA_SCAN
  tools/bench-gpu --total 570                stop after 570 s and list what is left; run it again to continue
  tools/bench-gpu --rehearse                 the same stages with small sizes, on the CPU as the device

For a machine without a network, prepare a folder, copy it and this checkout, and name it there:

  tools/bench-gpu --prepare out/gpu-source --python 3.12
  tools/bench-gpu --source out/gpu-source

The folder has llama.cpp and Python packages as wheels. Wheels of packages that the machine's Python has already can be
deleted. The machine needs a C++ compiler, and for CUDA the whole toolkit.

exit status: 0 all chosen stages are finished, 1 a stage failed, 2 wrong arguments or no device, 3 a time limit was
reached (what is left is listed), 130 interrupted."""


@dataclass(frozen=True)
class Stage:
    """A command whose output is a file of its name."""

    name: str
    words: tuple[
        str, ...
    ]  # the arguments of test-backend-ops or kimi-llama bench; for a build, --upstream or none

    @property
    def group(self) -> str:
        return self.name.partition("-")[0]


@dataclass(frozen=True)
class Place:
    """Where the stages compute."""

    backend: str
    out: Path
    rehearse: bool
    model: Path | None

    @property
    def page(self) -> Path:
        return self.out / "bench-gpu.md" if self.rehearse else ROOT / "docs" / "bench-gpu.md"

    @property
    def device(self) -> str | None:
        return "SECOND0" if self.rehearse else None


def stages(place: Place) -> list[Stage]:
    """All stages in their order, except the page."""
    found = [Stage("build-patched", ()), Stage("build-upstream", ("--upstream",))]
    for operator, patterns in TESTED.items():
        pattern = patterns[place.rehearse]
        only = ("-p", pattern) if pattern else ()
        found.append(Stage(f"test-{operator}", ("test", "-o", operator, *only)))
    bench = ["--backend", place.backend, *(("--device", place.device) if place.device else ())]
    bench += (
        ["--shapes", "tiny", "--layers", "4", "--experts", "8", "--threads", "1"] if place.rehearse else []
    )
    bench += ["--seconds", "0.01" if place.rehearse else "3"]
    found += [Stage(f"times-{each}", (*bench, "--operators", each)) for each in TIMED]
    if place.model is not None:
        bench.insert(0, str(place.model.resolve()))
    return found + [Stage(f"model-{name}", (*bench, *words.split())) for name, words in models(place)]


def models(place: Place) -> Iterator[tuple[str, str]]:
    """Names and arguments of the stages that measure the model."""
    batches, most, large, ubatch, deep = "1,2,4,8,512,2048,8192", "1,512", 8192, 2048, [65536, 131072]
    depth = 16384 if place.backend == "metal" else 8192
    if place.rehearse:
        batches, most, large, ubatch, deep, depth = "1,150", "1", 150, 64, [96], 64
    for each in (0, depth):
        yield f"{each}", f"--batch {batches} --depth {each}"
    yield f"ubatch-{ubatch}", f"--batch {large} --depth 0 --ubatch {ubatch}"
    for each in deep:
        yield f"{each}", f"--batch {most} --depth {each} --cache-type f16,q8_0"


class Campaign:
    """Runs stages and remembers which are finished."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.device = ""  # its description, once a stage needs it
        self.file = place.out / "stages.state"
        place.out.mkdir(parents=True, exist_ok=True)
        if not os.access(place.out, os.W_OK):
            raise EngineError(f"{place.out}: no file can be written there", todo="name another folder: --out")
        self.finished: dict[str, dict[str, Any]] = finished_stages(self.file)

    def engine(self, upstream: bool) -> Engine | None:
        """A finished build with its tests."""
        cache = building.Cache(cache_folder())
        found = load(cache.engines / make_build_spec(upstream, self.place.backend).key)
        return found if found is not None and found.tests else None

    def output(self, stage: Stage) -> Path:
        return self.place.out / f"{stage.name}.{'txt' if stage.group == 'test' else 'json'}"

    def inputs(self, stage: Stage) -> dict[str, Any] | None:
        """What the output is made from; None if the builds are missing."""
        engines = [
            self.engine(upstream) for upstream in ((False,) if stage.group == "test" else (False, True))
        ]
        if engines[0] is None or None in engines:
            return None
        model = self.place.model if stage.group == "model" else None
        facts = (
            None if model is None else [str(model.resolve()), model.stat().st_size, model.stat().st_mtime_ns]
        )
        builds = [engine.key for engine in engines if engine is not None]
        return {"builds": builds, "words": list(stage.words), "model": facts, "device": self.find(engines[0])}

    def find(self, engine: Engine) -> str:
        """The device's description. Raises `EngineError`."""
        if not self.device:
            if self.place.rehearse:
                folder = str(self.place.out.resolve())
                maker = [sys.executable, str(ROOT / "tests" / "support" / "native_program.py"), folder]
                made = subprocess.run(maker, stdout=subprocess.PIPE, text=True, check=False)
                if made.returncode:
                    raise EngineError(
                        "the device of --rehearse was not compiled", todo="see the messages above"
                    )
                os.environ["GGML_BACKEND_PATH"] = made.stdout.strip()
            environment = environment_of(engine, switch="")
            self.device = find_device(self.place.backend, environment, self.place.device).description
        return self.device

    def done(self, stage: Stage) -> bool:
        """Whether the stage's output is complete and what it is made from has not changed."""
        if stage.group == "build":
            return self.engine("--upstream" in stage.words) is not None
        found, output = self.finished.get(stage.name), self.output(stage)
        if not found or not output.is_file() or file_sha256(output) != found["sha256"]:
            return False
        return bool(found["inputs"] == self.inputs(stage))

    def run(self, stage: Stage, limit: float) -> None:
        """Run a stage. Raises `EngineError`, and `UnfinishedError` if it reaches the limit."""
        if stage.group == "build":
            ensure("--upstream" in stage.words, self.place.backend, tests=True, limit=limit)
            return
        inputs, output = self.inputs(stage), self.output(stage)
        if inputs is None:
            raise EngineError(
                f"{stage.name}: there is no build", todo="run the stage build first: --stage build"
            )
        part = output.with_name(f"{output.name}.part")
        if stage.group == "test":
            self.test(stage, limit, part)
        else:
            words = ("bench", *stage.words, "--json", str(part))
            call([sys.executable, "-P", "-m", "kimi_gguf.scripts.kimi_llama", *words], limit, stage.name)
        part.replace(output)
        self.finished[stage.name] = {"inputs": inputs, "sha256": file_sha256(output)}
        atomically(self.file, lambda part: part.write_text(json.dumps(self.finished, indent=1) + "\n"))

    def test(self, stage: Stage, limit: float, part: Path) -> None:
        """Test an operator on the device. Raises `EngineError` unless all cases pass."""
        engine = self.engine(upstream=False)
        assert engine is not None, "run() has checked it"
        operator = stage.words[2]
        program = str(engine.bin / "test-backend-ops")
        long = {} if self.place.rehearse else {"KIMI_LONG_CASES": "1"}
        try:
            call([program, *stage.words], limit, stage.name, part, GGML_NO_BACKTRACE="1", **long)
        except UnfinishedError:
            raise
        except EngineError as error:
            lines = part.read_text(errors="replace").splitlines()
            shown = [line for line in lines if "FAIL" in line][:5] or lines[-3:]
            raise EngineError(
                f"{operator} fails on the device",
                found="\n    ".join([error.what, *shown]),
                todo=f"see {part}",
            ) from None
        text = part.read_text(errors="replace")
        passed = next((line.split()[0] for line in text.splitlines() if "tests passed" in line), None)
        if passed is None:
            raise EngineError(
                f"{operator}: {part} does not say how many tests passed", todo="is the disk full?"
            )
        print(f"bench-gpu: {operator}: {passed} tests passed, {text.count('not supported')} not supported")

    def draw(self, records: Sequence[Path]) -> None:
        """Write the page."""
        words = ["bench", "--records", *map(str, records), "--page", str(self.place.page)]
        call([sys.executable, "-P", "-m", "kimi_gguf.scripts.kimi_llama", *words], LIMIT, "page")
        print(f"bench-gpu: see {self.place.page}")


def finished_stages(file: Path) -> dict[str, dict[str, Any]]:
    """The finished stages of a state file; none if it is missing or damaged, which is said."""
    try:
        found = json.loads(file.read_text())
        if isinstance(found, dict) and all({"inputs", "sha256"} <= set(each) for each in found.values()):
            return found
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        pass
    print(f"bench-gpu: {file}: damaged; all stages count as left", file=sys.stderr)
    return {}


def call(
    command: Sequence[str], limit: float, name: str, output: Path | None = None, **environment: str
) -> None:
    """Run a command for at most `limit` seconds. Raises `EngineError` if it fails or does not end."""
    with (output or Path(os.devnull)).open("w") as file:
        to = {} if output is None else {"stdout": file, "stderr": file}
        child = subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **to)  # type: ignore[call-overload]
        try:
            status = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            raise UnfinishedError(f"{name} did not end within {limit:.0f} s", todo="raise --limit") from None
        finally:
            if child.poll() is None:
                end(child)
    if status:
        raise EngineError(
            f"{name} ended with status {status}", todo=f"see above, or run {shlex.join(command)}"
        )


def end(child: subprocess.Popen[Any]) -> None:
    """End a process and those it started: ask, then kill."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=20)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def prepare(folder: Path, python: str) -> None:
    """Write the sources and the wheels that a machine without a network needs. Raises `EngineError`."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    with reporting() as reporter:
        cache = building.Cache(cache_folder())
        if not (folder / SOURCES).is_file():
            building.pack_source(load_pin(), cache, folder / SOURCES, reporter)
        reporter.phase(f"download wheels for Python {python}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["build"]]
    words = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--python-version", python]
    command = [sys.executable, "-P", "-m", "pip", "download", *words, "--dest", str(wheels), *wanted]
    if subprocess.run(command, check=False).returncode:
        raise EngineError(
            "pip could not download the wheels", todo="see its message above; check the network"
        )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"bench-gpu: {folder}: {size / 1e6:.0f} MB")


def chosen(all_stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages of these names or groups; all by default."""
    return [each for each in all_stages if not names or each.name in names or each.group in names]


def measure(campaign: Campaign, wanted: Sequence[Stage], options: argparse.Namespace) -> int:
    """Run the chosen stages that are not finished. Returns the exit status."""
    ends = time.monotonic() + options.total
    left: list[str] = []
    for stage in wanted:
        if not (options.again and stage.group != "build") and campaign.done(stage):
            print(f"bench-gpu: {stage.name}: finished before", flush=True)
            continue
        limit = min(options.limit, ends - time.monotonic())
        if limit <= 0:
            left.append(stage.name)
            continue
        print(f"bench-gpu: {stage.name}", flush=True)
        try:
            campaign.run(stage, limit)
        except UnfinishedError as error:
            print(f"bench-gpu: {error}", file=sys.stderr)
            left.append(stage.name)
            if stage.group == "build":  # what follows needs it
                left += [each.name for each in wanted[wanted.index(stage) + 1 :]]
                break
    if left:
        print(f"bench-gpu: left: {' '.join(left)}; run the same command again")
    return UNFINISHED if left else 0


def run(options: argparse.Namespace) -> int:
    """Do what the command line says. Returns the exit status."""
    if options.prepare is not None:
        prepare(options.prepare, options.python)
        return 0
    out = options.out or ROOT / "out" / ("gpu-rehearsal" if options.rehearse else "gpu")
    place = Place("cpu" if options.rehearse else options.backend, out, options.rehearse, options.model)
    every = stages(place)
    if unknown := set(options.stage) - {each.name for each in every} - set(GROUPS):
        names = " ".join([*GROUPS, *(each.name for each in every)])
        print(f"bench-gpu: error: no stage {unknown.pop()}; expected: {names}", file=sys.stderr)
        return WRONG
    if place.backend == "cuda" and shutil.which("nvidia-smi") is None and not options.list:
        print(
            "bench-gpu: error: no nvidia-smi, so no NVIDIA driver; --rehearse runs the stages on the CPU",
            file=sys.stderr,
        )
        return WRONG
    if options.source is not None:
        building.adopt_source(load_pin(), building.Cache(cache_folder()), options.source / SOURCES)
    wanted = chosen(every, options.stage)
    campaign = Campaign(place)
    if options.list:
        for stage in wanted:
            print(f"{stage.name:<24}{'finished' if campaign.done(stage) else 'left'}")
        return 0
    status = measure(campaign, wanted, options)
    measured = [each for each in every if each.group in ("times", "model")]
    records = [campaign.output(each) for each in measured if campaign.done(each)]
    if records and (not options.stage or "page" in options.stage):
        campaign.draw(records)
    elif options.stage == ["page"]:
        raise EngineError(f"{out}: no finished stage to draw", todo="run the stages times and model first")
    return status


def arguments_parser() -> argparse.ArgumentParser:
    """The command line."""
    usual = "metal" if sys.platform == "darwin" else "cuda"
    parser = argparse.ArgumentParser(
        prog="tools/bench-gpu",
        description="Test and time operators and a model on a device against upstream, and write docs/bench-gpu.md.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", type=Path, metavar="MODEL.gguf", help="a GGUF file (default: a generated model)")
    add(
        "--stage",
        action="append",
        default=[],
        metavar="NAME",
        help="run only this stage or group; repeatable",
    )
    add("--list", action="store_true", help="show which stages are finished, and run none")
    add("--again", action="store_true", help="repeat finished stages, except builds")
    add(
        "--limit",
        type=seconds,
        default=LIMIT,
        metavar="S",
        help="seconds for each stage (default: %(default)g)",
    )
    add(
        "--total",
        type=seconds,
        default=float("inf"),
        metavar="S",
        help="seconds for all stages (default: no limit)",
    )
    add("--rehearse", action="store_true", help="use small sizes and the CPU as the device")
    add("--backend", default=usual, choices=("cuda", "metal", "vulkan"), help="default here: %(default)s")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of the output (default: out/gpu of the checkout; with --rehearse out/gpu-rehearsal)",
    )
    add("--source", type=Path, metavar="FOLDER", help="use a prepared folder instead of the network")
    add("--prepare", type=Path, metavar="FOLDER", help="write such a folder, and run no stage")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    add(
        "--python",
        default=version,
        metavar="X.Y",
        help="the other machine's Python, for --prepare (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tools/bench-gpu. Returns the exit status."""
    parser = arguments_parser()
    options = parser.parse_args(arguments)
    if options.model is not None and not options.model.is_file():
        parser.error(f"{options.model}: no such file; expected a GGUF file")
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        return run(options)
    except (KimiError, OSError) as error:
        print(f"bench-gpu: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("bench-gpu: interrupted; finished stages are kept", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
