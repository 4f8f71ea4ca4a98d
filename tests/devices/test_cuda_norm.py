"""The nodes around a decoded token's matmuls on CUDA: norms with residuals and Q8_1, the new key of an MLA layer."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_program import compile_with_mmvq
from native_program import run_program
from selection import some_of

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

# Program -> what it tests, in the patched ggml-cuda, and what it needs there.
PROGRAMS = {
    "norm-test": ("kimi/norm.cu",),
    "latent-store-test": ("kimi/latent-store.cu", "set-rows.cu"),
}
# Order of lanes, warps and blocks -> the guard at which buffers are placed.
ORDERS = {"forwards": "end", "backwards": "start", "7": "end"}


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return compile_with_mmvq(engine, request.param, folder, more=PROGRAMS[request.param])


@pytest.mark.parametrize("order", some_of(ORDERS, "backwards"))
def test_values_and_refusals(order: str, program: Path) -> None:
    said = run_program(program, KIMI_CUDA_ORDER=order, KIMI_CUDA_PLACEMENT=ORDERS[order]).stdout
    assert ", 0 failed" in said


@pytest.mark.full  # compiling takes longest
@pytest.mark.parametrize("test", PROGRAMS)
def test_threads_never_race_in_shared_memory(test: str, engine: Engine, tmp_path: Path) -> None:
    assert (
        ", 0 failed"
        in run_program(compile_with_mmvq(engine, test, tmp_path, more=PROGRAMS[test], races=True)).stdout
    )
