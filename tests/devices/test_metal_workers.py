"""A worker on an emulated Metal device."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_program import compile_program, run_program
from rpc_workers import rpc_workers

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine


def test_attention_gets_the_memory_that_the_workers_device_needs(
    engine: Engine, metal_backend: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its absorbed attention writes the results of splits behind the result."""
    program = compile_program(engine, "rpc-size-test.cpp", tmp_path)
    monkeypatch.setenv("GGML_BACKEND_PATH", str(metal_backend))
    with rpc_workers(engine, tmp_path, 1, "--device", "MTL0") as [worker]:
        run_program(program, metal_backend, worker.endpoint)
