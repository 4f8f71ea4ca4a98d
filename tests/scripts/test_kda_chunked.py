"""Compares the training script's chunked KDA with the recurrence, in float64."""

import pytest
import torch
from torch import Tensor

from kimi_gguf.scripts.training.kda_chunked import kda_chunked

GATES = {
    "gentle": (-0.1, 0.0),
    "learned": (-6.0, -0.01),
    "hostile": (-700.0, 0.0),
    "shut": (-700.0, -600.0),
    "open": (0.0, 0.0),
}
LENGTHS = (1, 5, 16, 17, 63, 64, 65, 200)


def recurrence(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(k.shape[2]):
        state = gate[:, :, t].exp()[..., None] * state
        d = beta[:, :, t, None] * (v[:, :, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t]))
        state = state + k[:, :, t, :, None] * d[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outputs, 2), state


def inputs(length: int, gates: str, *, key_dim: int = 24, value_dim: int = 16) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(length)
    low, high = GATES[gates]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    q = torch.nn.functional.normalize(normal(2, 2, length, key_dim), dim=-1) * key_dim**-0.5
    k = torch.nn.functional.normalize(normal(2, 2, length, key_dim), dim=-1)
    gate = low + (high - low) * uniform(2, 2, length, key_dim)
    return q, k, normal(2, 2, length, value_dim), gate, uniform(2, 2, length)


def nmse(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_recurrence(length: int, gates: str) -> None:
    case = inputs(length, gates)
    for found, expected in zip(kda_chunked(*case), recurrence(*case), strict=True):
        assert nmse(found, expected) < 1e-25


@pytest.mark.parametrize("gates", GATES)
def test_float32_stays_finite_and_close(gates: str) -> None:
    case = inputs(200, gates)
    single = kda_chunked(*(t.float() for t in case))
    for found, expected in zip(single, recurrence(*case), strict=True):
        assert torch.isfinite(found).all()
        assert nmse(found.double(), expected) < 1e-10


@pytest.mark.parametrize("gates", ["learned", "hostile"])
def test_gradients_equal_the_recurrence(gates: str) -> None:
    case = inputs(70, gates)
    weight = torch.randn(2, 2, 70, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = [], []
    for function, into in ((kda_chunked, found), (recurrence, expected)):
        leaves = [t.clone().requires_grad_() for t in case]
        o, state = function(*leaves)
        ((o * weight).sum() + state.square().sum()).backward()
        into += [leaf.grad for leaf in leaves]
    for a, b in zip(found, expected, strict=True):
        assert nmse(a, b) < 1e-22


def test_parallel_keys_and_full_strength() -> None:
    """beta = 1 and equal keys: the delta rule replaces the whole value at each step."""
    q, k, v, gate, beta = inputs(100, "open")
    k = k[:, :, :1].expand_as(k)
    case = (q, k, v, gate, torch.ones_like(beta))
    for found, expected in zip(kda_chunked(*case), recurrence(*case), strict=True):
        assert nmse(found, expected) < 1e-24
