"""0067-tensors-at-cache-lines: tensors in buffers of the CPU backend begin at a cache line."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_program import compile_program, run_program

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine


def test_tensors_begin_at_a_cache_line(tmp_path: Path, engine: Engine) -> None:
    run_program(compile_program(engine, "aligned-tensors-test.cpp", tmp_path))


def test_upstream_puts_tensors_into_the_middle_of_a_line(tmp_path: Path, upstream: Engine) -> None:
    with pytest.raises(AssertionError, match="FAILED the .* begins at"):
        run_program(compile_program(upstream, "aligned-tensors-test.cpp", tmp_path))
