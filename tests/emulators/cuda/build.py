"""Programs that run CUDA kernels on the CPU.

Input: .cu files with the kernels, .cpp or .cu files with a `main`. Output: a program; kernels are compiled as C++ with
include/, each source as a separate translation unit.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compiled import compile_once
from emulators.common import INCLUDE as COMMON
from emulators.cuda.rewrite import rewrite_tree

INCLUDE = Path(__file__).parent / "include"
STUBS = Path(__file__).parent / "stubs"  # headers that are missing in a toolkit without cuBLAS

# Checks of running kernels: see include/cuda_emulator/checks.h.
CHECKS = ("alignment", "bounds", "null", "shift-exponent", "integer-divide-by-zero")
OPTIONS = (
    "-std=c++17",
    "-O2",
    "-g1",
    "-gdwarf-4",  # with this version addr2line finds the lines of #line
    "-fno-strict-aliasing",  # kernels access registers as other types
    "-fwrapv",
    "-march=native",
    "-pthread",
    "-fPIC",
)
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi")


class CompileError(Exception):
    """The compiler's output."""


def compile_objects(
    sources: Sequence[Path],
    work: Path,
    *,
    include: Sequence[Path] = (),
    system: Sequence[Path] = (),
    options: Sequence[str] = (),
    races: bool = False,
    compiler: str | None = None,
) -> list[Path]:
    """Compile each of `sources` to an object, several at a time; objects and rewritten sources are stored in `work`.

    include: folders for #include "…", also those of .cuh files. system: the same without warnings.
    options: additional options of the compiler.
    races: also detect races in shared memory, at each access (include/cuda_emulator/races.h); slower.
    compiler: C++17, default $CXX or g++. Raises `RewriteError`, `CompileError`.
    """
    command = [_compiler(compiler), *OPTIONS, *WARNINGS, *options]
    folders: list[str] = []
    for path in (INCLUDE, COMMON, STUBS):
        folders += ["-isystem", str(path)]
    folders += ["-include", "cuda_runtime.h"]
    folders += [f"-I{path}" for path in include]
    for path in system:
        folders += ["-isystem", str(path)]
    checks = [f"-fsanitize={','.join(CHECKS)}", f"-fno-sanitize-recover={','.join(CHECKS)}"]
    checks += (
        ["-fsanitize=thread", "-fno-threadsafe-statics", "-O1"] if races else []
    )  # -O2 takes long to compile

    def compile_one(number: int, source: Path) -> Path:
        kernel = source.suffix == ".cu"
        folder = work / f"{number}-{source.stem}"
        folder.mkdir(parents=True, exist_ok=True)
        text = rewrite_tree(source, folder, [*include, *system]) if kernel else source
        words = [*command, *(checks if kernel else [])]
        _run([*words, *folders, "-c", str(text)], folder / "object.o")
        return folder / "object.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, range(len(sources)), sources))


def link_program(
    objects: Sequence[Path], program: Path, *, link: Sequence[str] = (), compiler: str | None = None
) -> Path:
    """Link objects of `compile_objects`. link: options of the linker. Raises `CompileError`."""
    _run([_compiler(compiler), "-pthread", *map(str, objects), *link], program)
    return program


def _compiler(chosen: str | None) -> str:
    return chosen or os.environ.get("CXX") or "g++"


def _run(command: Sequence[str], target: Path) -> None:
    try:
        compile_once(command, target)
    except subprocess.CalledProcessError as error:
        raise CompileError(f"$ {' '.join(command)}\n{error.stderr}") from None
