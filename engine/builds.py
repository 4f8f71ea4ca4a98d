"""The builds of llama.cpp in the cache: `ensure()` makes one, `find()` and `select()` name the one that runs.

Input: the requested build (patched or upstream, backend, options). Output: `Engine`, a frozen description of a
folder with bin/, lib/ and the Python package llama_cpp that loads the same libraries.
Patched and upstream libraries have the same names: never load both into one process.

A build has a name: its backend and the options that differ from the defaults, as in `cpu`, `cuda` or
`cpu+GGML_NATIVE=OFF`. An installed wheel may contain a build for all CPUs, which is named `wheel`. The build that runs
is, in this order, the one that the caller names, the one in KIMI_BUILD, the one that `kimi-llama use` wrote into the
cache, the wheel's, and `cpu`, which `kimi-llama build` makes. Of builds with one name, it is one that was made with the
variables of the present environment, such as CXXFLAGS; of several, the latest.
"""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kimi_gguf.engine.build import Cache, build, build_lock, pinned_source, read_manifest
from kimi_gguf.engine.build_spec import (
    BACKENDS,
    CPU_BACKENDS,
    OPTIONS,
    make_build_spec,
    processor,
    provenance,
)
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import reporting
from kimi_gguf.engine.toolchain import build_variables, find_compilers
from kimi_gguf.patches.pin import load_pin

__all__ = [
    "DEFAULT", "VARIABLE", "Engine", "EngineError", "builds", "cache_folder", "cpu_library", "ensure",
    "exists_or_compiles", "find",
    "load", "options_of", "select", "upstream_source", "use",
]  # fmt: skip

VARIABLE = "KIMI_BUILD"
DEFAULT = "cpu"
WHEEL = "wheel"  # the build inside the installed package
PREBUILT = Path(__file__).with_name("prebuilt")  # its folder
SHORT_KEY = 8  # characters of a key in printed text; four or more are enough to name a build

# Functions of libggml-cpu that report an instruction set it was compiled for, and the printed name.
_INSTRUCTIONS = {
    "avx512": "AVX512", "avx512_vnni": "VNNI", "avx512_bf16": "BF16", "avx512_vbmi": "VBMI",
    "amx_int8": "AMX", "avx2": "AVX2", "avx_vnni": "AVX-VNNI", "avx": "AVX", "sse3": "SSE3",
    "sve": "SVE", "matmul_int8": "I8MM", "dotprod": "DOTPROD", "neon": "NEON",
    "riscv_v": "RVV", "vsx": "VSX", "vxe": "VXE",
}  # fmt: skip
_IMPLIED = {"AVX512": {"AVX2", "AVX", "SSE3"}, "AVX2": {"AVX", "SSE3"}, "AVX": {"SSE3"}}
_PROBE = """
import ctypes, pathlib, sys
folder = pathlib.Path(sys.argv[1])
load = lambda name: ctypes.CDLL(str(folder / name))
bases = [load(path.name) for path in folder.glob("libggml-base.*")]  # not those of LD_LIBRARY_PATH
names = sorted(path.name for path in folder.glob("libggml-cpu*"))
best = names[0] if len(names) == 1 else max(names, key=lambda name: load(name).ggml_backend_score())
print(best)
print(*(name for name in sys.argv[2:] if getattr(load(best), "ggml_cpu_has_" + name, int)()))
"""


@dataclass(frozen=True)
class Engine:
    """A finished build of llama.cpp. Texts that users read, and variables of a folder, say build."""

    key: str
    folder: Path  # holds bin/, lib/, python/, manifest.json, build.log
    is_upstream: bool
    backends: tuple[str, ...]
    manifest: Mapping[str, Any]

    @property
    def bin(self) -> Path:
        """Folder of the programs."""
        return self.folder / "bin"

    @property
    def lib(self) -> Path:
        """Folder of the shared libraries."""
        return self.folder / "lib"

    @property
    def tests(self) -> bool:
        """Whether upstream's test programs are in `bin`."""
        return bool(self.manifest["tests"])

    @property
    def for_gpus(self) -> bool:
        """Whether the build computes on a GPU."""
        return self.backends[0] not in CPU_BACKENDS

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The CMake settings that differ from the defaults of this backend."""
        defaults = {**OPTIONS, **BACKENDS[self.backends[0]]}
        options: Mapping[str, str] = self.manifest["options"]
        return tuple(item for item in sorted(options.items()) if defaults.get(item[0]) != item[1])

    @property
    def name(self) -> str:
        """The name in printed text: the backend and the settings that differ from the defaults."""
        if self.folder == PREBUILT:
            return WHEEL
        return "+".join([self.backends[0], *(f"{name}={value}" for name, value in self.defines)])

    @property
    def variables(self) -> dict[str, str]:
        """The variables of the environment that changed the build, such as CXXFLAGS; empty for most builds."""
        return dict(self.manifest.get("environment", {}))

    def instructions(self) -> str:
        """The instruction sets of the CPU backend, such as `native: AVX512 VNNI` or `portable: AVX2`."""
        native = self.manifest["options"].get("GGML_NATIVE") == "ON"
        _, words = _probe(self.lib)
        names = [_INSTRUCTIONS[word] for word in words]
        implied = {less for name in names for less in _IMPLIED.get(name, ())}
        shown = [name for name in names if name not in implied]
        return f"{'native' if native else 'portable'}: {' '.join(shown) or 'instruction set unknown'}"

    def label(self) -> str:
        """One line of text: name, key, instruction set, and the variables that changed the build."""
        kind = "upstream " if self.is_upstream else ""
        return f"{kind}{self.name} {self.key[:SHORT_KEY]} ({'; '.join([self.instructions(), *self._with()])})"

    def short_label(self) -> str:
        """Name, key, and the variables that changed the build."""
        return f"{self.name} ({'; '.join([self.key[:SHORT_KEY], *self._with()])})"

    def _with(self) -> list[str]:
        """Such as ["with CXXFLAGS='-O0 -g'"]; empty if no variables changed the build."""
        words = [f"{name}={shlex.quote(text)}" for name, text in self.variables.items()]
        return [f"with {' '.join(words)}"] if words else []

    def environment(self) -> dict[str, str]:
        """The environment for a Python process that imports llama_cpp from this build."""
        paths = [str(self.folder / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "LLAMA_CPP_LIB_PATH": str(self.lib), "PYTHONPATH": os.pathsep.join(paths)}


def cpu_library(libraries: Path) -> Path:
    """The CPU backend in a build's folder of libraries; of several variants the one that ggml loads on this machine."""
    return _probe(libraries)[0]


