"""Matmuls of ggml-cuda that share their input: upstream's kernels and their host code on the emulator, patched."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_program import compile_with_mmvq
from native_program import run_program

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine


def test_an_input_of_several_matmuls_is_quantized_once(engine: Engine, tmp_path: Path) -> None:
    assert ", 0 failed" in run_program(compile_with_mmvq(engine, "q8_1-test", tmp_path)).stdout
