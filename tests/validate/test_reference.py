"""The torch reference equals transformers' native model at every position; its recurrence equals a float64 one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from random_checkpoint import VOCAB_SIZE, Layout, Spec, config, weights, write_checkpoint
from synthetic_case import reference_of
from transformers import KimiLinearForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear

from kimi_gguf.convert.model.families import read_config
from kimi_gguf.validate.reference import Reference, Trace

TOKENS = 150  # two whole chunks of transformers' chunked form, and an incomplete one
NMSE_LIMIT = 1e-10  # at every position
TIE = 1e-6  # with a margin below this, float32 itself may choose other experts

SPECS = [
    Spec(),
    Spec(layers="MK", heads=8, kda_head_dim=64, seed=1),
    Spec(layers="KM", heads=4, kda_head_dim=128, std=0.02, seed=2),
    Spec(layers="KKKMKM", heads=3, q_lora=24, experts=16, experts_used=4, seed=3),
    Spec(layers="MKK", dense_layers=0, experts=8, experts_used=3, groups=4, topk_groups=2, seed=4),
]
STEEP_SPECS = [
    Spec(layers="KKM", dense_layers=2, shared_experts=2, scaling=1.0, conv=3, std=0.3, seed=5),
    Spec(layers="KKKM", heads=4, kda_head_dim=64, std=0.3, seed=6),
]


def ids_for(seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=torch.Generator().manual_seed(1000 + seed))


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of transformers' own model, loaded and computed in float32."""
    model = KimiLinearForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.inference_mode():
        return model.eval()(ids[None], use_cache=False).logits[0]


def token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers compute KDA token by token. With steep gates its chunked form loses digits in differences
    of cumulative log-gates: its error compared with float64 is then up to 5e-9."""
    recurrent = modeling_kimi_linear.recurrent_kimi_delta_attention
    monkeypatch.setattr(modeling_kimi_linear, "chunk_kimi_delta_attention", recurrent)


def nmse_by_position(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    error = (got.double() - expected.double()).square().sum(-1)
    return error / expected.double().square().sum(-1)


def smallest_margin(trace: Trace) -> torch.Tensor:
    return torch.stack([route.margin for route in trace.routes.values()]).amin(0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
@pytest.mark.parametrize("layout", ["hub", "native"])
def test_logits_equal_transformers_at_every_position(tmp_path: Path, spec: Spec, layout: Layout) -> None:
    ids, trace = ids_for(spec.seed), Trace()
    expected = transformers_logits(write_checkpoint(tmp_path, spec, layout), ids)
    error = nmse_by_position(expected, reference_of(spec, layout).logits(ids, trace))
    assert smallest_margin(trace).min() > TIE, "choose another seed: here a tie picks the experts"
    assert error.max() <= NMSE_LIMIT


@pytest.mark.parametrize("spec", STEEP_SPECS, ids=lambda spec: spec.id)
def test_logits_equal_transformers_token_by_token_where_gates_are_steep(
    tmp_path: Path, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_by_token(monkeypatch)
    ids = ids_for(spec.seed)
    expected = transformers_logits(write_checkpoint(tmp_path, spec), ids)
    assert nmse_by_position(expected, reference_of(spec).logits(ids)).max() <= NMSE_LIMIT


@pytest.mark.parametrize("gate", ["ordinary", "hostile"])
def test_delta_rule_equals_a_float64_recurrence(gate: str) -> None:
    """Plain loops over the paper's equation; hostile inputs: log-decay to -700, beta 0 and 1, parallel keys."""
    tokens, heads, dim = 40, 2, 8
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, tokens, heads, dim))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g, beta = -rng.exponential(0.1, (tokens, heads, dim)), rng.random((tokens, heads))
    if gate == "hostile":
        g[rng.random(g.shape) < 0.2] = -700.0
        beta[rng.random(beta.shape) < 0.4] = 0.0
        beta[rng.random(beta.shape) < 0.4] = 1.0
        k[1::2] = k[0::2] + 1e-4 * k[1::2]

    expected = np.zeros((tokens, heads, dim))
    for h in range(heads):
        state = np.zeros((dim, dim))  # [key channel, value channel]
        for t in range(tokens):
            state = np.diag(np.exp(g[t, h])) @ state
            state = state + np.outer(k[t, h], beta[t, h] * (v[t, h] - state.T @ k[t, h]))
            expected[t, h] = state.T @ q[t, h]

    got = reference_of(Spec()).delta_rule(*(torch.from_numpy(x).float() for x in (q, k, v, g, beta)))
    error = nmse_by_position(torch.from_numpy(expected).flatten(1), got.flatten(1))
    assert error.max() <= 1e-11


def test_float64_shows_what_float32_costs() -> None:
    spec, ids = Spec(layers="KMKM", seed=6), ids_for(6)
    exact, single = (reference_of(spec, dtype=dtype).logits(ids) for dtype in (torch.float64, torch.float32))
    assert exact.dtype is torch.float64 and single.dtype is torch.float32
    assert 0 < nmse_by_position(exact, single).max() <= NMSE_LIMIT


def test_only_chosen_experts_are_fetched_and_one_weight_at_a_time() -> None:
    spec = Spec(layers="KM", experts=64, experts_used=2)
    stored, fetched = weights(spec), []

    def fetch(name: str) -> torch.Tensor:
        fetched.append(name)
        return stored[name]

    trace = Trace()
    Reference(read_config(config(spec), "spec"), fetch).logits(ids_for(0)[:5], trace)
    chosen = set(trace.routes[1].experts.flatten().tolist())
    experts = {int(name.split(".experts.")[1].split(".")[0]) for name in fetched if ".experts." in name}
    assert experts == chosen
    assert len(fetched) == len(set(fetched)), "each weight is read once"
