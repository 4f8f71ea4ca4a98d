"""0004-kimi-linear-q-lora-rank: checkpoints with query compression load and run correctly."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_checkpoint import Spec
from synthetic_case import make_case, rewrite

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.errors import ValidateError

pytestmark = pytest.mark.engine

SPECS = [Spec(layers="KM", q_lora=24, seed=50), Spec(layers="MKMK", heads=4, q_lora=96, std=0.02, seed=51)]


@pytest.mark.parametrize(("spec", "flash_attention"), [(SPECS[0], False), (SPECS[1], True)], ids=str)
def test_compressed_queries_run_right(
    tmp_path: Path, spec: Spec, flash_attention: bool, engine: Engine
) -> None:
    case = make_case(tmp_path, spec)
    assert case.error(engine, flash_attention=flash_attention).passes


def test_the_norm_of_compressed_queries_has_the_models_epsilon(tmp_path: Path, engine: Engine) -> None:
    case = make_case(tmp_path, SPECS[0], scaled={"q_a_proj": 2**-7})  # so small that an epsilon matters
    assert case.error(engine).passes


def test_a_missing_part_is_named(tmp_path: Path, engine: Engine) -> None:
    case = make_case(tmp_path, SPECS[0])
    missing = "blk.1.attn_q_a_norm.weight"
    damaged = tmp_path / "damaged.gguf"
    rewrite(case.gguf, damaged, lambda all_: {n: t for n, t in all_.items() if n != missing})
    with pytest.raises(ValidateError, match=missing):
        case.error(engine, damaged)
