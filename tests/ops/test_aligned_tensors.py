"""0067-tensors-at-cache-lines: tensors in buffers of the CPU backend begin at a cache line, mapped ones need not."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader
from native_program import compile_program, run_program
from random_checkpoint import Spec
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine, upstream_source

pytestmark = pytest.mark.engine


def test_tensors_begin_at_a_cache_line(tmp_path: Path, engine: Engine) -> None:
    run_program(compile_program(engine, "aligned-tensors-test.cpp", tmp_path))


def test_upstream_puts_tensors_into_the_middle_of_a_line(tmp_path: Path, upstream: Engine) -> None:
    with pytest.raises(AssertionError, match=r"FAILED the .* begins at"):
        run_program(compile_program(upstream, "aligned-tensors-test.cpp", tmp_path))


@pytest.mark.parametrize("remainder", [0, 32])
def test_a_model_is_mapped_wherever_its_file_has_the_tensors(
    remainder: int, tmp_path: Path, engine: Engine
) -> None:
    model = make_gguf(tmp_path, Spec(seed=67), "F16")
    position = (remainder - GGUFReader(model).data_offset) % 64
    embedded = tmp_path / "embedded"
    embedded.write_bytes(bytes(position) + model.read_bytes())
    headers = upstream_source() / "llama.cpp" / "include"
    llama = ("-isystem", str(headers), f"-L{engine.lib.resolve()}", "-Wl,--no-as-needed", "-lllama")
    program = compile_program(engine, "mapped-model-test.cpp", tmp_path, options=llama)
    run_program(program, embedded, str(position))
