"""MUL_MAT of many matrices with one row each is correct for any number of threads and matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_program import compile_program, run_program

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine


def test_each_matrix_gives_the_same_bits_for_any_number_of_threads(tmp_path: Path, engine: Engine) -> None:
    run_program(compile_program(engine, "one-row-test.cpp", tmp_path))
