"""The two forms of latent attention are one function."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_gguf.ggml_ops.latent_attention import oracle


@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_and_decompressed_agree(masked: bool) -> None:
    rng = np.random.default_rng(1)
    streams, heads, queries, keys, nope, rope, latent, value = 2, 3, 5, 7, 4, 2, 6, 3
    q = rng.normal(size=(streams, heads, queries, nope + rope))
    cache = rng.normal(size=(streams, keys, latent + rope))
    k_b = rng.normal(size=(heads, latent, nope))
    v_b = rng.normal(size=(heads, value, latent))
    mask = np.where(rng.random((streams, queries, keys)) < 0.4, -np.inf, 0.0) if masked else None

    whole = oracle.decompressed(q, cache, k_b, v_b, mask, 0.5)
    parts = oracle.absorbed(oracle.fold(q, k_b), cache, latent, mask, 0.5)

    np.testing.assert_allclose(np.einsum("sqhl,hvl->sqhv", parts, v_b), whole, rtol=0, atol=1e-12)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    q, cache = np.ones((1, 1, 2, 3)), np.ones((1, 4, 3))
    mask = np.array([[[-np.inf] * 4, [0.0] * 4]])
    out = oracle.absorbed(q, cache, 2, mask, 1.0)
    np.testing.assert_array_equal(out, [[[[0.0, 0.0]], [[1.0, 1.0]]]])
