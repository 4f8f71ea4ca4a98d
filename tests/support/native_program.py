"""Small C++ programs against a build's ggml: what pytest compiles from tests/native and runs.

In: a build, a source file and the folders of our operators that it includes. Out: the path of the program,
compiled with all warnings as errors. Its headers are pristine upstream's, which patches never change for
others, and those of ggml_ops.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kimi_gguf.engine.builds import Engine, ensure, upstream_source
from kimi_gguf.engine.toolchain import find_compilers

ROOT = Path(__file__).parents[2]
OPERATORS = ROOT / "ggml_ops"


def compile_program(
    engine: Engine,
    name: str,
    folder: Path,
    operators: tuple[str, ...],
    sources: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> Path:
    """Compile tests/native/NAME and further `sources` of ggml_ops into `folder`, linked to the build's ggml.

    operators: folders of ggml_ops whose headers are wanted.
    options: of the compiler, further ones. `CalledProcessError` where it does not compile.
    """
    program = folder / Path(name).stem
    files = [ROOT / "tests" / "native" / name, *(OPERATORS / each for each in sources)]
    _compile(engine, files, program, [*(f"-I{OPERATORS / each}" for each in operators), *options])
    return program


def compile_backend(engine: Engine, folder: Path) -> Path:
    """Compile native/second_backend.cpp into a shared library that ggml_backend_load takes."""
    library = folder / "libsecond.so"
    _compile(engine, [ROOT / "tests" / "native" / "second_backend.cpp"], library, ["-fPIC", "-shared"])
    return library


def _compile(engine: Engine, files: list[Path], target: Path, options: list[str]) -> None:
    ggml = upstream_source() / "llama.cpp" / "ggml"
    command = [find_compilers("cpu")["C++"].path, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    command += ["-isystem", str(ggml / "include"), "-isystem", str(ggml / "src"), f"-I{OPERATORS}", *options]
    command += [*map(str, files), "-o", str(target)]
    command += [f"-L{engine.lib}", "-lggml", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{engine.lib}"]
    subprocess.run(command, check=True)


if __name__ == "__main__":  # FOLDER: for scripts/bench-gpu --rehearse
    print(compile_backend(ensure(tests=True), Path(sys.argv[1]).resolve()))
