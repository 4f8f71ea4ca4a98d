"""Large CPU buffers are given huge pages where Linux has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_program import compile_program, run_program

from kimi_gguf.engine.builds import Engine

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this system has no transparent huge pages"),
]


def test_linux_is_asked_for_huge_pages(tmp_path: Path, engine: Engine) -> None:
    run_program(compile_program(engine, "huge-pages-test.cpp", tmp_path))
