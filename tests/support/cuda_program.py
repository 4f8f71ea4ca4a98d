"""Our CUDA kernels and those of tests/native/cuda as CPU programs: the emulator, with warnings as errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import native_program
from emulators.cuda import compile_objects, link_program
from native_program import OPERATORS, ggml_libraries

from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.cuda_check import patched_ggml

NATIVE = native_program.NATIVE / "cuda"
SHARED = [native_program.NATIVE, OPERATORS, OPERATORS / "common", OPERATORS / "common" / "cuda"]
LATENT = OPERATORS / "latent_attention" / "cuda"
LATENT_GLUE = [LATENT / "latent-ggml.cu", LATENT / "latent-runs.cu"]  # they need ggml-cuda's headers
LATENT_STORE = LATENT / "latent-store.cu"  # so does this
LATENT_KERNELS = sorted({*LATENT.glob("*.cu")} - {*LATENT_GLUE, LATENT_STORE})
# As for a GeForce of compute capability 12.0: kernels are launched early (from 9.0 on), and weighted values
# may be summed in halves.
GEFORCE = ["-D__CUDA_ARCH__=1200", "-DCUDART_VERSION=13000"]
AMPERE = ["-D__CUDA_ARCH__=860"]
GGML_OPTIONS = [
    "-DGGML_CUDA_NO_VMM",
    "-Wno-unused-function",
    "-Wno-unused-parameter",
]  # for upstream's headers


def compile_cuda(
    sources: Sequence[Path],
    program: Path,
    *,
    include: Sequence[Path] = (),
    options: Sequence[str] = (),
    link: Sequence[str] = (),
    compiler: str | None = None,
    others: tuple[Sequence[Path], Sequence[str]] = ((), ()),
    **rest: Any,
) -> Path:
    """Compile as compile_objects and link; #include "…" also finds files in SHARED.

    others: more sources, and their options.
    """
    objects = []
    for number, (files, chosen) in enumerate(((sources, options), others)):
        objects += compile_objects(
            files,
            program.with_suffix(f".work{number}"),
            include=[*include, *SHARED],
            options=["-Werror", *GGML_OPTIONS, *chosen],
            compiler=compiler,
            **rest,
        )
    return link_program(objects, program, link=link, compiler=compiler)


def compile_with_mmvq(
    engine: Engine,
    test: str,
    folder: Path,
    *,
    more: Sequence[str] = (),
    options: Sequence[str] = (),
    races: bool = False,
) -> Path:
    """The program of tests/native/cuda/TEST.cu, with the patched ggml-cuda's matmuls of one to eight columns.

    more: other sources of the patched ggml-cuda.
    """
    ggml = patched_ggml()
    upstream = ggml / "src" / "ggml-cuda"
    kernels = [upstream / name for name in ("mmvq.cu", "quantize.cu", "kimi/matvec.cu", *more)]
    objects = compile_objects(
        [*kernels, NATIVE / f"{test}.cu"],
        folder,
        include=[*SHARED, NATIVE, upstream],
        system=[ggml / "include", ggml / "src", upstream],
        options=[*GGML_OPTIONS, "-O1", "-w", *options],
        races=races,
    )
    return link_program(objects, folder / test, link=ggml_libraries(engine))


def compile_with_ggml(
    engine: Engine, sources: Sequence[Path], program: Path, *, ggml: Path | None = None, **others: Any
) -> Path:
    """Compile as compile_cuda with the headers of `ggml`, by default the patched one; link to the build's libraries."""
    headers = [(ggml or patched_ggml()) / folder for folder in ("include", "src", "src/ggml-cuda")]
    return compile_cuda(sources, program, system=headers, link=ggml_libraries(engine), **others)
