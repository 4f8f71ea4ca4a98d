"""KDA_CONV and KDA_SCAN: our program against float64, and upstream's comparison of kernels with the plain path."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from native_program import compile_program

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine


def test_every_shape_gate_and_number_of_threads(tmp_path: Path, engine: Engine) -> None:
    program = compile_program(engine, "test-kda.cpp", tmp_path, ("kda",))
    ended = subprocess.run([program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, "\n".join(ended.stdout.splitlines()[-20:])
    assert ", 0 failed" in ended.stdout


@pytest.mark.parametrize("operator", ["KDA_CONV", "KDA_SCAN"])
def test_kernels_agree_with_the_plain_path(operator: str, engine: Engine) -> None:
    ended = subprocess.run(
        [engine.bin / "test-backend-ops", "test", "-b", "CPU", "-o", operator],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:]
    passed = [line for line in ended.stdout.splitlines() if operator in line and "OK" in line]
    assert len(passed) > 10, "no cases of the operator were run"
