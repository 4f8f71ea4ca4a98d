"""KDA_CONV and KDA_SCAN on CUDA: the kernels' own sources on the CPU, compared with float64.

Their code for ggml is in test_cuda_backend.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_program import NATIVE, OPERATORS, compile_cuda
from native_program import run_program

FOLDER = OPERATORS / "kda" / "cuda"
SOURCES = [*sorted({*FOLDER.glob("*.cu")} - {FOLDER / "kda-ggml.cu"}), NATIVE / "kda-test.cpp"]

# Kernels are launched early, as on a device of compute capability 9.0.
HOPPER = ["-D__CUDA_ARCH__=900", "-DCUDART_VERSION=13000"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("kda") / "kda-test"
    return compile_cuda(SOURCES, target, include=[FOLDER], options=HOPPER)


@pytest.mark.parametrize("group", ["conv", "steps", "chunks", "scan"])
def test_every_shape_gate_and_order_of_threads(group: str, program: Path) -> None:
    assert ", 0 failed" in run_program(program, group).stdout


@pytest.mark.full  # compiling takes longest
def test_threads_never_race_in_shared_memory(tmp_path: Path) -> None:
    program = compile_cuda(SOURCES, tmp_path / "kda-races", include=[FOLDER], options=HOPPER, races=True)
    assert ", 0 failed" in run_program(program, "briefly").stdout
