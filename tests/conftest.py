"""Fixtures that many tests share: the two llama.cpp builds and the demo model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from compiled import FOLDER, forget
from metal_program import compile_metal_backend

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.build_spec import make_build_spec
from kimi_gguf.engine.builds import Engine, cache_folder, ensure, load
from kimi_gguf.tools.cuda_check import patched_ggml

ROOT = Path(__file__).parent.parent

# What runs by default, what with `--tier ci`, and what only with `--tier full`: folders, the mark `full` of single
# cases, and whatever needs an upstream build.
TIERS = ("default", "ci", "full")
FOLDERS = {"devices": "ci", "platforms": "ci", "long": "full"}

# What each file takes, by tier: the number of cases and seconds. `--record-durations` replaces the entries of the files
# that it runs. A test process takes whole files, the long ones first, so that none is left alone with one at the end.
DURATIONS = ROOT / "tests" / "durations.json"

# A shell in the background starts its children with Ctrl-C ignored; the tests send Ctrl-C to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

# If an operator cannot be used, a test fails instead of running upstream's graph; tests of the fallback override this.
os.environ.setdefault("KIMI_OPS", "require")

# Operators on emulated devices are used without their own check, which test_verify.py tests.
os.environ.setdefault("KIMI_VERIFY_SECONDS", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=TIERS, default="full", help="the tests to run (scripts/test sets it)")
    parser.addoption("--record-durations", action="store_true", help="write tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the folders that the tier does not contain: they are not even imported."""
    return True if _is_after(FOLDERS.get(collection_path.name, "default"), config) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the tier does not contain; start with the files that take longest."""
    others = [item for item in items if _is_after(_tier(item), config)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
    for item in items:
        item.user_properties.append(("tier", _tier(item)))
    files = recorded().get(config.getoption("--tier"), {})
    items.sort(key=lambda item: -files.get(_name(item.nodeid), (0, 0.0))[1])


class Recorder:
    """Adds up the seconds of each file, and writes them when all tests have ended."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], tuple[int, float]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        key = (dict(report.user_properties)["tier"], _name(report.nodeid))
        cases, seconds = self._files.get(key, (0, 0.0))
        self._files[key] = (cases + (report.when == "call"), seconds + report.duration)

    def pytest_sessionfinish(self) -> None:
        tiers = recorded()
        for (tier, name), (cases, seconds) in self._files.items():
            tiers.setdefault(tier, {})[name] = (cases, round(seconds, 1))
        lines = (
            f"{json.dumps(tier)}: {{\n"
            + ",\n".join(f"{json.dumps(name)}: {json.dumps(files[name])}" for name in sorted(files))
            + "\n}"
            for tier in TIERS
            for files in [
                {name: file for name, file in tiers.get(tier, {}).items() if (ROOT / name).exists()}
            ]
        )
        DURATIONS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def recorded() -> dict[str, dict[str, tuple[int, float]]]:
    """By tier and by file's path: the number of cases, and seconds."""
    tiers: dict[str, dict[str, tuple[int, float]]] = json.loads(DURATIONS.read_text())
    return tiers


def _name(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _tier(item: pytest.Item) -> str:
    if item.get_closest_marker("full") or "upstream" in getattr(item, "fixturenames", ()):
        return "full"
    return FOLDERS.get(item.path.parent.name, "default")


def _is_after(tier: str, config: pytest.Config) -> bool:
    return TIERS.index(tier) > TIERS.index(config.getoption("--tier"))


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """This machine's cache; code in the tests sees a cache that contains only the two builds of the tests.

    What compilers make for the tests is shared by all runs. A build for a GPU, or one with other options, could
    otherwise be chosen instead of the build under test.
    """
    shared, own = cache_folder(), tmp_path_factory.mktemp("cache")
    (own / "engines").mkdir()
    for name in ("downloads", "sources"):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(shared / name)
    objects = shared / "test-objects"
    forget(objects)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(objects))
        patch.setenv("KIMI_GGUF_CACHE", str(own))
        patch.delenv("KIMI_BUILD", raising=False)
        for upstream in (False, True):
            place = shared / "engines" / make_build_spec(upstream).key
            if load(place):
                (own / "engines" / place.name).symlink_to(place)
        yield shared


@pytest.fixture(scope="session")
def engine(shared_cache: Path) -> Engine:
    """The patched llama.cpp with upstream's test programs, built on first use."""
    return _own_build(shared_cache, upstream=False)


@pytest.fixture(scope="session")
def upstream(shared_cache: Path) -> Engine:
    """Upstream llama.cpp, built with the same options."""
    return _own_build(shared_cache, upstream=True)


def _own_build(shared: Path, upstream: bool) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIMI_GGUF_CACHE", str(shared))
        built = ensure(upstream, tests=True)
    place = cache_folder() / "engines" / built.key
    if not place.exists():
        place.symlink_to(built.folder)
    own = load(place)
    assert own is not None
    return own


@pytest.fixture(scope="session")
def metal_backend(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the emulated Metal device MTL0; kernels are compiled when a test first uses them."""
    return compile_metal_backend(engine, patched_ggml("metal"), tmp_path_factory.mktemp("metal-backend"))


@pytest.fixture
def one_core() -> Iterator[None]:
    """Programs that the test starts see one processor, so that by default they use one thread.

    Waiting threads spin. If other tests keep the processors busy, two threads take more than twice as long as one.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = sorted(os.sched_getaffinity(0))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {before[worker % len(before)]})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """The trained demo checkpoint, hub layout."""
    return ROOT / "demo"


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory, demo_dir: Path) -> Callable[[str], Path]:
    """The demo as a GGUF file of a type such as F32; each is converted once."""
    folder = tmp_path_factory.mktemp("demo")

    @cache
    def make(kind: str) -> Path:
        convert(demo_dir, folder / f"demo-{kind}.gguf", TYPES[kind])
        return folder / f"demo-{kind}.gguf"

    return make
