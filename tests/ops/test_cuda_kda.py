"""KDA_CONV and KDA_SCAN on CUDA: the kernels' own sources on the CPU, against float64, and ggml's side of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_program import NATIVE, OPERATORS, compile_cuda

from kimi_gguf.engine.builds import Engine
from kimi_gguf.scripts.cuda_check import patched_ggml

FOLDER = OPERATORS / "kda" / "cuda"
GLUE = FOLDER / "kda-ggml.cu"
KERNELS = [path for path in sorted(FOLDER.glob("*.cu")) if path != GLUE]


def run(program: Path, *arguments: str) -> str:
    """What it says; the assertion shows its last lines."""
    ended = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, "\n".join(ended.stdout.splitlines()[-20:]) + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("kda") / "kda-test"
    return compile_cuda([*KERNELS, NATIVE / "kda-test.cpp"], target, include=[FOLDER])


@pytest.mark.parametrize("group", ["conv", "steps", "chunks", "scan"])
def test_every_shape_gate_and_order_of_threads(group: str, program: Path) -> None:
    assert ", 0 failed" in run(program, group)


def test_threads_never_race_in_shared_memory(tmp_path: Path) -> None:
    sources = [*KERNELS, NATIVE / "kda-test.cpp"]
    program = compile_cuda(sources, tmp_path / "kda-races", include=[FOLDER], races=True)
    assert ", 0 failed" in run(program, "briefly")


@pytest.mark.engine
def test_tensors_and_copies_of_states_reach_the_kernels(engine: Engine, tmp_path: Path) -> None:
    ggml = patched_ggml()
    program = compile_cuda(
        [*KERNELS, GLUE, NATIVE / "kda-glue-test.cu"],
        tmp_path / "kda-glue-test",
        include=[FOLDER],
        system=[ggml / folder for folder in ("include", "src", "src/ggml-cuda")],
        options=["-DGGML_CUDA_NO_VMM", "-Wno-unused-function", "-Wno-unused-parameter"],
        link=[f"-L{engine.lib}", "-lggml-base", f"-Wl,-rpath,{engine.lib}"],
    )
    assert "all as they should be" in run(program)
