"""Linux is asked for huge pages for large CPU buffers and for mapped models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from native_program import compile_program, run_program

from kimi_gguf.engine.builds import Engine, upstream_source

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this system has no transparent huge pages"),
]


def test_linux_is_asked_for_huge_pages(
    tmp_path: Path, engine: Engine, demo_gguf: Callable[[str], Path]
) -> None:
    llama = ("-isystem", str(upstream_source() / "llama.cpp" / "include"), "-rdynamic")
    linked = (f"-L{engine.lib}", "-Wl,--no-as-needed", "-lllama")
    program = compile_program(engine, "huge-pages-test.cpp", tmp_path, options=(*llama, *linked))
    run_program(program, demo_gguf("Q8_0"))
