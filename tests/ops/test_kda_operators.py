"""KDA_CONV and KDA_SCAN: our program compares with float64, upstream's program compares with the plain path."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_program import compile_program, passed_cases, run_program

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("cases", ["3", pytest.param("1", marks=pytest.mark.full)], ids=["some", "all"])
def test_every_shape_gate_and_number_of_threads(cases: str, tmp_path: Path, engine: Engine) -> None:
    program = compile_program(engine, "test-kda.cpp", tmp_path, ("kda",))
    run_program(program, KIMI_CASES=cases)


@pytest.mark.parametrize("operator", ["KDA_CONV", "KDA_SCAN", "LATENT_ATTN"])
def test_kernels_agree_with_the_plain_path(operator: str, engine: Engine) -> None:
    assert passed_cases(engine, "CPU", operator) > 10, "no cases of the operator were run"
