"""How many terms the matmuls of KDA's second CUDA kernel need."""

import numpy as np
import pytest

from kimi_gguf.scripts.kda_terms import (
    CASES,
    CHUNK,
    LIMIT,
    PARALLEL,
    draw,
    errors,
    exact,
    nmse,
    scan,
    three_terms,
    two_terms,
)


def test_chunks_are_the_recurrence() -> None:
    x = draw("ordinary", 0)
    assert len(x.q) > CHUNK
    state, outputs = x.state, []
    for q, k, v, log_e, beta in zip(x.q, x.k, x.v, x.log_e, x.beta, strict=True):
        state = state * np.exp(log_e)
        state = state + np.outer(beta * (v - state @ k), k)
        outputs.append(state @ q)
    for found, expected in zip(scan(x, exact), (np.array(outputs), state), strict=True):
        assert nmse(found, expected) < 1e-24


@pytest.mark.parametrize("gates", CASES)
def test_three_terms_keep_the_limit(gates: str) -> None:
    assert max(errors(gates, three_terms, 1)) < LIMIT / 10


@pytest.mark.parametrize("gates", [gates for gates in CASES if gates.startswith(f"{PARALLEL},")])
def test_two_terms_miss_the_limit(gates: str) -> None:
    assert min(errors(gates, two_terms, 1)) > LIMIT
