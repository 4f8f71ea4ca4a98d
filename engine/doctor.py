"""Checks whether the builds on this machine work, for `kimi-llama doctor`.

Input: the machine. Output: `Diagnosis`, plain data that the command prints or dumps.
Each check runs in a separate process, so that a build never uses libraries of another one.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path, PurePath
from typing import Any

from kimi_gguf.engine.builds import PREBUILT, SHORT_KEY, Engine, builds, cache_folder, prebuilt, select
from kimi_gguf.engine.errors import EngineError, install
from kimi_gguf.engine.limits import memory, processors
from kimi_gguf.engine.toolchain import cores, find_compilers, packaged_tool
from kimi_gguf.engine.wheel import record_hash
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.patches.pin import load_pin
from kimi_gguf.patches.series import Patch, load_series

_INSTALL_AGAIN = "install the wheel again: pip install --force-reinstall kimi_gguf-*.whl"
OUR_LIBRARIES = ("libllama", "libggml", "libmtmd")

# Runs with the build's environment: which package and which libraries a Python process loads.
_PROBE = """
import json, sys
import llama_cpp
llama_cpp.llama_backend_init()  # loads the backends: without them the line on the system is empty
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(json.dumps({
    "package": llama_cpp.__file__,
    "version": llama_cpp.__version__,
    "system": llama_cpp.llama_print_system_info().decode(),
    "mapped": sorted({line.split(None, 5)[5] for line in maps.splitlines() if line.count("/") > 1}),
}))
"""


@dataclass(frozen=True)
class Check:
    """One check: whether it passed, and what was found. needed: whether something is wrong if it did not pass."""

    name: str
    passed: bool
    seen: str
    needed: bool = True


@dataclass(frozen=True)
class Health:
    """A build and its checks."""

    engine: Engine
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Diagnosis:
    """The machine, the pin and all builds of it."""

    machine: tuple[Check, ...]
    pin: dict[str, str]
    patches: tuple[Patch, ...]
    engines: tuple[Health, ...]
    chosen: Check  # the build that runs if none is named
    installed: Check | None  # the files of the installed wheel, if it has an engine

    @property
    def patched(self) -> bool:
        """Whether a patched build exists."""
        return any(not health.engine.is_upstream for health in self.engines)

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed, except those of the machine: what only a build needs may be missing."""
        whole = [check.name for check in (self.chosen, self.installed) if check and not check.passed]
        return whole + [
            f"{check.name} (build {health.engine.name} {health.engine.key[:SHORT_KEY]})"
            for health in self.engines
            for check in health.checks
            if not check.passed and check.needed
        ]

    @property
    def unusable(self) -> list[Health]:
        """The builds that do not work here, and need not: they run only if they are named."""
        return [
            health
            for health in self.engines
            if any(not check.passed and not check.needed for check in health.checks)
        ]

    @property
    def healthy(self) -> bool:
        """A patched build exists, and every needed check of every build passes."""
        return self.patched and not self.failed

    def as_json(self) -> str:
        """All data, ready for JSON."""
        engines = [
            {
                "prefix": str(health.engine.folder),
                "name": health.engine.name,
                "instructions": health.engine.instructions(),
                **health.engine.manifest,
                "checks": [vars(check) for check in health.checks],
            }
            for health in self.engines
        ]
        whole = {
            "healthy": self.healthy,
            "cache": str(cache_folder()),
            "machine": [vars(check) for check in self.machine],
            "pin": self.pin,
            "patches": [{"name": patch.name, "subject": patch.subject} for patch in self.patches],
            "build": vars(self.chosen),
            "installed": self.installed and vars(self.installed),
            "engines": engines,
        }
        return json.dumps(whole, indent=2)


def diagnose() -> Diagnosis:
    """Check the machine and all builds of this pin and series, patched and upstream."""
    engines = [*builds(upstream=False), *builds(upstream=True)]
    chosen = _checked("build that runs", lambda: select(make=False).label())
    return Diagnosis(
        machine=tuple(_machine()),
        pin={name: str(value) for name, value in vars(load_pin()).items()},
        patches=load_series().patches,
        engines=tuple(_health(engine, engines, chosen) for engine in engines),
        chosen=chosen,
        installed=_checked("files of the wheel", _unchanged_files) if _has_engine() else None,
    )


