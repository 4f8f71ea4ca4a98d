"""A decoded token's matmuls on CUDA, and the nodes around them: our kernels and their host code on the emulator.

Matmuls of one column are compared with upstream's kernel, norms and the new key of an MLA layer with float64.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_program import compile_with_mmvq
from native_program import run_program
from selection import some_of

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

# Program -> what it needs of the patched ggml-cuda, in addition to its matmuls.
PROGRAMS = {
    "matvec-test": (),
    "norm-test": ("kimi/norm.cu",),
    "latent-store-test": ("kimi/latent-store.cu", "set-rows.cu"),
}
# Kernels are launched early. Upstream's headers would include CUDA 12's if they knew a version.
HOPPER = ["-D__CUDA_ARCH__=900", "-DKIMI_CUDA_OVERLAPS"]
# Order of lanes, warps and blocks -> the guard at which buffers are placed.
ORDERS = {"forwards": "end", "backwards": "start", "7": "end"}


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    test = request.param
    folder = tmp_path_factory.mktemp(test)
    return compile_with_mmvq(engine, test, folder, more=PROGRAMS[test], options=HOPPER)


@pytest.mark.parametrize("order", some_of(ORDERS, "backwards"))
def test_values_and_refusals(order: str, program: Path) -> None:
    said = run_program(program, KIMI_CUDA_ORDER=order, KIMI_CUDA_PLACEMENT=ORDERS[order]).stdout
    assert ", 0 failed" in said


@pytest.mark.full  # compiling takes minutes; the emulated device of test_cuda_backend.py is an older one, too
@pytest.mark.parametrize("test", PROGRAMS)
def test_a_device_before_hopper(test: str, engine: Engine, tmp_path: Path) -> None:
    program = compile_with_mmvq(engine, test, tmp_path, more=PROGRAMS[test])
    assert ", 0 failed" in run_program(program).stdout


@pytest.mark.full  # compiling takes longest
@pytest.mark.parametrize("test", PROGRAMS)
def test_threads_never_race_in_shared_memory(test: str, engine: Engine, tmp_path: Path) -> None:
    program = compile_with_mmvq(engine, test, tmp_path, more=PROGRAMS[test], options=HOPPER, races=True)
    assert ", 0 failed" in run_program(program).stdout
