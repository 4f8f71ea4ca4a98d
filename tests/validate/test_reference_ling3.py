"""The torch reference of Ling 3 equals transformers in float64, and llama.cpp's graph where transformers has a gap."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from family_reference import config_of, hub_weights, reference_of_family
from numpy.typing import NDArray
from random_family import VOCAB_SIZE, FamilySpec, write_family
from synthetic_case import error_of
from transformers.models.bailing_hybrid import modeling_bailing_hybrid
from transformers_ling import ling_logits

from kimi_gguf.convert.model.ling3 import Ling3Config, Yarn
from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.ling3 import Ling3
from kimi_gguf.validate.llama import RunOptions, run_logits
from kimi_gguf.validate.reference import Trace

LING = "bailingmoe3"
TOKENS = 150
IDS: NDArray[np.int64] = np.random.default_rng(7).integers(0, VOCAB_SIZE, TOKENS)
# transformers computes the recurrence, the softmax and the router in float32, whatever the model's type.
WORST = 1e-10

PLAIN = [
    FamilySpec(LING, seed=1),
    FamilySpec(LING, "KKMK", heads=4, std=0.3, groups=(4, 2), seed=2),
    FamilySpec(LING, std=0.02, seed=1),
    FamilySpec(LING, "MKM", kda_head_dim=32, nope=32, rope=16, value=48, kv_lora=64, std=0.5, seed=4),
    FamilySpec(LING, yarn=(4.0, 1.0), seed=3),
    FamilySpec(LING, "KM", yarn=(16.0, 0.7), std=0.3, seed=5),
]
CLAMPED = [
    FamilySpec(LING, "KKMK", clamped=True, mtp=True, seed=3),
    FamilySpec(LING, "KM", clamped=True, groups=(2, 1), std=0.5, seed=6),
]


def name(spec: FamilySpec) -> str:
    return f"{spec.id}-groups{spec.groups}-yarn{spec.yarn}" + "-clamped" * spec.clamped


def reference_logits(spec: FamilySpec, trace: Trace | None = None) -> NDArray[np.float64]:
    return reference_of_family(spec).logits(torch.from_numpy(IDS), trace).numpy()


@pytest.mark.parametrize("spec", PLAIN, ids=name)
def test_logits_equal_transformers_at_every_position(
    spec: FamilySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    recurrent = modeling_bailing_hybrid.recurrent_kimi_delta_attention
    monkeypatch.setattr(modeling_bailing_hybrid, "chunk_kimi_delta_attention", recurrent)
    assert error_of(reference_logits(spec), ling_logits(spec, IDS)).worst <= WORST


@pytest.mark.engine
@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("spec", [*PLAIN, *CLAMPED], ids=name)
def test_llama_cpp_has_the_same_logits(
    tmp_path: Path, spec: FamilySpec, flash_attention: bool, engine: Engine
) -> None:
    model = write_family(tmp_path / "model.gguf", spec)
    got = run_logits(engine, model, IDS, RunOptions(flash_attention=flash_attention))
    assert error_of(got, reference_logits(spec)).passes


@pytest.mark.engine
@pytest.mark.parametrize("spec", CLAMPED, ids=name)
def test_clamped_experts_equal_upstreams_graph(
    tmp_path: Path, spec: FamilySpec, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers does not clamp. The limits change the logits by far more than the gates allow."""
    monkeypatch.setenv("KIMI_OPS", "off")
    got = run_logits(engine, write_family(tmp_path / "model.gguf", spec), IDS, RunOptions())
    assert error_of(got, reference_logits(spec)).passes
    assert error_of(got, reference_logits(replace(spec, clamped=False))).in_all > 1e-4


@pytest.mark.parametrize(
    ("layer", "routed", "limit"),
    [(0, True, 1e9), (1, True, 2.0), (2, True, 1.0), (0, False, 3.0), (1, False, 1e9), (2, False, 0.5)],
)
def test_routed_and_shared_experts_have_their_own_limit_in_each_layer(
    layer: int, routed: bool, limit: float
) -> None:
    """silu(gate) is clamped from above only, up from both sides; 0 does not clamp."""
    config = config_of(FamilySpec(LING))
    assert isinstance(config, Ling3Config)
    limits = replace(config, swiglu_limits=(0.0, 2.0, 1.0), shared_swiglu_limits=(3.0, 0.0, 0.5))
    model = Ling3(limits, {}.__getitem__, torch.float64)
    gate, up = np.array([-4.0, 1.0, 9.0]), np.array([-7.0, 0.25, 7.0])
    expected = np.minimum(gate / (1 + np.exp(-gate)), limit) * np.maximum(np.minimum(up, limit), -limit)
    found = model.activation(layer, torch.from_numpy(gate), torch.from_numpy(up), routed)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14)


def test_only_positions_after_the_first_are_rotated_and_lengths_are_kept() -> None:
    model = reference_of_family(FamilySpec(LING))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotated = model.rotate(x)
    torch.testing.assert_close(rotated[:, 0], x[:, 0], rtol=0, atol=0)
    pairs, before = (t.view(2, 5, 32, 2).square().sum(-1) for t in (rotated, x))
    torch.testing.assert_close(pairs, before)
    angle = torch.atan2(rotated[0, 1, 1], rotated[0, 1, 0]) - torch.atan2(x[0, 1, 1], x[0, 1, 0])
    assert torch.remainder(angle, 2 * torch.pi).item() == pytest.approx(1.0)


def scale_of(weight: float) -> float:
    return 1 + 0.1 * weight * math.log(4)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "attention_factor", "factor", "scale"),
    [
        (None, None, None, scale_of(1), 1.0),
        (1.0, 0.7, None, scale_of(1) / scale_of(0.7), scale_of(0.7) ** 2),
        (1.0, 0.7, 1.25, 1.25, scale_of(0.7) ** 2),
    ],
)
def test_yarn_scales_the_rotated_values_and_the_scores(
    mscale: float | None,
    mscale_all_dim: float | None,
    attention_factor: float | None,
    factor: float,
    scale: float,
) -> None:
    spec = FamilySpec(LING)
    yarn = Yarn(4.0, 64, 32.0, 1.0, mscale, mscale_all_dim, attention_factor)
    config = config_of(spec)
    assert isinstance(config, Ling3Config)
    model = Ling3(replace(config, yarn=yarn), {}.__getitem__, torch.float64)
    cos, sin = model.rotation(9, 64)
    torch.testing.assert_close(
        cos.square() + sin.square(), torch.full((9, 32), factor**2, dtype=torch.float64)
    )
    assert model.attention_scale() == pytest.approx(scale * (spec.nope + spec.rope) ** -0.5)


def test_only_the_chosen_groups_have_chosen_experts() -> None:
    spec, trace = FamilySpec(LING, "KKMK", heads=4, groups=(4, 1), seed=2), Trace()
    reference_logits(spec, trace)
    for route in trace.routes.values():
        groups = route.experts // 2
        assert (groups == groups[:, :1]).all(), "two experts of two groups"


def test_the_layer_that_predicts_further_tokens_takes_no_part() -> None:
    """Its tensors are not read."""
    spec = FamilySpec(LING, mtp=True, seed=8)
    assert not [name for name in hub_weights(spec) if ".layers.3." in name]
    assert np.isfinite(reference_logits(spec)).all()