def _health(engine: Engine, engines: list[Engine], chosen: Check) -> Health:
    """A build and its checks. A build for GPUs must work only if it is the one that runs."""
    checks = examine(engine, engines)
    if engine.for_gpus and engine.label() != chosen.seen:
        checks = [replace(check, needed=False) for check in checks]
    return Health(engine, tuple(checks))


def examine(engine: Engine, engines: list[Engine]) -> list[Check]:
    """Check one build: its programs run, and it loads its own libraries for any LD_LIBRARY_PATH."""
    tempting = [str(other.lib) for other in engines if other.key != engine.key]
    return [
        _checked("programs run", lambda: _version(engine)),
        _checked("programs load their own libraries", lambda: _linked(engine, tempting)),
        _checked("llama_cpp loads the same libraries", lambda: _python(engine, tempting)),
        _checked("devices", lambda: list_devices(engine)),
    ]


def list_devices(engine: Engine) -> str:
    """The devices that the build can compute on. Raises `EngineError` if it is for GPUs and there is none."""
    result = _run([str(engine.bin / "llama-cli"), "--list-devices"], dict(os.environ))
    lines = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.startswith("  ")]
    lines = [line for line in lines if line != "(none)"]
    if engine.for_gpus and not lines:
        raise EngineError(f"built for {engine.backends[0]}, but there is no device", todo="check the driver")
    return ", ".join(lines) or "CPU"


