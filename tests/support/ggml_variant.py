"""ggml of the patched tree and the programs of tests/native, built as variants: sanitizers, other processors.

Input: a `Variant`. Output: a `Build`, a folder whose bin/ has programs and libraries; `Build.run` runs
a program with the variant's runner. Builds stay in the cache, and Ninja compiles what changed; if nothing has, its
check takes less than 0.1 s.

If a tool is missing, the test is skipped and names the Debian package; with KIMI_CI set it fails instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from kimi_gguf.engine.builds import cache_folder, upstream_source
from kimi_gguf.engine.toolchain import cores, cpu_fingerprint, find_compilers, packaged_tool
from kimi_gguf.patches.series import load_series
from kimi_gguf.patches.tree import Tree

ROOT = Path(__file__).parents[2]
KEPT = 3  # number of checkouts whose builds are kept
# Only these are compiled: ggml without the backends of other devices, and three sources of libllama.
UPSTREAM = re.compile(r"ggml/(?!src/ggml-(?!cpu/)[\w-]+/)|src/(kimi-split|unicode|llama-fattn-f32)")
DEFINES = {
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_TYPE": "None",  # only the variant's flags
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "GGML_CCACHE": "OFF",
    "GGML_LLAMAFILE": "OFF",
    "GGML_OPENMP": "OFF",  # ThreadSanitizer supports pthreads only
}


@dataclass(frozen=True)
class Variant:
    """How ggml is built and how its programs are run."""

    name: str
    flags: str  # for C and C++
    targets: tuple[str, ...]  # of Ninja; programs and libraries
    defines: Mapping[str, str] = field(default_factory=dict)
    compilers: tuple[str, str] | None = None  # C, C++; None: the engine's own
    tools: Mapping[str, str] = field(default_factory=dict)  # program -> Debian package
    runner: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """A finished variant."""

    variant: Variant
    source: Path  # the patched tree's files, tests/native as native/, headers of ggml_ops as operators/
    folder: Path

    @property
    def bin(self) -> Path:
        """Programs and libraries."""
        return self.folder / "bin"

    def run(
        self, program: str | Path, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of bin/, or one given by path, until it exits."""
        command = [*self.variant.runner, str(self.bin / program), *arguments]
        variables = {**os.environ, **self.variant.environment, **environment}
        return subprocess.run(
            command, env=variables, capture_output=True, text=True, check=False, errors="replace"
        )

    def ninja(self, *arguments: str) -> str:
        """Ninja's output; it must succeed."""
        return _output([packaged_tool("ninja"), "-C", self.folder, *arguments])


def require_tools(tools: Mapping[str, str]) -> None:
    """Skip, or with KIMI_CI fail, if a program is not installed."""
    missing = {package for program, package in tools.items() if shutil.which(program) is None}
    if missing:
        reason = f"not installed: {', '.join(sorted(missing))} (Debian packages)"
        pytest.fail(reason) if os.environ.get("KIMI_CI") else pytest.skip(reason)


def build(variant: Variant, *others: str) -> Build:
    """The variant, built now if any of its inputs has changed. others: targets that only some tests need."""
    require_tools(variant.tools)
    folder = cache_folder() / "variants" / hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    made = Build(variant, folder / "source", folder / variant.name)
    tree = sources()
    digest = tree.hash()
    with _locked(folder / "source.lock"):
        if _read(folder / "source.digest") != digest:
            tree.write_to(made.source)  # writes only files that differ
            (folder / "source.digest").write_text(digest)
            _forget(folder.parent)
        os.utime(folder)
    compilers = variant.compilers or tuple(find_compilers("cpu")[name].path for name in ("C", "C++"))
    versions = [_output([each, "--version"]) for each in compilers]
    settings = [variant.flags, sorted({**DEFINES, **variant.defines}.items()), cpu_fingerprint(), *versions]
    with _locked(folder / f"{variant.name}.lock"):
        if _read(made.folder / "settings") != json.dumps(settings):
            shutil.rmtree(made.folder, ignore_errors=True)
            _configure(made, compilers)
            (made.folder / "settings").write_text(json.dumps(settings))
        made.ninja("-j", str(cores()), *variant.targets, *others)
    return made


@cache
def sources() -> Tree:
    """The sources of the variants."""
    tree = Tree(upstream_source() / "llama.cpp")
    load_series().apply(tree)
    for path in tree.paths():
        if not UPSTREAM.match(path):
            tree.edit(path, None)
    for path in sorted(path for path in (ROOT / "tests" / "native").iterdir() if path.is_file()):
        tree.edit(f"native/{path.name}", path.read_bytes())
    for path in sorted((ROOT / "ggml_ops").rglob("*.h")):
        tree.edit(f"operators/{path.relative_to(ROOT / 'ggml_ops').as_posix()}", path.read_bytes())
    return tree


def _configure(made: Build, compilers: tuple[str, ...]) -> None:
    launcher = shutil.which("ccache") or ""
    defines = {
        **DEFINES,
        "CMAKE_C_COMPILER": compilers[0],
        "CMAKE_CXX_COMPILER": compilers[1],
        "CMAKE_C_COMPILER_LAUNCHER": launcher,
        "CMAKE_CXX_COMPILER_LAUNCHER": launcher,
        "CMAKE_C_FLAGS": made.variant.flags,
        "CMAKE_CXX_FLAGS": made.variant.flags,
        "CMAKE_MAKE_PROGRAM": packaged_tool("ninja"),
        "LLAMA_CPP": str(made.source),
        "OPERATORS": str(made.source / "operators"),
        **made.variant.defines,
    }
    options = [f"-D{name}={value}" for name, value in defines.items()]
    _output(
        [packaged_tool("cmake"), "-G", "Ninja", "-S", made.source / "native", "-B", made.folder, *options]
    )


def _output(command: Sequence[str | Path]) -> str:
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:]
    return ended.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def _forget(folder: Path) -> None:
    """Remove the builds of checkouts that are not used any more."""
    builds = [path for path in folder.iterdir() if path.is_dir()]
    for old in sorted(builds, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
