"""Matmuls of one column on CUDA: our kernel and its host code on the emulator, next to upstream's kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_program import compile_with_mmvq
from native_program import run_program

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine


def test_products_groups_and_refusals(engine: Engine, tmp_path: Path) -> None:
    assert ", 0 failed" in run_program(compile_with_mmvq(engine, "matvec-test", tmp_path)).stdout
