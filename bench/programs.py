"""Compiles the C++ programs of native/ on first use, and keeps them in the cache.

Input: a source file, compiler flags, the libraries of a build if the program uses ggml. Output: the program's path.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from kimi_gguf.bench.files import atomically
from kimi_gguf.engine.builds import cache_folder, cpu_library, upstream_source
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.toolchain import cpu_fingerprint, find_compilers

# gnu++: with plain c++17 GCC does not contract a multiply and an add into one instruction
# -O2: at -O3 GCC 12 copies accumulators of peaks.cpp inside its loop, and half of the int8 peak is lost
FLAGS = ("-std=gnu++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
NATIVE = ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)


def program(name: str, flags: Sequence[str] = NATIVE) -> Path:
    """Compile native/NAME.cpp. Raises `EngineError` if it does not compile."""
    folder = resources.files(__package__).joinpath("native")
    source = Path(str(folder)) / f"{name}.cpp"
    compiler = find_compilers("cpu")["C++"]
    command = [*compiler.command, *FLAGS]
    parts = (source.read_text(), command, compiler.version, tuple(flags), cpu_fingerprint())
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    place = cache_folder() / "bench" / "programs" / f"{name}-{key}"
    if place.is_file():
        return place

    def compile_to(part: Path) -> None:
        words = [*command, str(source), *flags, "-o", str(part)]
        ended = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if ended.returncode:
            raise EngineError(
                f"{source}: does not compile",
                found=ended.stderr.strip().splitlines()[0] if ended.stderr.strip() else "no message",
                todo="try another C++ compiler: CXX=... kimi-llama bench",
            )

    atomically(place, compile_to)
    return place


def ggml_flags(libraries: Path) -> tuple[str, ...]:
    """Flags for a program that uses the ggml of one build."""
    include = upstream_source() / "llama.cpp" / "ggml" / "include"
    linked = ("-lggml", str(cpu_library(libraries)), "-lggml-base", "-ldl")
    return (*NATIVE, "-isystem", str(include), f"-L{libraries}", *linked, f"-Wl,-rpath,{libraries}")


def ask(path: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run a program and return its output. Raises `EngineError` if it fails."""
    ended = subprocess.run(
        [str(path), *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=environment,
    )
    if ended.returncode:
        message = (ended.stderr.strip() or ended.stdout.strip() or "no message").splitlines()[-1]
        command = f"{path.name} {' '.join(arguments)}"
        raise EngineError(f"{command} ended with status {ended.returncode}", found=message)
    return ended.stdout
