"""Matmuls of one column on CUDA: our kernel and its host code on the emulator, next to upstream's kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_program import GGML_OPTIONS, NATIVE, SHARED
from emulators.cuda import compile_objects, link_program
from native_program import ggml_libraries, run_program

from kimi_gguf.engine.builds import Engine
from kimi_gguf.scripts.cuda_check import patched_ggml

pytestmark = pytest.mark.engine


def test_products_groups_and_refusals(engine: Engine, tmp_path: Path) -> None:
    ggml = patched_ggml()
    upstream = ggml / "src" / "ggml-cuda"
    objects = compile_objects(
        [
            upstream / "mmvq.cu",
            upstream / "quantize.cu",
            upstream / "kimi" / "matvec.cu",
            NATIVE / "matvec-test.cu",
        ],
        tmp_path,
        include=[*SHARED, NATIVE, upstream],
        system=[ggml / "include", ggml / "src", upstream],
        options=[*GGML_OPTIONS, "-O1", "-w"],
    )
    program = link_program(objects, tmp_path / "matvec-test", link=ggml_libraries(engine))
    assert ", 0 failed" in run_program(program).stdout
