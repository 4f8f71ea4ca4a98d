"""0006-hybrid-one-kind-of-layer: models with KDA layers only, or MLA layers only, run correctly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_reference import exact_logits
from random_checkpoint import Spec
from random_family import VOCAB_SIZE, FamilySpec, write_family
from synthetic_case import error_of, make_case

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run, run_logits

pytestmark = pytest.mark.engine

LAYERS = ["K", "KKK", "M", "MMM"]
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "flash attention": {"flash_attention": True},
    "in pieces, then token by token": {"n_ubatch": 16, "step_from": 60},
    "after a restore": {"save_restore_at": 50},
}


@pytest.mark.parametrize(
    ("layers", "way"), [*zip(LAYERS, WAYS, strict=True), ("M", "at once"), ("KKK", "after a restore")]
)
def test_one_kind_of_layer_runs_right(tmp_path: Path, layers: str, way: str, engine: Engine) -> None:
    assert make_case(tmp_path, Spec(layers=layers, seed=70)).error(engine, **WAYS[way]).passes


@pytest.mark.parametrize("layers", ["KK", "MM"])
def test_two_sequences_do_not_mix(tmp_path: Path, layers: str, engine: Engine) -> None:
    case = make_case(tmp_path, Spec(layers=layers, seed=71))
    together = run(engine, case.gguf, [case.ids, case.ids[::-1]], RunOptions(threads=1)).logits[0]
    assert error_of(together, case.logits).worst <= 1e-8


GLM = [FamilySpec("glm5-next", layers, rope=0, value=64, index_heads=8, seed=73) for layers in ("KK", "MM")]
FAMILY = [FamilySpec(arch, layers, seed=72) for arch in ("bailingmoe3", "kimi-k3") for layers in ("KK", "MM")]


@pytest.mark.parametrize("spec", [*FAMILY, *GLM], ids=lambda spec: spec.id)
def test_the_other_families_run_right(tmp_path: Path, spec: FamilySpec, engine: Engine) -> None:
    """Ling 3 has positions as an input, which only MLA layers use."""
    ids = np.random.default_rng(7).integers(0, VOCAB_SIZE, 90)
    model, expected = write_family(tmp_path / "model.gguf", spec), exact_logits(spec, ids)
    for way in WAYS.values():
        assert error_of(run_logits(engine, model, ids, RunOptions(**way)), expected).passes
