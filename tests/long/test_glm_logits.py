"""GLM-5.3-Flash's text model on the operators has the logits of transformers, with sparse attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from random_family import VOCAB_SIZE, FamilySpec, write_family
from synthetic_case import error_of
from transformers_glm import glm_logits

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run_logits

pytestmark = pytest.mark.engine

IDS: NDArray[np.int64] = np.random.default_rng(7).integers(0, VOCAB_SIZE, 150)
# With few heads of the indexer, several pools have a score of exactly zero. Which of them are chosen is not defined:
# torch.topk and ggml's top_k choose different ones.
SPECS = [
    FamilySpec("glm5-next", "KKM", rope=0, value=64, index_heads=8, seed=72),
    FamilySpec("glm5-next", "KM", heads=4, kda_head_dim=32, rope=0, lower_bound=None, index_heads=8, seed=73),
    FamilySpec("glm5-next", "KMKM", rope=0, value=64, index_heads=8, clamped=True, std=0.3, seed=74),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_glm_has_the_logits_of_transformers(
    spec: FamilySpec, engine: Engine, upstream: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 of up to 150 tokens are attended to. Upstream's flash attention rounds an F32 cache to F16."""
    model, expected = write_family(tmp_path / "model.gguf", spec), glm_logits(spec, IDS)
    assert error_of(glm_logits(replace(spec, index_top_k=512), IDS), expected).in_all > 1e-4
    if spec.clamped:
        assert error_of(glm_logits(replace(spec, clamped=False), IDS), expected).in_all > 1e-4

    def passes(build: Engine, flash_attention: bool) -> bool:
        got = run_logits(build, model, IDS, RunOptions(flash_attention=flash_attention))
        return error_of(got, expected).passes

    for choice in ("require", "off"):
        monkeypatch.setenv("KIMI_OPS", choice)
        assert passes(engine, False)
        assert passes(engine, True)
    assert passes(upstream, False)
    assert not passes(upstream, True)
