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
KERNELS = {
    "absorbed": [FOLDER / "cuda" / "latent-attend.cu"],
    "decompressed": [FOLDER / "cuda" / f"latent-{part}.cu" for part in ("collect", "expand", "decompressed")],
}
TESTS = {"absorbed": "latent-cuda-test.cpp", "decompressed": "latent-decompressed-test.cpp"}
EVERY = {"absorbed": "8", "decompressed": "17"}  # so manieth case for races


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


@pytest.fixture(scope="module", params=KERNELS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def program(form: str, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("latent") / "latent-test"
    return compile_test(engine, [*KERNELS[form], NATIVE / TESTS[form]], target)


@pytest.mark.parametrize("cache_type", TYPES)
def test_every_shape_mask_and_order_of_threads(cache_type: str, program: Path) -> None:
    passes(program, cache_type)


def test_nodes_that_the_kernels_do_not_fit_are_refused(program: Path) -> None:
    passes(program)


def test_no_races_in_shared_memory(form: str, engine: Engine, tmp_path: Path) -> None:
    program = compile_test(engine, [*KERNELS[form], NATIVE / TESTS[form]], tmp_path / "races", races=True)
    passes(program, *TYPES, KIMI_CASES=EVERY[form])


def test_which_nodes_of_ggml_are_taken(engine: Engine, tmp_path: Path) -> None:
    sources = [*KERNELS["absorbed"], *KERNELS["decompressed"], FOLDER / "cuda" / "latent-ggml.cu"]
    program = compile_test(engine, [*sources, NATIVE / "latent-glue-test.cu"], tmp_path / "glue")
    ended = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "all as it should be\n"), ended.stderr
    assert ended.stderr.count("latent attention: FLASH_ATTN_EXT converts its cache to F16: a type") == 1
