"""0006-hybrid-one-kind-of-layer: models with KDA layers only, or MLA layers only, run correctly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from random_checkpoint import Spec
from synthetic_case import error_of, make_case

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.llama import RunOptions, run

pytestmark = pytest.mark.engine

LAYERS = ["K", "KKK", "M", "MMM"]
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "flash attention": {"flash_attention": True},
    "in pieces, then token by token": {"n_ubatch": 16, "step_from": 60},
    "after a restore": {"save_restore_at": 50},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", LAYERS)
def test_one_kind_of_layer_runs_right(tmp_path: Path, layers: str, way: str, engine: Engine) -> None:
    assert make_case(tmp_path, Spec(layers=layers, seed=70)).error(engine, **WAYS[way]).passes


@pytest.mark.parametrize("layers", LAYERS)
def test_upstream_fails(tmp_path: Path, layers: str, upstream: Engine) -> None:
    with pytest.raises(ValidateError, match="SIGABRT"):
        make_case(tmp_path, Spec(layers=layers, seed=70)).error(upstream)


@pytest.mark.parametrize("layers", ["KK", "MM"])
def test_two_sequences_do_not_mix(tmp_path: Path, layers: str, engine: Engine) -> None:
    case = make_case(tmp_path, Spec(layers=layers, seed=71))
    together = run(engine, case.gguf, [case.ids, case.ids[::-1]], RunOptions(threads=1)).logits[0]
    assert error_of(together, case.logits).worst <= 1e-8
