"""deepseek2 takes both forms of latent attention as Kimi-Linear does, and gives the logits that it gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graph_operators import operators_of_last_graph
from numpy.typing import NDArray
from random_deepseek2 import VOCAB_SIZE, DeepseekSpec, write_deepseek2

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run_logits

pytestmark = pytest.mark.engine

TOKENS = 300
FORMS = {"decompressed": TOKENS, "absorbed": 64, "absorbed, token by token": 1}  # tokens of a batch

Ids = NDArray[np.int64]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek2(tmp_path_factory.mktemp("deepseek2") / "model.gguf", DeepseekSpec())


@pytest.fixture(scope="module")
def ids() -> Ids:
    return np.random.default_rng(61).integers(0, VOCAB_SIZE, TOKENS)


@pytest.fixture(scope="module")
def exact(model: Path, ids: Ids, pristine: Engine) -> NDArray[np.float32]:
    """Pristine llama.cpp's logits, its plain attention on an F32 cache."""
    return run_logits(pristine, model, ids, RunOptions())


def errors(got: NDArray[np.float32], exact: NDArray[np.float32]) -> tuple[float, float]:
    """NMSE in all and at the worst position."""
    square = np.square(got.astype(np.float64) - exact).sum(1)
    power = np.square(exact.astype(np.float64)).sum(1)
    return float(square.sum() / power.sum()), float((square / power).max())


@pytest.mark.parametrize("cache_type", ["F32", "F16", "Q8_0"])
def test_each_form_is_in_its_graph(
    model: Path, ids: Ids, cache_type: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_OPS", "require")
    for form, n_batch in FORMS.items():
        options = RunOptions(n_batch=n_batch, flash_attention=True, cache_type=cache_type)
        found = operators_of_last_graph(engine, model, ids[:n_batch], options, monkeypatch)
        assert ("LATENT_ATT" in found) == (form == "decompressed")
        assert ("FLASH_ATTN" in found) == (form != "decompressed")


@pytest.mark.parametrize("form", FORMS)
def test_an_f32_cache_gives_the_logits_of_plain_attention(
    model: Path,
    ids: Ids,
    exact: NDArray[np.float32],
    form: str,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KIMI_OPS", "require")
    got = run_logits(engine, model, ids, RunOptions(n_batch=FORMS[form], flash_attention=True))
    in_all, worst = errors(got, exact)
    assert in_all <= 1e-10 and worst <= 1e-8


@pytest.mark.parametrize("cache_type", ["F16", "Q8_0"])
@pytest.mark.parametrize("form", FORMS)
def test_other_caches_lose_no_more_than_before(
    model: Path,
    ids: Ids,
    exact: NDArray[np.float32],
    form: str,
    cache_type: str,
    engine: Engine,
    pristine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KIMI_OPS", "require")
    options = RunOptions(n_batch=FORMS[form], flash_attention=True, cache_type=cache_type)
    ours, theirs = (errors(run_logits(build, model, ids, options), exact)[0] for build in (engine, pristine))
    assert ours <= 1.05 * theirs
