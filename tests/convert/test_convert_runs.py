"""Our GGUF runs on upstream llama.cpp, and upstream's GGUF of the same checkpoint runs on patched; logits agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from convert_tools import convert, fresh_checkpoint, upstream_convert
from random_checkpoint import VOCAB_SIZE, Spec

from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.upstream_converter import Job
from kimi_gguf.validate.llama import run_logits

pytestmark = pytest.mark.engine

IDS = np.random.default_rng(5).integers(0, VOCAB_SIZE, 40)
SPECS = [
    Spec(layers="KKKM", heads=4, experts=8, seed=20),
    Spec(layers="MK", dense_layers=0, shared_experts=2, experts=8, groups=4, topk_groups=2, seed=21),
    Spec(layers="KMK", dense_layers=3, seed=22),
]


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_our_file_runs_on_upstream_llama_cpp(
    tmp_path: Path, upstream: Engine, engine: Engine, spec: Spec, kind: str
) -> None:
    """Equal except for what the patches change: epsilons, 1e-5 instead of 1e-6."""
    source = fresh_checkpoint(tmp_path / "model", spec)
    assert convert(source, "-o", tmp_path / "x.gguf", "--type", kind).status == 0
    theirs = run_logits(upstream, tmp_path / "x.gguf", IDS).astype(np.float64)
    ours = run_logits(engine, tmp_path / "x.gguf", IDS).astype(np.float64)
    assert np.isfinite(theirs).all() and theirs.std() > 0
    error = np.square(theirs - ours).sum(-1) / np.square(ours).sum(-1)
    assert np.median(error) < {"F32": 1e-6, "BF16": 1e-3, "Q8_0": 1e-3}[kind]


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=lambda spec: spec.id)
def test_upstreams_file_runs_on_our_build_like_our_own(tmp_path: Path, engine: Engine, spec: Spec) -> None:
    """Without expert groups: upstream reads another key for them and would write a model without groups."""
    source = fresh_checkpoint(tmp_path / "model", spec)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert convert(source, "-o", ours, "--type", "BF16").status == 0
    upstream_convert([Job(source, theirs, "BF16", vocabulary=ours)])
    assert np.array_equal(run_logits(engine, theirs, IDS), run_logits(engine, ours, IDS))
