"""The torch reference of Ling 3 equals transformers in float64, and llama.cpp where transformers has a gap.

transformers lacks the clamp of experts and the MTP layer.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_reference import config_of, hub_weights, mtp_logits, reference_of_family
from numpy.typing import NDArray
from random_family import VOCAB_SIZE, Change, FamilySpec, unchanged, write_family
from synthetic_case import error_of
from transformers.models.bailing_hybrid import modeling_bailing_hybrid
from transformers_ling import ling_logits

from kimi_gguf.convert.model.ling3 import Ling3Config, Yarn
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.llama import Logits
from kimi_gguf.validate.ling3 import Ling3
from kimi_gguf.validate.llama import RunOptions, run, run_logits
from kimi_gguf.validate.reference import LATENT_NORM_EPS, Trace

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
    FamilySpec(LING, "KM", compressed=True, std=0.02, seed=12),
]
CLAMPED = [
    FamilySpec(LING, "KKMK", clamped=True, mtp=True, seed=3),
    FamilySpec(LING, "KM", clamped=True, groups=(2, 1), std=0.5, seed=6),
]
MTP = [
    *CLAMPED[:1],
    FamilySpec(LING, "KM", heads=4, kda_head_dim=32, groups=(4, 2), mtp=True, std=0.3, seed=9),
    FamilySpec(LING, yarn=(4.0, 0.7), mtp=True, seed=10),
]
MTP_OF_THREE = "model.layers.3."  # the MTP layer of a model with three other layers


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


def test_the_logits_of_the_model_do_not_depend_on_the_mtp_layer() -> None:
    """Its tensors are not read."""
    spec = FamilySpec(LING, mtp=True, seed=8)
    weights = hub_weights(spec)
    there = [name for name in weights if ".layers.3." in name]
    assert f"{MTP_OF_THREE}eh_proj.weight" in there
    for name in there:
        del weights[name]
    model = Ling3(config_of(spec), weights.__getitem__, torch.float64)
    assert np.isfinite(model.logits(torch.from_numpy(IDS)).numpy()).all()


def mtp_run(
    engine: Engine, folder: Path, spec: FamilySpec, change: Change = unchanged, **options: Any
) -> Logits:
    """llama.cpp's logits [T, V] of the MTP layer."""
    model = write_family(folder / "model.gguf", spec, change=change)
    return run(engine, model, [IDS], RunOptions(mtp=True, **options)).mtp_logits[0]


@pytest.mark.engine
@pytest.mark.parametrize("operators, flash_attention", [("require", False), ("require", True), ("off", True)])
@pytest.mark.parametrize("spec", MTP, ids=name)
def test_llama_cpp_has_the_same_logits_of_the_mtp_layer(
    tmp_path: Path,
    spec: FamilySpec,
    flash_attention: bool,
    operators: str,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`off` is upstream's graph."""
    monkeypatch.setenv("KIMI_OPS", operators)
    got = mtp_run(engine, tmp_path, spec, flash_attention=flash_attention)
    assert error_of(got, mtp_logits(reference_of_family(spec), IDS)).passes


@pytest.mark.engine
@pytest.mark.parametrize(
    "options",
    [{"n_ubatch": 7}, {"n_batch": 65}, {"step_from": 100}, {"save_restore_at": 75}],
    ids=lambda options: next(iter(options)),
)
def test_any_split_has_the_same_logits_of_the_mtp_layer(
    tmp_path: Path, options: dict[str, int], engine: Engine
) -> None:
    expected = mtp_logits(reference_of_family(MTP[0]), IDS)
    assert error_of(mtp_run(engine, tmp_path, MTP[0], **options), expected).passes


@pytest.mark.engine
def test_several_sequences_have_the_same_logits_of_the_mtp_layer(tmp_path: Path, engine: Engine) -> None:
    """The logits of the model are bit for bit those of a run without the MTP layer."""
    spec, texts = MTP[1], [IDS, IDS[::-1][:61].copy(), IDS[5:90]]
    model, options = write_family(tmp_path / "model.gguf", spec), RunOptions(n_batch=96, n_ubatch=32)
    got = run(engine, model, texts, replace(options, mtp=True))
    for text, found in zip(texts, got.mtp_logits, strict=True):
        assert error_of(found, mtp_logits(reference_of_family(spec), text)).passes
    for found, alone in zip(got.logits, run(engine, model, texts, options).logits, strict=True):
        np.testing.assert_array_equal(found, alone)


class LatentEpsilonOfTheConfig(Ling3):
    """The latent of this width of the MTP layer is normalised with rms_norm_eps, as upstream does."""

    width = 0

    def mla(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        self.is_mtp = layer == len(self.config.layers)
        return super().mla(layer, x)

    def latent_norm(self, latent: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wrong = self.is_mtp and len(weight) == self.width
        return self.rms_norm(latent, weight, self.config.rms_norm_eps if wrong else LATENT_NORM_EPS)


class FixedEpsilon(Ling3):
    """One norm of the MTP layer has the constant 1e-6 instead of rms_norm_eps."""

    fixed = ""

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name != f"model.layers.{len(self.config.layers)}.{self.fixed}":
            return super().norm(name, x)
        return self.rms_norm(x, self.weight(name + ".weight"), 1e-6)


MTP_NORMS = ["enorm", "hnorm", "input_layernorm", "post_attention_layernorm", "final_layernorm"]


def small_mtp_inputs(tensor: str, data: NDArray[np.float32]) -> NDArray[np.float32]:
    """The MTP layer's norms get small values, for which each epsilon counts."""
    small = tensor == "output_norm.weight" or ".nextn.eh_proj." in tensor
    return data / 64 if small else data


@pytest.mark.engine
def test_the_norms_of_the_mtp_layer_have_the_epsilons_of_the_model(
    tmp_path: Path, engine: Engine, upstream: Engine
) -> None:
    """0028-ling-k3-norm-constants: with rms_norm_eps 1e-5, each wrong epsilon of this layer alone is found."""
    spec = FamilySpec(LING, mtp=True, compressed=True, std=0.05, rms_norm_eps=1e-5, seed=11)
    change = small_mtp_inputs
    weights = hub_weights(spec, change)

    def logits(model: type[Ling3]) -> NDArray[np.float64]:
        return mtp_logits(model(config_of(spec), weights.__getitem__, torch.float64), IDS)

    got = mtp_run(engine, tmp_path, spec, change)
    assert error_of(got, logits(Ling3)).passes
    assert not error_of(mtp_run(upstream, tmp_path, spec, change), logits(Ling3)).passes
    latents = {"kv_a": spec.kv_lora, "q_a": spec.q_lora}
    for wrong in (
        *(type(x, (LatentEpsilonOfTheConfig,), {"width": width}) for x, width in latents.items()),
        *(type(x, (FixedEpsilon,), {"fixed": x}) for x in MTP_NORMS),
    ):
        assert not error_of(got, logits(wrong)).passes, wrong.__name__
