"""Matmuls of one column on CUDA: our kernel and its host code on the emulator, next to upstream's kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_program import compile_with_mmvq
from native_program import run_program
from selection import some_of

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

TEST = "matvec-test"
# Kernels are launched early. Upstream's headers would include CUDA 12's if they knew a version.
HOPPER = ["-D__CUDA_ARCH__=900", "-DKIMI_CUDA_OVERLAPS"]
# Order of lanes, warps and blocks -> the guard at which buffers are placed.
ORDERS = {"forwards": "end", "backwards": "start", "7": "end"}


@pytest.fixture(scope="module")
def program(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels are launched early, and prefetch weights before they wait."""
    return compile_with_mmvq(engine, TEST, tmp_path_factory.mktemp("matvec"), options=HOPPER)


@pytest.mark.parametrize("order", some_of(ORDERS, "backwards"))
def test_products_groups_and_refusals(order: str, program: Path) -> None:
    said = run_program(program, KIMI_CUDA_ORDER=order, KIMI_CUDA_PLACEMENT=ORDERS[order]).stdout
    assert ", 0 failed" in said


@pytest.mark.full  # compiling takes minutes; the emulated device of test_cuda_backend.py is an older one, too
def test_products_on_a_device_before_hopper(engine: Engine, tmp_path: Path) -> None:
    assert ", 0 failed" in run_program(compile_with_mmvq(engine, TEST, tmp_path)).stdout


@pytest.mark.full  # compiling takes longest
def test_threads_never_race_in_shared_memory(engine: Engine, tmp_path: Path) -> None:
    program = compile_with_mmvq(engine, TEST, tmp_path, options=HOPPER, races=True)
    assert ", 0 failed" in run_program(program).stdout
