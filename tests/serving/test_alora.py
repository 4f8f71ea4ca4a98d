"""An aLoRA is active in a server from its invocation tokens on: the states before them are those of the base model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llama_script import Setup, adapters, decode, play, text
from llama_server import serving
from random_adapter import is_matrix, shapes, write_adapter

from kimi_gguf.engine.builds import Engine

BEFORE, AFTER = np.random.default_rng(0).integers(400, 1000, (2, 40)).tolist()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("before", "invocation"), [(BEFORE, [300, 301, 302]), ([], [300, 301]), ([*BEFORE, 300], [300, 301])]
)
def test_an_alora_begins_with_its_invocation(
    before: list[int], invocation: list[int], engine: Engine, demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    """As in PEFT, also at the beginning of a prompt, and after a token that repeats."""
    model = demo_gguf("F32")
    names = [
        name for name, shape in shapes(model).items() if is_matrix(name, shape) and name.startswith("blk.")
    ]
    adapter = write_adapter(tmp_path / "alora.gguf", model, names, invocation=invocation).file
    ids = [*before, *invocation, *AFTER]
    whole = text(0, ids)

    def best(begin: int) -> float:
        """The log probability of the best next token, with the adapter from token `begin` on."""
        steps = [decode(*whole[:begin], wanted=[begin - 1])] if begin else []
        steps += [adapters({adapter: 1.0}), decode(*whole[begin:])] if begin < len(ids) else []
        logits = play(engine, model, Setup(flash_attention=True), steps).logits[-1].astype(np.float64)
        return float(logits.max() - np.logaddexp.reduce(logits))

    expected, never = best(len(before)), best(len(ids))
    assert abs(expected - never) > 1e-2
    with serving(engine, tmp_path, model, "-np", "1", "--lora", str(adapter)) as server:

        def answer(prompt: list[int], scale: float = 1.0) -> float:
            request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 1, "cache_prompt": True}
            request["lora"] = [{"id": 0, "scale": scale}]
            return float(server.post("/completion", request)["completion_probabilities"][0]["logprob"])

        for _ in range(2):  # the second time from the cache
            assert answer(ids) == pytest.approx(expected, abs=1e-4)
            assert answer(ids, 0.0) == pytest.approx(never, abs=1e-4)
