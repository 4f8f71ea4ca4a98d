"""Matmuls of ggml-cuda that share their input: upstream's kernels and their host code on the emulator, patched."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_program import GGML_OPTIONS, NATIVE, SHARED
from emulators.cuda import compile_objects, link_program
from native_program import ggml_libraries, run_program

from kimi_gguf.engine.builds import Engine
from kimi_gguf.scripts.cuda_check import patched_ggml

pytestmark = pytest.mark.engine


def test_an_input_of_several_matmuls_is_quantized_once(engine: Engine, tmp_path: Path) -> None:
    ggml = patched_ggml()
    upstream = ggml / "src" / "ggml-cuda"
    objects = compile_objects(
        [
            upstream / "mmvq.cu",
            upstream / "quantize.cu",
            upstream / "kimi" / "matvec.cu",
            NATIVE / "q8_1-test.cu",
        ],
        tmp_path,
        include=[*SHARED, NATIVE, upstream],
        system=[ggml / "include", ggml / "src", upstream],
        options=[*GGML_OPTIONS, "-O0", "-w"],
    )
    program = link_program(objects, tmp_path / "q8_1-test", link=ggml_libraries(engine))
    assert ", 0 failed" in run_program(program).stdout
