"""Compiles our CUDA sources for each architecture and reports registers, spills and shared memory.

Input: the .cu files under ggml_ops. Output: ptxas's figures for each kernel, as a table. No GPU is needed, only
nvcc: of the CUDA toolkit, or of the Python packages of the extra `cuda`.

    EXTRAS=build,cuda tools/run cuda_check
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kimi_gguf.engine.builds import upstream_source
from kimi_gguf.engine.errors import EngineError, install
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.patches.series import load_series
from kimi_gguf.patches.tree import Tree

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = ROOT / "ggml_ops"
STUBS = ROOT / "tests" / "emulators" / "cuda" / "stubs"  # headers that nvcc needs without a toolkit

# Turing, without the code that needs Ampere's instructions, Ampere (A100, RTX 30), Ada, Hopper, Blackwell (two)
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

# As in ggml-cuda's CMakeLists.txt.
OPTIONS = ("-std=c++17", "-O3", "-use_fast_math", "-extended-lambda")

# Upstream's kernels for pairs of cache types are not compiled, only the code that calls them.
_FATTN_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16")
DEFINITIONS = (
    "-DGGML_CUDA_NO_VMM",
    '-DGGML_CUDA_FA_QUANTS="none"',
    *(f"-DGGML_CUDA_FA_{k}_{v}=0" for k in _FATTN_TYPES for v in _FATTN_TYPES),
)

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_\w+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class KernelUse:
    """Resources of one kernel on one architecture, in bytes, except the registers per thread."""

    source: str
    architecture: int
    name: str
    registers: int
    stack: int  # of local memory, spills and arrays that do not fit into registers
    spills: int  # stored and loaded
    shared: int  # static

    @property
    def clean(self) -> bool:
        """Whether all values of a thread are in registers."""
        return self.stack == self.spills == 0


def find_nvcc() -> Path:
    """$CUDACXX, nvcc on PATH or in /usr/local/cuda, or the Python packages'. Raises `EngineError` if there is none."""
    chosen = os.environ.get("CUDACXX")
    for name in shlex.split(chosen)[:1] if chosen else ("nvcc", "/usr/local/cuda/bin/nvcc"):
        if (found := shutil.which(name)) is not None:
            return Path(found)
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for path in sorted(Path(folder).glob("cu*/bin/nvcc")):
            return path
    raise EngineError(
        "no nvcc found",
        expected="CUDACXX in the environment, nvcc on PATH or in /usr/local/cuda, or its Python packages",
        found=f"CUDACXX={chosen}, which is not a program" if chosen else "none of them",
        todo="install NVIDIA's CUDA toolkit, or in the checkout: "
        f"{install('-e', '.[cuda]')} (100 MB to fetch, 270 MB on disk)",
    )


def cuda_sources() -> list[Path]:
    """All .cu files of our operators."""
    return sorted(OPERATORS.glob("**/*.cu"))


def compile_cuda(source: Path, architecture: int) -> list[KernelUse]:
    """ptxas's figures for each kernel of a source. Raises `EngineError` with the compiler's output if it fails."""
    ggml = patched_ggml()
    folders = [
        OPERATORS, *sorted(OPERATORS.glob("*/")), *sorted(OPERATORS.glob("*/cuda/")),
        ggml / "include", ggml / "src", ggml / "src" / "ggml-cuda", STUBS,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [
                str(find_nvcc()), *OPTIONS, *DEFINITIONS, "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin",
                "-gencode", f"arch=compute_{architecture},code=sm_{architecture}",
                *(f"-I{path}" for path in folders), str(source), "-o", str(Path(folder) / "out.cubin"),
            ], capture_output=True, text=True, check=False,
        )  # fmt: skip
    if ended.returncode != 0:
        raise EngineError(
            f"{source.name} does not compile for sm_{architecture}",
            found=ended.stderr.strip() or ended.stdout.strip(),
            todo="correct what the compiler shows",
        )
    return _kernels(source, architecture, ended.stdout + ended.stderr)


@functools.cache
def patched_ggml(backend: str = "cuda") -> Path:
    """A folder `ggml` with ggml's headers and a backend's patched sources; removed when the process exits."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    root = Path(folder.name)
    tree = Tree(upstream_source() / "llama.cpp")
    load_series().apply(tree)
    for path in tree.paths():
        used = path.startswith(("ggml/include/", f"ggml/src/ggml-{backend}/"))
        header = PurePosixPath(path).match("ggml/src/*.h")
        if (used or header) and (content := tree.read(path)) is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
    return root / "ggml"


def _kernels(source: Path, architecture: int, said: str) -> list[KernelUse]:
    found = list(_KERNEL.finditer(said))
    names = _demangled([each["name"] for each in found])
    kernels = []
    for each, name in zip(found, names, strict=True):
        stack, stores, loads, registers = (
            int(each[key]) for key in ("stack", "stores", "loads", "registers")
        )
        shared = re.search(r"(\d+) bytes smem", each["rest"])
        smem = int(shared[1]) if shared else 0
        kernels.append(
            KernelUse(source.name, architecture, name, registers, stack, spills=stores + loads, shared=smem)
        )
    return kernels


def _demangled(names: Sequence[str]) -> list[str]:
    """Names without their parameters; unchanged if c++filt is missing."""
    program = shutil.which("c++filt")
    if program is None or not names:
        return list(names)
    said = subprocess.run([program, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    parameters = r"\((?!anonymous)[^()]*(\([^()]*\)[^()]*)*\)$"  # not (type)4 of a template's argument
    return [re.sub(rf"^void |{parameters}|\(anonymous namespace\)::", "", line) for line in said]


def table(kernels: Sequence[KernelUse]) -> list[str]:
    """Markdown: a row for each kernel, a column of registers for each architecture; stack and spills if any."""
    architectures = sorted({each.architecture for each in kernels})
    rows: dict[tuple[str, str], dict[int, KernelUse]] = {}
    for each in kernels:
        rows.setdefault((each.source, each.name), {})[each.architecture] = each
    lines = ["| source | kernel | shared | " + " | ".join(f"sm_{each}" for each in architectures) + " |"]
    lines += ["| --- | --- |" + " ---: |" * (1 + len(architectures))]
    for (source, name), uses in sorted(rows.items()):
        cells = [_cell(uses[each]) if each in uses else "" for each in architectures]
        shared = max(each.shared for each in uses.values())
        lines.append(f"| {source} | `{name}` | {shared} | {' | '.join(cells)} |")
    return lines


def _cell(use: KernelUse) -> str:
    return str(use.registers) if use.clean else f"{use.registers}, stack {use.stack}, spills {use.spills}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cuda_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help=".cu files (default: all of ggml_ops)")
    options = parser.parse_args(arguments)
    kernels: list[KernelUse] = []
    try:
        for source in options.sources or cuda_sources():
            for architecture in ARCHITECTURES:
                kernels += compile_cuda(source, architecture)
    except KimiError as error:
        print(f"cuda_check: error: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(kernels)))
    return 0 if all(each.clean for each in kernels) else 3


if __name__ == "__main__":
    sys.exit(main())
