"""The torch reference of Kimi K3 equals upstream's graph and, in its KDA layers and residuals, plain loops in float64.

transformers 5.23 does not have the model. Upstream's graph runs with the project's correction of the norm constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from family_reference import reference_of_family
from numpy.typing import NDArray
from random_family import VOCAB_SIZE, FamilySpec, write_family
from synthetic_case import error_of
from torch.nn.functional import pad

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.kimi_k3 import KimiK3
from kimi_gguf.validate.llama import RunOptions, run_logits

K3 = "kimi-k3"
IDS: NDArray[np.int64] = np.random.default_rng(7).integers(0, VOCAB_SIZE, 150)
SPECS = [
    FamilySpec(K3, "KKMKM", seed=4),
    FamilySpec(K3, "KM", heads=3, kda_head_dim=32, lower_bound=None, std=0.3, seed=5),
    FamilySpec(K3, "KKMKKM", res_block=3, std=0.02, seed=6),
    FamilySpec(K3, "KMKMK", res_block=1, groups=(4, 2), std=0.3, seed=8),
    FamilySpec(K3, "KKM", res_block=0, situ_linear_beta=0.0, seed=7),
]
Array = NDArray[np.float64]


def reference(spec: FamilySpec) -> KimiK3:
    model = reference_of_family(spec)
    assert isinstance(model, KimiK3)
    return model


def name(spec: FamilySpec) -> str:
    return f"{spec.id}-blocks{spec.res_block}"


@pytest.mark.engine
@pytest.mark.parametrize("operators", ["off", "require"])
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_llama_cpp_has_the_same_logits(
    tmp_path: Path, spec: FamilySpec, operators: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`off` is upstream's graph."""
    monkeypatch.setenv("KIMI_OPS", operators)
    model = write_family(tmp_path / "model.gguf", spec)
    expected = reference(spec).logits(torch.from_numpy(IDS)).numpy()
    for flash_attention in (False, True):
        got = run_logits(engine, model, IDS, RunOptions(flash_attention=flash_attention))
        assert error_of(got, expected).passes


