"""ggml of the patched tree and the programs of tests/native, built in variants: sanitizers, other processors.

In: a `Variant`. Out: a `Build`, a folder with bin/ in which programs and libraries lie side by side; `Build.run` runs
a program under the variant's runner. Builds are kept in the cache, named by the content of everything that goes into
them; a run that finds its build there costs the reading of the sources.

Where a tool is missing the test is skipped and names the Debian package; with KIMI_CI set it fails instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from kimi_gguf.patches.series import load_series
from kimi_gguf.patches.tree import Tree
from kimi_gguf.scripts.engine import cache_folder, upstream_source
from kimi_gguf.scripts.toolchain import cores, cpu_fingerprint, find_compilers, packaged_tool

ROOT = Path(__file__).parent.parent
KEPT = 2  # builds of one variant: the present one and the one before
# What is compiled here: ggml without the backends of other devices, and three sources of libllama.
UPSTREAM = re.compile(r"ggml/(?!src/ggml-(?!cpu/)[\w-]+/)|src/(kimi-split|unicode|llama-fattn-f32)")
DEFINES = {
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_TYPE": "None",  # the variant's flags alone
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "GGML_CCACHE": "OFF",
    "GGML_LLAMAFILE": "OFF",
    "GGML_OPENMP": "OFF",  # ThreadSanitizer knows pthreads only
}


@dataclass(frozen=True)
class Variant:
    """How ggml is built and how its programs are run."""

    name: str
    flags: str  # for C and C++
    targets: tuple[str, ...]  # for Ninja; programs and libraries
    defines: Mapping[str, str] = field(default_factory=dict)
    compilers: tuple[str, str] | None = None  # C, C++; None: the engine's own
    tools: Mapping[str, str] = field(default_factory=dict)  # program -> Debian package
    runner: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """A finished variant."""

    variant: Variant
    source: Path  # the patched tree's part, tests/native as native/, headers of ggml_ops as operators/
    folder: Path

    @property
    def bin(self) -> Path:
        """Programs and libraries."""
        return self.folder / "bin"

    def run(
        self, program: str | Path, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of bin/, or one given by path, to its end."""
        command = [*self.variant.runner, str(self.bin / program), *arguments]
        told = {**os.environ, **self.variant.environment, **environment}
        return subprocess.run(
            command, env=told, capture_output=True, text=True, check=False, errors="replace"
        )

    def ninja(self, *arguments: str) -> str:
        """What Ninja says; `CalledProcessError` shows its output where it fails."""
        command = [packaged_tool("ninja"), "-C", str(self.folder), *arguments]
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout[-4000:]
        return ended.stdout


def require_tools(tools: Mapping[str, str]) -> None:
    """Skip, or with KIMI_CI fail, where a program is not installed."""
    missing = {package for program, package in tools.items() if shutil.which(program) is None}
    if missing:
        reason = f"not installed: {', '.join(sorted(missing))} (Debian packages)"
        pytest.fail(reason) if os.environ.get("KIMI_CI") else pytest.skip(reason)


def build(variant: Variant) -> Build:
    """The variant, built now if it is not there yet."""
    require_tools(variant.tools)
    folder = cache_folder() / "variants"
    folder.mkdir(parents=True, exist_ok=True)
    tree = sources()
    digest = hashlib.sha256(tree.hash().encode()).hexdigest()[:16]
    source = folder / f"source-{digest}"
    with (folder / "source.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not source.exists():
            tree.write_to(folder / f".{source.name}")
            (folder / f".{source.name}").rename(source)
            _forget(folder, "source-*")
    compilers = variant.compilers or tuple(find_compilers("cpu")[name].path for name in ("C", "C++"))
    versions = [
        subprocess.run([each, "--version"], capture_output=True, check=True).stdout for each in compilers
    ]
    settings = [digest, variant.flags, variant.targets, sorted({**DEFINES, **variant.defines}.items())]
    identity = json.dumps([*settings, str(source), cpu_fingerprint(), [each.decode() for each in versions]])
    made = Build(
        variant, source, folder / f"{variant.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    )
    with (folder / f"{variant.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made.folder / "complete").exists():
            _configure(made, compilers)
            made.ninja("-j", str(cores()), *variant.targets)
            (made.folder / "complete").touch()
            _forget(folder, f"{variant.name}-*")
    os.utime(made.folder)
    return made


@cache
def sources() -> Tree:
    """What variants are made of."""
    tree = Tree(upstream_source() / "llama.cpp")
    load_series().apply(tree)
    for path in tree.paths():
        if not UPSTREAM.match(path):
            tree.edit(path, None)
    for path in sorted((ROOT / "tests" / "native").iterdir()):
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
    command = [
        packaged_tool("cmake"),
        "-G",
        "Ninja",
        "-S",
        str(made.source / "native"),
        "-B",
        str(made.folder),
    ]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:]


def _forget(folder: Path, pattern: str) -> None:
    """Remove all but the builds used last."""
    for old in sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
