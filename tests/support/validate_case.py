"""Synthetic runs for tests of gates and reports: no llama.cpp, errors of a known size."""

from __future__ import annotations

import numpy as np

from kimi_gguf.validate.llama import LlamaRun
from kimi_gguf.validate.measure import PLAIN, VARIANTS, Answer, Measured, Truth, Variant, measure

FLASH = VARIANTS[1]
TOKENS, VOCAB, HIDDEN, LAYERS, EXPERTS = 64, 50, 8, 3, 6
RNG = np.random.default_rng(7)
TRUTH = Truth(
    ids=RNG.integers(0, VOCAB, TOKENS),
    logits=RNG.standard_normal((TOKENS, VOCAB)),
    layer_outputs={i: RNG.standard_normal((TOKENS, HIDDEN)) for i in range(LAYERS)},
    experts={i: np.tile([0, 1], (TOKENS, 1)) for i in (1, 2)},
    margins={i: np.full(TOKENS, 0.1) for i in (1, 2)},
    kinds={0: "kda", 1: "kda", 2: "mla"},
)


def run_with(error: float, flipped: int = 0, variant: Variant = PLAIN, truth: Truth = TRUTH) -> Measured:
    """A run whose logits and layers have an error of `error` times their size (NMSE error squared), and whose first
    `flipped` positions choose another expert in the last layer."""
    rng = np.random.default_rng(11)

    def off(x: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal(x.shape)
        size = np.sqrt((x**2).sum(-1, keepdims=True) / (noise**2).sum(-1, keepdims=True))
        result: np.ndarray = x + error * size * noise
        return result

    experts = {i: x.copy() for i, x in truth.experts.items()}
    experts[max(experts)][:flipped] = [0, EXPERTS - 1]
    run = LlamaRun(
        logits=[off(truth.logits)],
        layer_outputs={i: off(x) for i, x in truth.layer_outputs.items()},
        experts=experts,
        system="made up",
    )
    return measure(truth, Answer(variant, run, run))
