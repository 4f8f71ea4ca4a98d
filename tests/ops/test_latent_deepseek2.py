"""deepseek2 uses both forms of latent attention, as Kimi-Linear does; its logits do not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graph_operators import operators_of_last_graph
from llama_script import Setup, decode, play, text
from numpy.typing import NDArray
from random_deepseek2 import VOCAB_SIZE, DeepseekSpec, write_deepseek2

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run_logits

pytestmark = pytest.mark.engine

TOKENS = 300
FORMS = {"decompressed": TOKENS, "absorbed": 64, "absorbed, token by token": 1}  # tokens of a batch
IDS = np.random.default_rng(61).integers(0, VOCAB_SIZE, TOKENS)

Errors = Callable[[Engine, str, str], tuple[float, float]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek2(tmp_path_factory.mktemp("deepseek2") / "model.gguf", DeepseekSpec())


@pytest.fixture(scope="module")
def exact(model: Path, upstream: Engine) -> NDArray[np.float32]:
    """Upstream's logits, with plain attention on an F32 cache."""
    return run_logits(upstream, model, IDS, RunOptions())


@pytest.fixture
def errors(model: Path, exact: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch) -> Errors:
    """NMSE to `exact`, in total and at the worst position, of a build with a form and a cache type."""
    monkeypatch.setenv("KIMI_OPS", "require")

    def errors(build: Engine, form: str, cache_type: str) -> tuple[float, float]:
        options = RunOptions(n_batch=FORMS[form], flash_attention=True, cache_type=cache_type)
        got = run_logits(build, model, IDS, options)
        square = np.square(got.astype(np.float64) - exact).sum(1)
        power = np.square(exact.astype(np.float64)).sum(1)
        return float(square.sum() / power.sum()), float((square / power).max())

    return errors


@pytest.mark.parametrize("cache_type", ["F32", "F16", "Q8_0"])
def test_each_form_is_in_its_graph(
    model: Path, cache_type: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_OPS", "require")
    for form, n_batch in FORMS.items():
        options = RunOptions(n_batch=n_batch, flash_attention=True, cache_type=cache_type)
        found = operators_of_last_graph(engine, model, IDS[:n_batch], options, monkeypatch)
        assert ("LATENT_ATT" in found) == (form == "decompressed")
        assert ("FLASH_ATTN" in found) == (form != "decompressed")


@pytest.mark.parametrize(("n_seq_max", "unified"), [(1, True), (4, False)])
def test_memory_is_reserved_for_the_form_that_needs_more(
    tmp_path: Path, n_seq_max: int, unified: bool, engine: Engine
) -> None:
    """A batch below the threshold takes the absorbed form, which needs more than LATENT_ATTN for 512 tokens."""
    model = write_deepseek2(tmp_path / "model.gguf", DeepseekSpec(heads=32))
    setup = Setup(
        n_seq_max=n_seq_max, cells=4096, flash_attention=True, cache_type="Q8_0", kv_unified=unified
    )
    steps, first = [], 0
    for size in (512, 512, 512, 512, 255):
        steps.append(decode(*text(0, IDS[:1].repeat(size), first), wanted=[size - 1]))
        first += size
    assert "does not match expectation" not in play(engine, model, setup, steps, KIMI_OPS="require").log


@pytest.mark.parametrize("form", FORMS)
def test_an_f32_cache_gives_the_logits_of_plain_attention(form: str, errors: Errors, engine: Engine) -> None:
    in_all, worst = errors(engine, form, "F32")
    assert in_all <= 1e-10 and worst <= 1e-8


@pytest.mark.parametrize("cache_type", ["F16", "Q8_0"])
@pytest.mark.parametrize("form", FORMS)
def test_other_caches_lose_no_more_than_before(
    form: str, cache_type: str, errors: Errors, engine: Engine, upstream: Engine
) -> None:
    ours, theirs = (errors(build, form, cache_type)[0] for build in (engine, upstream))
    assert ours <= 1.05 * theirs