@functools.cache
def _probe(folder: Path) -> tuple[Path, list[str]]:
    """The library of the CPU backend that runs here, and the instruction sets it was compiled for.

    In a separate process: this one must not load the libraries of two builds.
    """
    command = [sys.executable, "-I", "-S", "-c", _PROBE, str(folder), *_INSTRUCTIONS]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    library, _, words = output.partition("\n")
    return folder / library, words.split()


def cache_folder() -> Path:
    """The folder of the cache: KIMI_GGUF_CACHE, or kimi-gguf in the user's cache folder. Raises `EngineError` for a
    user without a home."""
    chosen = os.environ.get("KIMI_GGUF_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser().resolve()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "kimi-gguf"
    except RuntimeError:  # no HOME, and no user with this number or name
        raise EngineError(
            "there is no folder for the cache",
            expected="KIMI_GGUF_CACHE or HOME in the environment",
            found=f"KIMI_GGUF_CACHE={chosen}, a home that does not exist" if chosen else "neither",
            todo="set KIMI_GGUF_CACHE to a folder",
        ) from None


def ensure(
    upstream: bool = False,
    backend: str = "cpu",
    tests: bool = False,
    source: Path | None = None,
    archive: Path | None = None,
    defines: tuple[tuple[str, str], ...] = (),
    limit: float | None = None,
) -> Engine:
    """The requested build; it is built now if it does not exist (this takes minutes).

    upstream: the same sources and options without the patches. backend: cpu, cuda, metal or vulkan.
    tests: with upstream's test programs. source: a llama.cpp checkout instead of the pinned archive.
    archive: the pinned archive, if it is on disk already. defines: further CMake settings. limit: seconds of compiling,
    after which it raises `UnfinishedError`; calling it again continues.
    Progress is shown on standard error. Raises `EngineError`; an unfinished build never has its final name.
    """
    spec = make_build_spec(upstream, backend, source, defines)
    cache = Cache(cache_folder())
    _check_runs_programs(cache.root)
    folder = cache.engines / spec.key
    engine = load(folder)
    if engine is None or (tests and not engine.tests):
        with reporting() as reporter:
            build(spec, cache, archive, tests, reporter, limit)
        engine = load(folder)
        assert engine is not None, folder
    return engine


def _check_runs_programs(folder: Path) -> None:
    """Raise `EngineError` if the file system of `folder`, or of its first parent that exists, runs no programs."""
    present = next(path for path in (folder, *folder.parents) if path.exists())
    if os.statvfs(present).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise EngineError(
            folder,
            expected="a file system that runs programs",
            found="one that is mounted noexec",
            todo="set KIMI_GGUF_CACHE to a folder on another file system, or mount this one with exec",
        )


def exists_or_compiles(upstream: bool, backend: str, defines: tuple[tuple[str, str], ...]) -> bool:
    """Whether a build with these options exists, or could be made: there are compilers."""
    try:
        find_compilers(backend)
    except EngineError:
        return any(e.backends[0] == backend and e.defines == defines for e in builds(upstream))
    return True


def find(name: str | None = None, upstream: bool = False) -> Engine | None:
    """The build that runs, or None if it does not exist and `select` can make it.

    name: a build's name, or the first characters of its key; by default, see the module's docstring.
    Raises `EngineError` if it is missing and other builds could be meant.
    """
    wanted, origin = _wanted(name, upstream)
    present = builds(upstream)
    named = [e for e in present if wanted == e.name or (len(wanted) >= 4 and e.key.startswith(wanted))]
    if len(named) > 1:  # equal options, but other variables or compilers
        here = dict(build_variables(named[0].backends[0]))
        return max(named, key=lambda e: (e.variables == here, str(e.manifest["built"])))
    if named:
        return named[0]
    if wanted in BACKENDS and not any(not origin or e.backends[0] == wanted for e in present):
        return None
    finished = ", ".join(e.short_label() for e in present) or "none"
    known = wanted.split("+")[0] in BACKENDS
    make = ("make it: " if known else "make the default: ") + _command(wanted if known else DEFAULT, upstream)
    choose = "name one of them: --build NAME, KIMI_BUILD=NAME or kimi-llama use NAME"
    raise EngineError(
        f"no build named {wanted}{origin}; finished builds of this version for this machine: {finished}",
        todo=f"{make}, or {choose}" if present else make,
    )


def select(name: str | None = None, upstream: bool = False, make: bool = True) -> Engine:
    """The build that runs, as in `find`. If the default one does not exist and `make` allows it, it is made now."""
    engine = find(name, upstream)
    if engine is not None:
        _check_runs_programs(engine.folder)
        return engine
    wanted, origin = _wanted(name, upstream)
    if not make or wanted != DEFAULT:
        raise EngineError(
            f"build {wanted}{origin}: it is not built yet", todo=f"make it: {_command(wanted, upstream)}"
        )
    with reporting() as reporter:
        kind = "upstream llama.cpp" if upstream else "the patched llama.cpp"
        reporter.note(f"{kind} is not built yet: building it now, once; this takes minutes")
    return ensure(upstream)


def options_of(name: str | None = None) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Backend and further CMake settings of the build that runs, whether it exists or not."""
    engine = find(name)
    return (engine.backends[0], engine.defines) if engine else (_wanted(name)[0], ())


def use(name: str) -> Engine:
    """Make a finished build the one that runs if none is named. The choice is stored in the cache."""
    engine = select(name, make=False)
    # variables may be others next time
    kept = engine.name if find(engine.name) == engine and not engine.variables else engine.key
    _choice().parent.mkdir(parents=True, exist_ok=True)  # with a wheel, nothing else may have made it
    part = _choice().with_suffix(f".{os.getpid()}")
    part.write_text(kept + "\n", encoding="utf-8")
    part.replace(_choice())
    return engine


def _wanted(name: str | None, upstream: bool = False) -> tuple[str, str]:
    """The name of the build that runs, and where it was set (empty for the default)."""
    wanted, origin = _named(name)
    return (DEFAULT if upstream and wanted == WHEEL else wanted), origin  # a wheel has no upstream build


def _named(name: str | None) -> tuple[str, str]:
    if name:
        return name, " (named on the command line)"
    if variable := os.environ.get(VARIABLE):
        return variable, f" (named by {VARIABLE})"
    if (
        _visible(_choice())
        and _choice().is_file()
        and (chosen := _choice().read_text(encoding="utf-8", errors="replace").strip())
    ):
        return chosen, " (named by kimi-llama use)"
    return (WHEEL if prebuilt() else DEFAULT), ""


def _visible(path: Path) -> bool:
    """Whether the path exists. Where this user may not look, as in the home of another one, there is nothing for it."""
    with suppress(PermissionError):
        return path.exists()
    return False


def _choice() -> Path:
    """The file that `kimi-llama use` writes."""
    return cache_folder() / "build-in-use"


def _command(name: str, upstream: bool) -> str:
    """The command that makes the build with this name."""
    backend, *defines = name.split("+")
    words = ["--upstream"] if upstream else []
    words += ["--backend", backend] if backend != DEFAULT else []
    words += [f"-D {define}" for define in defines]
    return " ".join(["kimi-llama build", *words])


def builds(upstream: bool = False) -> list[Engine]:
    """All finished builds of the current pin, series and processor, with any options."""
    wanted, cache = provenance(upstream), Cache(cache_folder())
    folders = sorted(cache.engines.glob("[0-9a-f]*")) if _visible(cache.engines) else []
    engines = [engine for folder in (PREBUILT, *folders) if (engine := load(folder))]
    ours = [e for e in engines if all(e.manifest.get(name) == value for name, value in wanted.items())]
    return [e for e in ours if e.manifest["cpu"] == processor(e.backends[0])]


def prebuilt() -> Engine | None:
    """The build inside the installed package, if it has one."""
    return load(PREBUILT)


def upstream_source() -> Path:
    """A folder with the pinned archive's llama.cpp/ as upstream published it and llama_cpp/, verified; read-only."""
    cache = Cache(cache_folder())
    with reporting() as reporter, build_lock(cache, reporter):
        return pinned_source(load_pin(), cache, None, reporter)


def load(folder: Path) -> Engine | None:
    """The finished build in a folder, or None if there is none."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    backends = tuple(manifest["backends"])
    return Engine(manifest["key"], folder, manifest["upstream"], backends, MappingProxyType(manifest))
