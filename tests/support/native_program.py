"""Small C++ programs that pytest compiles from tests/native with a build's ggml and runs.

Input: a build, a source file and the folders of our operators that it includes. Output: the path of the program,
compiled with all warnings as errors. Its headers are those of ggml_ops and upstream's, which patches do not change
for other code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from compiled import compile_once

from kimi_gguf.engine.builds import Engine, ensure, upstream_source
from kimi_gguf.engine.toolchain import find_compilers

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tests" / "native"
OPERATORS = ROOT / "ggml_ops"


def compile_program(
    engine: Engine,
    name: str,
    folder: Path,
    operators: tuple[str, ...] = (),
    sources: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> Path:
    """Compile tests/native/NAME and additional `sources` of ggml_ops into `folder`, linked to the build's ggml.

    operators: folders of ggml_ops with additional headers.
    options: additional options of the compiler. Raises `CalledProcessError` if it does not compile.
    """
    program = folder / Path(name).stem
    files = [NATIVE / name, *(OPERATORS / each for each in sources)]
    _compile(engine, files, program, [*(f"-I{OPERATORS / each}" for each in operators), *options])
    return program


def compile_backend(engine: Engine, folder: Path) -> Path:
    """Compile native/second_backend.cpp into a shared library that ggml_backend_load can load."""
    return compile_library(engine, "second_backend.cpp", folder)


def compile_library(engine: Engine, name: str, folder: Path) -> Path:
    """Compile tests/native/NAME into a shared library in `folder`, linked to the build's ggml."""
    library = folder / f"lib{Path(name).stem}.so"
    _compile(engine, [NATIVE / name], library, ["-fPIC", "-shared"])
    return library


def run_program(
    program: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program that must exit with status 0; the assertion shows its last lines."""
    ended = subprocess.run(
        [program, *arguments], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, "\n".join(ended.stdout.splitlines()[-20:]) + ended.stderr[-2000:]
    return ended


def passed_cases(engine: Engine, device: str, operator: str, *arguments: str, **environment: str) -> int:
    """Run upstream's test-backend-ops, which compares with the CPU's plain path; return the number of cases."""
    program = engine.bin / "test-backend-ops"
    ended = run_program(program, "test", "-b", device, "-o", operator, *arguments, **environment)
    return sum(operator in line and "OK" in line for line in ended.stdout.splitlines())


def roll_back_on_device(
    engine: Engine, gguf: Path, backend: Path, layers: int, log: Path, **environment: str
) -> set[str]:
    """Run upstream's program: rollback, replay, several sequences, caches with zeros and with garbage.

    It loads no backends, so the device registers itself. Returns the lines of SECOND_LOG.
    """
    environment |= {"LD_PRELOAD": str(backend), "SECOND_REGISTERS": "1", "SECOND_LOG": str(log)}
    environment["GGML_NO_BACKTRACE"] = "1"  # its gdb would also load the library
    program = engine.bin / "test-recurrent-state-rollback"
    ended = run_program(program, "-m", gguf, "-t", "1", "-ngl", str(layers), **environment)
    assert (ended.stdout + ended.stderr).count("multi-seq split replay matched") == 2
    return set(log.read_text().splitlines())


def _compile(engine: Engine, files: list[Path], target: Path, options: list[str]) -> None:
    ggml = upstream_source() / "llama.cpp" / "ggml"
    command = [find_compilers("cpu")["C++"].path, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    command += ["-isystem", str(ggml / "include"), "-isystem", str(ggml / "src"), f"-I{OPERATORS}", *options]
    compile_once([*command, *map(str, files), *ggml_libraries(engine)], target)


def compile_shim(name: str, folder: Path) -> Path:
    """Compile tests/native/NAME, in C, into a library for LD_PRELOAD in `folder`."""
    library = folder / f"{Path(name).stem}.so"
    options = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    compile_once([find_compilers("cpu")["C"].path, *options, str(NATIVE / name)], library)
    return library


def ggml_libraries(engine: Engine) -> list[str]:
    """Linker options. The path has the build's key, so that a kept program runs the build under test."""
    lib = engine.lib.resolve()
    return [f"-L{lib}", "-lggml", "-lggml-cpu", "-lggml-base", "-ldl", f"-Wl,-rpath,{lib}"]


if __name__ == "__main__":  # FOLDER: for tools/bench-gpu --rehearse
    print(compile_backend(ensure(tests=True), Path(sys.argv[1]).resolve()))
