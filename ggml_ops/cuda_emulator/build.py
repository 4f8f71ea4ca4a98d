"""Programs that run CUDA kernels on the CPU.

In: .cu files with the kernels, .cpp or .cu files with a `main`. Out: a program; kernels are compiled as C++ against
include/, each source in a translation unit of its own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kimi_gguf.ggml_ops.cuda_emulator.rewrite import rewrite_tree

INCLUDE = Path(__file__).parent / "include"
STUBS = (
    Path(__file__).parent / "stubs"
)  # of headers that neither the emulator nor a toolkit without cuBLAS has

# What kernels are checked for as they run: see include/cuda_emulator/checks.h.
CHECKS = ("alignment", "bounds", "null", "shift-exponent", "integer-divide-by-zero")
OPTIONS = (
    "-std=c++17",
    "-O2",
    "-g1",
    "-gdwarf-4",  # addr2line finds the lines of #line in this one
    "-fno-strict-aliasing",  # kernels look at registers as other types
    "-fwrapv",
    "-march=native",
    "-pthread",
)
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi")


class CompileError(Exception):
    """What the compiler said."""


def compile_program(
    sources: Sequence[Path],
    program: Path,
    *,
    include: Sequence[Path] = (),
    system: Sequence[Path] = (),
    options: Sequence[str] = (),
    link: Sequence[str] = (),
    architecture: int = 80,
    races: bool = False,
    fast_math: bool = True,
    compiler: str | None = None,
) -> Path:
    """Compile and link `sources` into `program`; its objects and rewritten sources lie beside it.

    include: folders for #include "…", those of .cuh files too. system: the same without warnings.
    options: further ones of the compiler. link: of the linker. architecture: 75, 80, 89, … of __CUDA_ARCH__.
    races: look for races in shared memory too, at each access (include/cuda_emulator/races.h); slower.
    fast_math: as nvcc's -use_fast_math, with which ggml compiles: expf is __expf, subnormal numbers are zero.
    compiler: C++17, default $CXX or g++. `RewriteError`, `CompileError`.
    """
    cxx = compiler or os.environ.get("CXX") or "g++"
    work = program.resolve().parent / f"{program.name}.work"
    work.mkdir(parents=True, exist_ok=True)
    command = [cxx, *OPTIONS, *WARNINGS, f"-D__CUDA_ARCH__={architecture}0"]
    command += [] if fast_math else ["-DCUDA_EMULATOR_EXACT_MATH"]
    command += ["-isystem", str(INCLUDE), "-isystem", str(STUBS), "-include", "cuda_runtime.h"]
    command += [f"-I{path}" for path in include]
    for path in system:
        command += ["-isystem", str(path)]
    objects = []
    for number, source in enumerate(sources):
        kernel = source.suffix == ".cu"
        folder = work / f"{number}-{source.stem}"
        folder.mkdir(exist_ok=True)
        text = rewrite_tree(source, folder, [*include, *system], fast_math) if kernel else source
        objects.append(str(folder / "object.o"))
        checks = [f"-fsanitize={','.join(CHECKS)}", f"-fno-sanitize-recover={','.join(CHECKS)}"]
        checks += ["-fsanitize=thread", "-fno-threadsafe-statics"] if races else []
        _run([*command, *(checks if kernel else []), *options, "-c", str(text), "-o", objects[-1]])
    _run([cxx, "-pthread", *objects, "-o", str(program), *link])
    return program


def _run(command: Sequence[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise CompileError(f"$ {' '.join(command)}\n{ended.stderr}")
