"""CUDA kernels of ours and of tests/native/cuda as programs for the CPU: the emulator, with its warnings as errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emulators.cuda import compile_program

NATIVE = Path(__file__).parents[1] / "native" / "cuda"
OPERATORS = Path(__file__).parents[2] / "ggml_ops"


def compile_cuda(
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
    """As compile_program; #include "…" also finds what lies in tests/native, ggml_ops and its common/cuda."""
    return compile_program(
        sources,
        program,
        include=[*include, NATIVE.parent, OPERATORS, OPERATORS / "common", OPERATORS / "common" / "cuda"],
        system=system,
        options=["-Werror", *options],
        link=link,
        architecture=architecture,
        races=races,
        fast_math=fast_math,
        compiler=compiler,
    )
