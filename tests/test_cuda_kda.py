"""KDA_CONV and KDA_SCAN on CUDA: the kernels' own sources on the CPU, against float64 (tests/native/cuda/kda-test.cpp)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_program import NATIVE, OPERATORS, compile_cuda

FOLDERS = [OPERATORS / operator / "cuda" for operator in ("kda_common", "kda_conv", "kda_scan")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kernels = [path for folder in FOLDERS for path in sorted(folder.glob("*.cu")) if path.name != "kda-ggml.cu"]
    target = tmp_path_factory.mktemp("kda") / "kda-test"
    return compile_cuda([*kernels, NATIVE / "kda-test.cpp"], target, include=FOLDERS)


@pytest.mark.parametrize("group", ["conv", "steps", "chunks", "scan"])
def test_every_shape_gate_and_order_of_threads(group: str, program: Path) -> None:
    ended = subprocess.run([program, group], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, "\n".join(ended.stdout.splitlines()[-20:]) + ended.stderr
    assert ", 0 failed" in ended.stdout