def _checked(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (KimiError, OSError, subprocess.SubprocessError) as error:
        return Check(name, False, str(error))


def _version(engine: Engine) -> str:
    """The version text of a program, which must name the commit the build was made from."""
    result = _run([str(engine.bin / "llama-cli"), "--version"], dict(os.environ))
    text = (result.stdout + result.stderr).strip()
    if result.returncode != 0 or str(engine.manifest["commit"]) not in text:
        raise EngineError(
            "llama-cli --version fails or names another commit",
            expected=str(engine.manifest["commit"]),
            found=text or f"exit status {result.returncode}",
            todo=f"remove {engine.folder} and run kimi-llama build",
        )
    return ", ".join(line.strip() for line in text.splitlines())


def _linked(engine: Engine, tempting: list[str]) -> str:
    """The libraries that the loader finds for each program, with other builds' libraries in LD_LIBRARY_PATH."""
    if sys.platform != "linux":
        return "not checked on this system"
    programs = sorted(engine.bin.iterdir())
    for program in programs:
        environment = {**os.environ, "LD_TRACE_LOADED_OBJECTS": "1", "LD_LIBRARY_PATH": ":".join(tempting)}
        listing = _run([str(program)], environment).stdout
        loaded = [line.split("=>")[-1].split("(")[0].strip() for line in listing.splitlines()]
        _expect_own(engine, loaded, program.name)
    return f"{len(programs)} programs, all libraries from {engine.lib}"


def _python(engine: Engine, tempting: list[str]) -> str:
    """The llama_cpp that a Python process imports in the build's environment."""
    environment = {**engine.environment(), "LD_LIBRARY_PATH": ":".join(tempting)}
    result = _run([sys.executable, "-P", "-c", _PROBE], environment)
    if result.returncode != 0:
        raise EngineError(
            "llama_cpp cannot be imported",
            found=result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no message",
            todo=f"{install('diskcache', 'jinja2', 'typing-extensions')}, which llama_cpp imports",
        )
    report = json.loads(result.stdout.strip().splitlines()[-1])
    if not Path(report["package"]).is_relative_to(engine.folder):
        raise EngineError(
            "another llama_cpp shadows the build's own",
            expected=f"a package below {engine.folder}",
            found=report["package"],
            todo="uninstall it or remove it from PYTHONPATH",
        )
    if sys.platform == "linux":
        _expect_own(engine, report["mapped"], "llama_cpp")
    return "; ".join(filter(None, [f"llama_cpp {report['version']}", report["system"].strip(" |\n")]))


def _expect_own(engine: Engine, loaded: list[str], who: str) -> None:
    ours = [path for path in loaded if Path(path).name.startswith(OUR_LIBRARIES)]
    home = engine.lib.resolve()
    foreign = [path for path in ours if not Path(path).resolve().is_relative_to(home)]
    if foreign or not ours:
        raise EngineError(
            f"{who} loads libraries that are not its build's own",
            expected=f"libraries in {engine.lib}",
            found=", ".join(foreign) or "none of llama.cpp's",
            todo=f"unset LD_PRELOAD; if that does not help, remove {engine.folder} and run kimi-llama build",
        )


def _machine() -> list[Check]:
    room = memory()
    checks = [
        _tool("C++ compiler", lambda: find_compilers("cpu")["C++"].version),
        _tool("cmake", lambda: packaged_tool("cmake")),
        _tool("ninja", lambda: packaged_tool("ninja")),
        _ccache(),
        _cuda_toolkit(),
        Check("threads", True, f"{cores()} ({processors().source})"),
        Check(
            "memory", True, f"{room.value / 2**30:.1f} GiB available ({room.source})" if room else "unknown"
        ),
    ]
    installed = importlib.util.find_spec("llama_cpp")
    if installed is not None and installed.origin is not None:
        seen = f"{installed.origin}: an installed package of upstream; this project's commands do not use it"
        checks.append(Check("other llama_cpp", True, seen))
    return checks


def _tool(name: str, look: Callable[[], str]) -> Check:
    """What only a build needs: with a wheel's engine it may be missing."""
    check = _checked(name, look)
    if check.passed or prebuilt() is None:
        return check
    return Check(name, False, "not found (only kimi-llama build needs it)", needed=False)


def _ccache() -> Check:
    path = shutil.which("ccache")
    seen = path or "not found (not needed; with it, later builds take less time)"
    return Check("ccache", path is not None, seen, needed=False)


def _site() -> Path:
    """The folder that the package is installed in."""
    return Path(os.path.normpath(PREBUILT.parents[2].absolute()))


def _has_engine() -> bool:
    """Whether the installed wheel has an engine, or had one: its files may have been removed."""
    engine = PREBUILT.relative_to(PREBUILT.parents[2]).as_posix()
    return PREBUILT.is_dir() or any(name.startswith(f"{engine}/") for name in _record(_site()))


def _unchanged_files() -> str:
    """Compare the installed files with the list and the hashes that the wheel brought. Raises `EngineError`."""
    site = _site()
    record = _record(site)
    if not record:
        raise EngineError(
            f"{site}: the list of the wheel's files, RECORD in kimi_gguf-*.dist-info, is missing or damaged, "
            "or there are several",
            todo=_INSTALL_AGAIN,
        )
    # Installers write no hashes of RECORD itself and of compiled files, which are compared with their sources below.
    listed = {
        name: value
        for name, value in record.items()
        if value or not (_source(name) in record or name.endswith(".dist-info/RECORD"))
    }
    wrong, outside = [], []
    for name, value in listed.items():
        path = _installed_path(site, name)
        try:
            if path is None:
                outside.append(name)
            elif not value:
                wrong.append(f"{name} (no hash in RECORD)")
            elif not path.is_file():  # reading a pipe would wait forever
                wrong.append(f"{name} ({'not a file' if path.exists() else 'missing'})")
            elif record_hash(content := path.read_bytes()) != value:
                wrong.append(name)
            elif path.suffix == ".py" and _compiled_otherwise(path, content):
                wrong.append(f"{name} (its compiled file in __pycache__)")
        except (OSError, ValueError):  # ValueError: no name of a file
            wrong.append(f"{name} (cannot be read)")
    if outside:
        raise EngineError(
            f"{len(outside)} files in RECORD are outside of the installation's folders, so they were not read",
            expected=f"files in {' and '.join(map(str, [site, *sorted(_command_folders(site))]))}",
            found=", ".join(outside[:5]),
            todo=_INSTALL_AGAIN,
        )
    if wrong:
        raise EngineError(
            f"{len(wrong)} of {len(listed)} installed files were changed",
            found=", ".join(wrong[:5]),
            todo=_INSTALL_AGAIN,
        )
    if added := _added_files(set(record)):
        raise EngineError(
            f"{len(added)} files in the package's folder are not from the wheel; Python or ggml may load them",
            found=", ".join(added[:5]),
            todo="remove them",
        )
    return f"{len(listed)} files as in the wheel"


def _record(site: Path) -> dict[str, str]:
    """The hash of each file in the wheel's RECORD, as `record_hash` writes it; empty for files without one. Without
    entries if the list is missing or damaged."""
    try:
        (path,) = (path for path in site.glob("kimi_gguf-*.dist-info/RECORD") if path.is_file())
        lines = csv.reader(path.read_text(encoding="utf-8").splitlines())
        return {name: value.partition("=")[2] for name, value, _ in lines}
    except (csv.Error, OSError, ValueError):
        return {}


def _installed_path(site: Path, name: str) -> Path | None:
    """Where a file of RECORD is, whose name is relative to `site`; None if that is outside of the installation."""
    path, commands = Path(os.path.normpath(site / name)), _command_folders(site)
    if path.is_relative_to(site) or path.parent in commands:
        return path
    # pip --target moves packages and commands, and leaves the commands' names in RECORD as they were before
    return site / "bin" / path.name if PurePath(name).parts[:-1] == ("..", "..", "bin") else None


@functools.cache
def _command_folders(site: Path) -> frozenset[Path]:
    """Where commands of packages in `site` may be: in bin/ next to them (--target), and in the folders of each of
    Python's schemes that has its packages there (environments, --user, --prefix, the system's Python)."""
    folders = {site / "bin"}
    for base in site.parents:
        bases = dict.fromkeys(("base", "platbase", "userbase"), str(base))
        for scheme in sysconfig.get_scheme_names():
            paths = sysconfig.get_paths(scheme, bases)
            if str(site) in (paths["purelib"], paths["platlib"]):
                folders.add(Path(paths["scripts"]))
    return frozenset(folders)


def _compiled_otherwise(path: Path, source: bytes) -> bool:
    """Whether Python would run something else than this source from a compiled file in __pycache__, at any level of
    optimization: without an option, with -O, or with -OO."""
    return any(_Compiled(path, level).differs(source) for level in (0, 1, 2))


class _Compiled(SourceFileLoader):
    """Loads the compiled file of a level of optimization, not that of this process, and writes none.

    Python's own loader decides whether it would run the file. If not, it compiles the source, at this process's level.
    """

    def __init__(self, source: Path, level: int) -> None:
        super().__init__("checked", str(source))
        self.level = level
        self.compiled = importlib.util.cache_from_source(str(source), optimization=level or "")

    def differs(self, source: bytes) -> bool:
        """Whether Python would run something else than this source."""
        if not Path(self.compiled).is_file():
            return False
        try:
            return self.get_code("checked") not in [
                compile(source, self.path, "exec", dont_inherit=True, optimize=level)
                for level in (self.level, -1)
            ]
        except (ImportError, EOFError, ValueError, TypeError):  # the compiled file cannot be read
            return True

    def get_data(self, path: str) -> bytes:
        return super().get_data(path if path == self.path else self.compiled)

    def set_data(self, *_: Any, **__: Any) -> None:
        pass


def _added_files(known: set[str]) -> list[str]:
    """The files and links in the package's folder that are neither `known` nor Python's own caches of known files."""
    package = PREBUILT.parents[1]
    files = [path for path in package.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = [path.relative_to(package.parent).as_posix() for path in files]
    return sorted(name for name in names if name not in known and _source(name) not in known)


def _source(name: str) -> str:
    """The source of a compiled file in __pycache__; empty for other files."""
    try:
        return importlib.util.source_from_cache(name) if name.endswith(".pyc") else ""
    except ValueError:
        return ""


def _cuda_toolkit() -> Check:
    """The toolkit that --backend cuda uses, and whether it is complete."""
    name = "CUDA toolkit"
    try:
        nvcc = find_compilers("cuda")["CUDA"]
    except KimiError:
        return Check(name, False, "not found (only --backend cuda needs it)", needed=False)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "whole.cu"
        source.write_text("#include <cublas_v2.h>\n")
        whole = _run([*nvcc.command, "-E", str(source)], dict(os.environ)).returncode == 0
    seen = "with cuBLAS" if whole else "without cuBLAS: --backend cuda needs NVIDIA's whole toolkit"
    return Check(name, whole, f"{nvcc.path}: {nvcc.version}, {seen}", needed=False)


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False, timeout=120
    )