@pytest.mark.parametrize("bound", [-5.0, None])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_kda_layer_equals_a_float64_recurrence(bound: float | None, padding: int) -> None:
    """Plain loops over heads and tokens; the checkpoint may have more values of A_log than there are heads."""
    spec = FamilySpec(K3, "K", heads=2, kda_head_dim=16, lower_bound=bound, seed=9)
    model = reference(spec)
    prefix = "model.layers.0.self_attn."
    stored = model.weight

    def weight(name: str) -> torch.Tensor:
        found = stored(name)
        return pad(found.flatten(), (0, padding), value=math.nan) if name.endswith("A_log") else found

    padded = KimiK3(model.config, weight, torch.float64)
    x = torch.randn(20, spec.hidden, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = kda_layer(x.numpy(), lambda part: stored(prefix + part).numpy(), spec)
    assert error_of(padded.kda(0, x).numpy(), expected).worst <= 1e-25


def kda_layer(x: Array, w: Callable[[str], Array], spec: FamilySpec) -> Array:
    """One layer on the normed input [T, M], written without the reference's functions."""
    heads, dim, tokens = spec.heads, spec.kda_head_dim, len(x)

    def logistic(z: Array) -> Array:
        return 1 / (1 + np.exp(-z))

    def mixed(part: str) -> Array:
        y, kernel, out = (
            x @ w(f"{part}_proj.weight").T,
            w(f"{part}_conv1d.weight")[:, 0],
            np.zeros((tokens, heads * dim)),
        )
        for t in range(tokens):
            for tap in range(4):
                if t - 3 + tap >= 0:
                    out[t] += kernel[:, tap] * y[t - 3 + tap]
        return (out * logistic(out)).reshape(tokens, heads, dim)

    q, k, v = mixed("q"), mixed("k"), mixed("v")
    f = (x @ w("f_a_proj.weight").T @ w("f_b_proj.weight").T + w("dt_bias")).reshape(tokens, heads, dim)
    rate = np.exp(w("A_log").flatten()[:heads])
    beta, gate = (
        logistic(x @ w("b_proj.weight").T),
        logistic(x @ w("g_proj.weight").T).reshape(tokens, heads, dim),
    )
    out = np.zeros((tokens, heads, dim))
    for h in range(heads):
        state = np.zeros((dim, dim))
        for t in range(tokens):
            z = f[t, h]
            g = (
                -rate[h] * np.log1p(np.exp(z))
                if spec.lower_bound is None
                else spec.lower_bound * logistic(rate[h] * z)
            )
            key, query = (a[t, h] / np.sqrt(a[t, h] @ a[t, h] + 1e-6) for a in (k, q))
            state = np.exp(g)[:, None] * state
            state = state + np.outer(key, beta[t, h] * (v[t, h] - state.T @ key))
            o = state.T @ query / np.sqrt(dim)
            out[t, h] = o / np.sqrt(o @ o / dim + spec.rms_norm_eps) * w("o_norm.weight") * gate[t, h]
    result: Array = out.reshape(tokens, -1) @ w("o_proj.weight").T
    return result


def test_residual_attention_banks_the_sum_at_the_start_of_each_block() -> None:
    """Blocks of two layers: what each layer reads, written out token by token."""
    spec = FamilySpec(K3, "KMKMK", res_block=2, seed=10)
    model = reference(spec)
    tokens = torch.randn(6, spec.hidden, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def average(values: list[Array], part: str) -> Array:
        norm, vector = (model.weight(f"{part}_{kind}.weight").flatten().numpy() for kind in ("norm", "proj"))
        result = np.zeros_like(values[0])
        for t in range(len(result)):
            scores = []
            for value in values:
                scale = np.sqrt((value[t] ** 2).mean() + spec.rms_norm_eps)
                scores.append(float((value[t] / scale * norm) @ vector))
            weights = np.exp(scores) / np.exp(scores).sum()
            result[t] = sum(weight * value[t] for weight, value in zip(weights, values, strict=True))
        return result

    def part_of(layer: int, x: Array, ffn: bool) -> Array:
        y = torch.from_numpy(x)
        out: Array = (model.ffn(layer, y, None) if ffn else model.mix_tokens(layer, y)).numpy()
        return out

    first: Array = tokens.numpy()
    layer_0 = part_of(0, first, False)
    x = layer_0 + part_of(0, average([first, layer_0], "model.layers.0.mlp_res"), True)
    x = x + part_of(1, average([first, x], "model.layers.1.self_attention_res"), False)
    second = x + part_of(1, average([first, x], "model.layers.1.mlp_res"), True)
    x = part_of(2, average([first, second], "model.layers.2.self_attention_res"), False)
    x = x + part_of(2, average([first, second, x], "model.layers.2.mlp_res"), True)
    x = x + part_of(3, average([first, second, x], "model.layers.3.self_attention_res"), False)
    third = x + part_of(3, average([first, second, x], "model.layers.3.mlp_res"), True)
    x = part_of(4, average([first, second, third], "model.layers.4.self_attention_res"), False)
    x = x + part_of(4, average([first, second, third, x], "model.layers.4.mlp_res"), True)
    expected = average([first, second, third, x], "model.output_attn_res")
    assert error_of(model.all_layers(tokens, None).numpy(), expected).worst <= 1e-25


def test_situ_equals_its_formula() -> None:
    model = reference(FamilySpec(K3))
    gate, up = np.array([-9.0, -0.3, 0.0, 2.0, 40.0]), np.array([5.0, -3.0, 0.1, -0.7, 30.0])
    expected = 3 * np.tanh(gate / 3) / (1 + np.exp(-gate)) * 2 * np.tanh(up / 2)
    found = model.activation(0, torch.from_numpy(gate), torch.from_numpy(up), routed=True)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14)
