"""0002-f32-cache-stays-f32: flash attention reads an F32 cache in F32, on each of the CPU's paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from native_program import compile_program, run_program
from random_checkpoint import Spec
from synthetic_case import Case, make_case

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

TOKENS = 300  # more than 256: the cache then has 512 cells, and keys are split over threads
PATHS: dict[str, dict[str, Any]] = {
    "tiled": {},  # 64 or more queries
    "one chunk": {"n_ubatch": 16},
    "split over keys": {"step_from": TOKENS - 4},  # one query
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("f32-cache"), Spec(layers="KMKM", heads=4, seed=40), TOKENS)


@pytest.mark.parametrize("path", PATHS)
def test_flash_attention_keeps_the_precision_of_an_f32_cache(case: Case, path: str, engine: Engine) -> None:
    assert case.error(engine, flash_attention=True, **PATHS[path]).passes


def test_the_latent_of_the_48b_in_f32(tmp_path: Path, engine: Engine) -> None:
    spec = Spec(layers="KM", kv_lora=512, nope=128, rope=64, v_dim=128, seed=41)
    case = make_case(tmp_path, spec)
    assert case.error(engine, flash_attention=True).passes


@pytest.mark.parametrize("cache_type", ["F16", "Q8_0"])
def test_other_cache_types_are_read_as_before(tmp_path: Path, cache_type: str, engine: Engine) -> None:
    spec = Spec(layers="KM", kv_lora=64, rope=32, seed=42)
    case = make_case(tmp_path, spec)
    plain = case.error(engine, cache_type="F32")
    rounded = case.error(engine, cache_type=cache_type, flash_attention=True)
    assert plain.in_all < rounded.in_all < 1e-2


def test_a_cache_that_its_device_cannot_read_is_copied_once(tmp_path: Path, engine: Engine) -> None:
    program = compile_program(
        engine, "test_fattn_f32.cpp", tmp_path, ("llama/f32_cache",), ("llama/f32_cache/llama-fattn-f32.cpp",)
    )
    run_program(program)
