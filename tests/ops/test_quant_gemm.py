"""Matmuls of quantised weights on the CPU: the kernels compared with float64, and models with and without them.

Upstream's comparison of MUL_MAT and MUL_MAT_ID with its plain path is in test_upstream_programs.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from native_program import compile_program, run_program
from numpy.typing import NDArray
from random_checkpoint import Spec
from synthetic_case import make_gguf

from kimi_gguf.bench.programs import ggml_flags, program
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.toolchain import cpuinfo
from kimi_gguf.validate.llama import RunOptions, run_logits

pytestmark = pytest.mark.engine

TOKENS = 96
LONGEST = 60  # seconds. The programs need about 2; one that is stopped fails the test.
# All experts are used, so that no near tie of the router changes which of them are compared.
SPEC = Spec(layers="KM", hidden=96, intermediate=160, moe_intermediate=64, experts=2, experts_used=2, seed=60)


@pytest.fixture(scope="module", params=["Q8_0", "BF16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("products")
    return make_gguf(folder, SPEC, request.param)


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    return np.random.default_rng(60).integers(0, 300, TOKENS)


def logits(
    engine: Engine,
    model: Path,
    ids: NDArray[np.int64],
    monkeypatch: pytest.MonkeyPatch,
    choice: str,
    threads: int = 1,
) -> NDArray[np.float64]:
    monkeypatch.setenv("KIMI_OPS", choice)
    return np.asarray(run_logits(engine, model, ids, RunOptions(threads=threads)), np.float64)


@pytest.mark.parametrize("cases", ["13", pytest.param("1", marks=pytest.mark.full)], ids=["some", "all"])
@pytest.mark.parametrize("name", ["quant-gemm-test.cpp", "quant-gemm-gated-test.cpp"])
def test_every_type_layout_shape_and_number_of_threads(
    name: str, cases: str, tmp_path: Path, engine: Engine
) -> None:
    program = compile_program(engine, name, tmp_path, ("matmul",))
    for switch in "01":
        run_program(program, KIMI_CASES=cases, KIMI_PREFETCH_IN_ORDER=switch, KIMI_AMX=switch)


def test_a_model_has_the_logits_of_upstreams_matmuls(
    engine: Engine, model: Path, ids: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = logits(engine, model, ids, monkeypatch, "conv,scan,mla,matmul")
    upstream = logits(engine, model, ids, monkeypatch, "conv,scan,mla")
    assert not (ours == upstream).all(), (
        "the switch does nothing: sums in another order differ in their last bits"
    )
    # Sums that differ in the last bit can change the rounding of a later activation to a quant.
    assert np.square(ours - upstream).sum() <= 1e-4 * np.square(upstream).sum()


@pytest.mark.skipif("amx_bf16" not in cpuinfo("flags").split(), reason="the processor has no AMX")
def test_tile_registers_are_used_and_can_be_turned_off(
    engine: Engine, tmp_path: Path, ids: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_gguf(tmp_path, SPEC, "BF16")
    found = {}
    for switch in "01":
        monkeypatch.setenv("KIMI_AMX", switch)
        found[switch] = logits(engine, model, ids, monkeypatch, "require")
    assert not (found["0"] == found["1"]).all(), "sums of BF16 in another order differ in their last bits"
    assert np.square(found["0"] - found["1"]).sum() <= 1e-4 * np.square(found["0"]).sum()


def test_the_same_bits_for_any_number_of_threads(
    engine: Engine, model: Path, ids: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = logits(engine, model, ids, monkeypatch, "require", 1)
    for threads in (2, 33):
        many = logits(engine, model, ids, monkeypatch, "require", threads)
        np.testing.assert_array_equal(one, many, f"{threads} threads")


@pytest.mark.skipif(sys.platform == "darwin", reason="without OpenMP, ggml's own barrier spins")
@pytest.mark.parametrize(
    "case",
    [
        ("product-rows", "weights=q4_K", "tokens=64", "rows=2304", "k=2304"),
        ("scan", "tokens=64", "layers=1"),
        ("latent", "tokens=256", "keys=256", "type=f16", "weights=f16"),
    ],
    ids=lambda case: case[0],
)
def test_threads_without_a_processor_do_not_hold_up_the_others(case: tuple[str, ...], engine: Engine) -> None:
    """Our operators wait for other threads at ggml's barriers only, where threads sleep. A thread that waits in a loop
    uses processors that the others need. If a thread were never given a processor, the others would wait for it at the
    next barrier, and the program would not end."""
    operators = program("operators", ggml_flags(engine.lib))

    def work(threads: int) -> float:
        """Seconds of processors for the same number of calls; other programs do not change it much."""
        before = sum(os.times()[2:4])
        command = [operators, *case, f"threads={threads}", "seconds=0.001", "least=20"]
        subprocess.run(command, capture_output=True, check=True, timeout=LONGEST)
        return sum(os.times()[2:4]) - before

    assert work(100) < 6 * work(1)  # about twice; 56 times if KDA_SCAN waits in a loop
