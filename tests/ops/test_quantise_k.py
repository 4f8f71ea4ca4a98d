"""The vectorised search of K-quants produces the same bytes as ggml's own loops (ggml_ops/quantize_k).

Whole models compared with upstream's llama-quantize: test_convert_like_quantize.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from native_program import compile_program, run_program

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine


def test_the_bytes_of_single_blocks_at_every_width_of_vectors(tmp_path: Path, engine: Engine) -> None:
    program = compile_program(
        engine, "quantise-k-test.cpp", tmp_path, (), options=("-O2", "-ffp-contract=off", "-Wno-psabi")
    )
    run_program(program)
