"""KDA layers on the operators: the logits of the upstream build, any number of threads, how the graph is selected.

test_kda_family.py compares the logits with those of the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_checkpoint import Spec
from synthetic_case import Case, make_case

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.llama import LlamaRun, RunOptions, run

pytestmark = pytest.mark.engine

TOKENS = 150
SPECS = [
    Spec(layers="KKMK", heads=4, kda_head_dim=64, seed=60),
    Spec(layers="KM", heads=2, kda_head_dim=128, std=0.02, seed=61),
    Spec(layers="KKM", heads=3, kda_head_dim=32, std=0.2, seed=62),
]
LENGTHS = (TOKENS, 61, 120)  # tokens of three sequences
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "token by token": {"step_from": 0},
    "three sequences, ubatches of 32": {"texts": LENGTHS, "n_batch": 96, "n_ubatch": 32},
}


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.id)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("kda"), request.param, TOKENS)


def decode(
    choice: str, engine: Engine, case: Case, monkeypatch: pytest.MonkeyPatch, way: Mapping[str, Any]
) -> LlamaRun:
    """A run with KIMI_OPS=`choice`; `texts` of the way: lengths of several sequences, each rotated by its number."""
    monkeypatch.setenv("KIMI_OPS", choice)
    options = dict(way)
    lengths = options.pop("texts", (TOKENS,))
    texts = [np.roll(case.ids, i)[:length] for i, length in enumerate(lengths)]
    return run(engine, case.gguf, texts, RunOptions(**options))


def assert_close(got: LlamaRun, expected: LlamaRun) -> None:
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        error = np.square(ours.astype(np.float64) - theirs).sum(1)
        power = np.square(theirs.astype(np.float64)).sum(1)
        assert error.sum() / power.sum() <= 1e-10
        assert (error / power).max() <= 1e-8


def test_operators_equal_the_upstream_build(
    engine: Engine, upstream: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights this large upstream's norm constants have no effect."""
    case = make_case(tmp_path, Spec(layers="KKMK", heads=4, kda_head_dim=64, std=0.2, seed=63), TOKENS)
    ours = decode("require", engine, case, monkeypatch, {})
    assert_close(ours, decode("require", upstream, case, monkeypatch, {}))


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_for_any_number_of_threads(
    case: Case, way: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = decode("require", engine, case, monkeypatch, {**WAYS[way], "threads": 1})
    for count in (2, 7) if way == "token by token" else (7, 33):
        many = decode("require", engine, case, monkeypatch, {**WAYS[way], "threads": count})
        for a, b in zip(one.logits, many.logits, strict=True):
            np.testing.assert_array_equal(a, b, f"{count} threads")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("small"), Spec(layers="KM", seed=64), TOKENS)


# The value of the switch, and the resulting text in the log.
CHOICES = {
    "": "operators in use",
    "require": "operators in use",
    "conv,scan": "operators in use",
    "off": "operators switched off by KIMI_OPS",
    "mla": "operators switched off by KIMI_OPS",
    "conv": "conv and scan go together",
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_log_says_what_is_used(
    choice: str, small: Case, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CHOICES[choice] in decode(choice, engine, small, monkeypatch, {}).log


UNFIT = {
    "head size 16": (Spec(layers="KM", kda_head_dim=16, seed=65), "no kernel for head size 16"),
    "convolution of width 3": (Spec(layers="KM", conv=3, seed=66), "no kernel for convolutions of width 3"),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_what_the_operators_cannot_do_falls_back_and_says_why(
    unfit: str, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, reason = UNFIT[unfit]
    case = make_case(tmp_path, spec)
    monkeypatch.setenv("KIMI_OPS", "")
    assert case.error(engine).passes
    short = replace(case, ids=case.ids[:TOKENS])
    assert reason in run(engine, short.gguf, [short.ids]).log
    monkeypatch.setenv("KIMI_OPS", "require")
    with pytest.raises(ValidateError, match=reason):
        run(engine, short.gguf, [short.ids])


@pytest.mark.parametrize(
    "value", ["scann", "OFF", "off ", ",", "conv,", "conv,,scan", "off,conv", "require,off"]
)
def test_an_invalid_value_is_an_error(
    value: str, small: Case, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_OPS", value)
    with pytest.raises(ValidateError, match="KIMI_OPS: '"):
        run(engine, small.gguf, [small.ids])
