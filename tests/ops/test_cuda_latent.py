"""Latent attention on CUDA: the kernels' own sources on the CPU, against float64, in the cases of the CPU's own test.

The nodes are made by ggml and read by what reads them for ggml-cuda (tests/native/cuda/latent-cuda-test.cpp, and
latent-decompressed-test.cpp for LATENT_ATTN).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cuda_program import NATIVE, OPERATORS, compile_cuda

from kimi_gguf.engine.builds import Engine
from kimi_gguf.scripts.cuda_check import patched_ggml

pytestmark = pytest.mark.engine

FOLDER = OPERATORS / "latent_attention"
TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]


KERNELS = [FOLDER / "cuda" / "latent-attend.cu"]
GLUE = FOLDER / "cuda" / "latent-ggml.cu"
DECOMPRESSED = [FOLDER / "cuda" / f"latent-{part}.cu" for part in ("collect", "expand", "decompressed")]


def compile_test(engine: Engine, sources: list[Path], program: Path, *, races: bool = False) -> Path:
    ggml = patched_ggml()
    return compile_cuda(
        sources,
        program,
        include=[FOLDER, FOLDER / "cuda"],
        system=[ggml / folder for folder in ("include", "src", "src/ggml-cuda")],
        options=["-DGGML_CUDA_NO_VMM", "-Wno-unused-function", "-Wno-unused-parameter"],  # upstream's header
        link=[f"-L{engine.lib}", "-lggml", "-lggml-cpu", "-lggml-base", "-ldl", f"-Wl,-rpath,{engine.lib}"],
        races=races,
    )


def passes(program: Path, *types: str, **environment: str) -> None:
    ended = subprocess.run(
        [program, *types], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert ended.returncode == 0, "\n".join(ended.stdout.splitlines()[-20:]) + ended.stderr
    assert ", 0 failed" in ended.stdout


@pytest.fixture(scope="module")
def program(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("latent") / "latent-test"
    return compile_test(engine, [*KERNELS, NATIVE / "latent-cuda-test.cpp"], target)


@pytest.mark.parametrize("cache_type", TYPES)
def test_every_shape_mask_and_order_of_threads(cache_type: str, program: Path) -> None:
    passes(program, cache_type)


def test_nodes_that_the_kernels_do_not_fit_are_refused(program: Path) -> None:
    passes(program)


def test_no_races_in_shared_memory(engine: Engine, tmp_path: Path) -> None:
    sources = [*KERNELS, NATIVE / "latent-cuda-test.cpp"]
    program = compile_test(engine, sources, tmp_path / "races", races=True)
    passes(program, *TYPES, KIMI_CASES="8")


def test_which_nodes_of_ggml_are_taken(engine: Engine, tmp_path: Path) -> None:
    sources = [*KERNELS, *DECOMPRESSED, GLUE, NATIVE / "latent-glue-test.cu"]
    program = compile_test(engine, sources, tmp_path / "glue")
    ended = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "all as it should be\n"), ended.stderr
    assert ended.stderr.count("latent attention: FLASH_ATTN_EXT converts its cache to F16: a type") == 1


@pytest.fixture(scope="module")
def decompressed(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("decompressed") / "latent-test"
    return compile_test(engine, [*DECOMPRESSED, NATIVE / "latent-decompressed-test.cpp"], target)


@pytest.mark.parametrize("cache_type", TYPES)
def test_decompressed_every_shape_mask_and_order_of_threads(cache_type: str, decompressed: Path) -> None:
    passes(decompressed, cache_type)


def test_decompressed_nodes_that_the_kernels_do_not_fit_are_refused(decompressed: Path) -> None:
    passes(decompressed)


def test_decompressed_no_races_in_shared_memory(engine: Engine, tmp_path: Path) -> None:
    sources = [*DECOMPRESSED, NATIVE / "latent-decompressed-test.cpp"]
    program = compile_test(engine, sources, tmp_path / "races", races=True)
    passes(program, *TYPES, KIMI_CASES="17")
