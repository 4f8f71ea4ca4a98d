"""Computes the error of KDA_SCAN in chunks on CUDA, by the number of terms of each matmul of its second kernel.

The kernels split every factor into two bf16 numbers and multiply three times: hi·hi + hi·lo + lo·hi. Two matmuls
would do if the right-hand factors (-w, P q, A and R k, kda-scan-chunk.cuh) were one F16 number, and the state and U
the sum of two. This script shows that the error is then too large. It rounds factors in both ways, with exponents of
any size. Everything else is float64, so the errors are those of the terms alone.

Output: a table of the NMSE of the output before its norm, and of the final state. The inputs are one head of 128, as in
tests/native/kda-cases.h. The NMSE is the largest of some draws.

    python -m kimi_gguf.scripts.kda_terms
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Product = Callable[[Array, Array], Array]

D, CHUNK = 128, 64
BF16_BITS, F16_BITS = 8, 11  # significant bits
LIMIT = 1e-7  # NMSE
PARALLEL, OPEN = "nearly parallel keys", "open gates"  # decays of nearly 1
# Gates, separated by commas -> number of tokens.
CASES = {"ordinary": 130, PARALLEL: 130, f"{PARALLEL}, beta 1": 130, f"{PARALLEL}, {OPEN}": 2048}


@dataclass(frozen=True)
class Inputs:
    """Of one head: rows are tokens. log_e: log-gates; state: [value channels, key channels]."""

    q: Array
    k: Array
    v: Array
    log_e: Array
    beta: Array
    state: Array


def draw(gates: str, seed: int) -> Inputs:
    """As make_scan in tests/native/kda-cases.h."""
    n_tokens = CASES[gates]
    normal = np.random.default_rng(seed).normal
    q, k, v = (normal(0, 1, (n_tokens, D)) for _ in range(3))
    if PARALLEL in gates:
        k = normal(0, 1, D) + 1e-3 * k
    f = normal(-12 if OPEN in gates else 0, 2, (n_tokens, D)) + normal(-2, 1, D)
    beta = np.ones(n_tokens) if "beta 1" in gates else 1 / (1 + np.exp(-normal(0, 2, n_tokens)))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    q /= np.linalg.norm(q, axis=1, keepdims=True) * D**0.5
    return Inputs(q, k, v, -np.exp(normal()) * np.logaddexp(0, f), beta, normal(0, 0.3, (D, D)))


def rounded(x: Array, bits: int) -> Array:
    """To so many significant bits; exponents have no limits."""
    mantissa, exponent = np.frexp(x)
    result: Array = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    return result


def split(x: Array, bits: int) -> tuple[Array, Array]:
    high = rounded(x, bits)
    return high, rounded(x - high, bits)


def three_terms(left: Array, right: Array) -> Array:
    (a_high, a_low), (b_high, b_low) = split(left, BF16_BITS), split(right, BF16_BITS)
    return a_high @ b_high + a_high @ b_low + a_low @ b_high


def two_terms(left: Array, right: Array) -> Array:
    high, low = split(left, F16_BITS)
    return (high + low) @ rounded(right, F16_BITS)


def exact(left: Array, right: Array) -> Array:
    return left @ right


def scan(x: Inputs, product: Product) -> tuple[Array, Array]:
    """The output before its norm, and the final state: kda-scan-chunk.cuh, transposed as in the kernel."""
    state, outputs = x.state, []
    for begin in range(0, len(x.q), CHUNK):
        rows = slice(begin, begin + CHUNK)
        q, k, v, beta = x.q[rows], x.k[rows], x.v[rows], x.beta[rows, None]
        sums = np.cumsum(x.log_e[rows], axis=0)
        decayed = np.exp(np.minimum(sums[:, None] - sums, 0)) * k  # k_j of token j <= i after token i
        pairs = np.tril(beta * (decayed @ k[..., None])[..., 0], -1)
        a = np.tril((decayed @ q[..., None])[..., 0])
        solved = np.linalg.inv(np.eye(len(q)) + pairs)
        w, u = solved @ (beta * np.exp(sums) * k), solved @ (beta * v)
        values = u.T + product(state, -w.T)
        outputs.append((product(state, (np.exp(sums) * q).T) + product(values, a.T)).T)
        state = state * np.exp(sums[-1]) + product(values, decayed[-1])
    return np.concatenate(outputs), state


def nmse(found: Array, expected: Array) -> float:
    return float(np.square(found - expected).sum() / np.square(expected).sum())


def errors(gates: str, product: Product, draws: int) -> tuple[float, ...]:
    """NMSE of output and state, the largest of some draws."""
    of_draws = [
        [nmse(*both) for both in zip(scan(x, product), scan(x, exact), strict=True)]
        for x in (draw(gates, seed) for seed in range(draws))
    ]
    return tuple(np.max(of_draws, axis=0).tolist())


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the error of KDA_SCAN by the terms of its matmuls.")
    parser.add_argument("--draws", type=int, default=3, help="the largest of so many (default: 3)")
    draws = parser.parse_args().draws
    print("| NMSE of output, state | tokens | three terms | two terms |\n| --- | ---: | --- | --- |")
    for gates, n_tokens in CASES.items():
        both = (errors(gates, product, draws) for product in (three_terms, two_terms))
        cells = (", ".join(f"{error:.0e}" for error in each) for each in both)
        print(f"| {gates} | {n_tokens} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
