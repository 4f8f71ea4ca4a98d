"""Weights in AMX buffers: any activations of a graph are multiplied by them, and 3D weights are left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from ggml_variant import sources
from native_program import compile_program, run_program

from kimi_gguf.engine.builds import Engine, upstream_source
from kimi_gguf.engine.toolchain import cpuinfo

pytestmark = pytest.mark.engine

FOLDER = "ggml/src/ggml-cpu/amx/"


@pytest.mark.skipif("avx512_vnni" not in cpuinfo("flags").split(), reason="the processor has no AVX-512 VNNI")
def test_a_weight_that_is_taken_is_multiplied_by_any_activations(tmp_path: Path, engine: Engine) -> None:
    """Tile registers are emulated: the processor does not need AMX."""
    tree = sources()
    (tmp_path / "amx").mkdir()
    for path in tree.paths():
        if path.startswith(FOLDER):
            (tmp_path / "amx" / Path(path).name).write_bytes(tree.read(path) or b"")
    headers = upstream_source() / "llama.cpp" / "ggml" / "src" / "ggml-cpu"
    options = ("-march=native", "-Wno-uninitialized", "-isystem", str(tmp_path), "-isystem", str(headers))
    run_program(compile_program(engine, "amx-test.cpp", tmp_path, options=options))
