"""0001-kimi-linear-norm-constants: q, k and the latent are normalised with the model's epsilon, 1e-6."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_checkpoint import Spec
from synthetic_case import make_case

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

# Small activations, for which the epsilon matters: most layers with the L2 norm of q and k, or with the latent's.
SMALL = [
    Spec(layers="KKKM", std=0.02, seed=30),
    Spec(layers="MMMK", std=0.02, seed=31),
    Spec(layers="KM", heads=4, kda_head_dim=64, std=0.02, seed=32),
]


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.id)
def test_small_activations_are_normalised_as_in_the_model(tmp_path: Path, spec: Spec, engine: Engine) -> None:
    case = make_case(tmp_path, spec)
    assert case.error(engine).passes
