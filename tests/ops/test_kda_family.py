"""Ling 3, GLM-5.3-Flash and Kimi K3 on the operators: the same logits as upstream's graphs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_operators import operators_of_last_graph
from llama_script import Setup, assert_same, count_nodes, play, text
from llama_script import decode as decode_step
from random_family import ON_DEVICES, VOCAB_SIZE, FamilySpec, write_family
from synthetic_case import error_of

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.llama import RunOptions, run

pytestmark = pytest.mark.engine

TOKENS = 150
SPECS = [
    FamilySpec("bailingmoe3", "KKMK", mtp=True, clamped=True, seed=70),
    FamilySpec("bailingmoe3", "KM", heads=4, kda_head_dim=128, groups=(4, 2), std=0.3, seed=71),
    FamilySpec("glm5-next", "KKM", rope=0, value=64, seed=72),
    FamilySpec("glm5-next", "KM", heads=4, kda_head_dim=32, rope=0, lower_bound=None, seed=73),
    FamilySpec("kimi-k3", "KKMKM", seed=74),
    FamilySpec("kimi-k3", "KM", heads=3, kda_head_dim=32, lower_bound=None, std=0.3, seed=75),
]
LENGTHS = (TOKENS, 61, 120)
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "ubatches of 7": {"n_batch": TOKENS, "n_ubatch": 7},
    "ubatches of 65": {"n_batch": TOKENS, "n_ubatch": 65},
    "flash attention": {"flash_attention": True},
    "token by token": {"step_from": 60, "flash_attention": True},
    "restored in the middle": {"save_restore_at": 75},
    "three sequences, ubatches of 32": {"texts": LENGTHS, "n_batch": 96, "n_ubatch": 32},
    "three sequences, token by token": {"texts": LENGTHS, "step_from": 50, "kv_unified": True},
}


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.id)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family") / "model.gguf", request.param)


def decode(
    choice: str, engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch, way: Mapping[str, Any]
) -> list[np.ndarray[Any, Any]]:
    """Logits with KIMI_OPS=`choice`; `texts` of the way: lengths of several sequences, each rotated by its number."""
    monkeypatch.setenv("KIMI_OPS", choice)
    ids = np.random.default_rng(7).integers(0, VOCAB_SIZE, TOKENS)
    options = dict(way)
    lengths = options.pop("texts", (TOKENS,))
    texts = [np.roll(ids, i)[:length] for i, length in enumerate(lengths)]
    return run(engine, model, texts, RunOptions(**options)).logits


@pytest.mark.parametrize("way", WAYS)
def test_the_operators_give_the_logits_of_upstreams_graph(
    model: Path, way: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = decode("require", engine, model, monkeypatch, WAYS[way])
    theirs = decode("off", engine, model, monkeypatch, WAYS[way])
    for mine, other in zip(ours, theirs, strict=True):
        assert error_of(mine, other).passes
        assert (mine != other).any(), "one graph ran twice"


PREFILL = 300  # tokens of a batch, enough for the decompressed form of latent attention


@pytest.mark.parametrize("spec", SPECS[::2], ids=lambda spec: spec.id)
def test_the_operators_are_in_the_graphs(
    spec: FamilySpec, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs of a prompt and of a token. GLM-5.3-Flash has sparse attention, which is upstream's."""
    monkeypatch.setenv("KIMI_OPS", "require")
    model, ids = write_family(tmp_path / "model.gguf", spec), np.arange(PREFILL) % VOCAB_SIZE
    latent = spec.architecture != "glm5-next"

    def operators(count: int, **options: Any) -> set[str]:
        """Of the last graph with `count` tokens."""
        chosen = RunOptions(n_batch=count, flash_attention=True, **options)
        return operators_of_last_graph(engine, model, ids[: max(count, 4)], chosen, monkeypatch)

    prompt, token = operators(PREFILL), operators(1)
    for found in (prompt, token):
        assert {"KDA_CONV", "KDA_SCAN"} <= found
    assert ("LATENT_ATT" in prompt, "LATENT_ATT" in token) == (latent, False)
    if latent:
        assert ("FLASH_ATTN" in prompt, "FLASH_ATTN" in token) == (False, True)
    if spec.mtp:
        of_the_mtp_layer = operators(PREFILL, mtp=True)
        assert "LATENT_ATT" in of_the_mtp_layer
        assert "KDA_CONV" not in of_the_mtp_layer


@pytest.mark.parametrize("spec", ON_DEVICES, ids=lambda spec: spec.id)
def test_no_state_is_copied_on_the_cpu(spec: FamilySpec, engine: Engine, tmp_path: Path) -> None:
    """Each KDA layer has two operators; the nodes that copy their states are computed with them."""
    model = write_family(tmp_path / "model.gguf", spec)
    steps = [decode_step(*text(0, range(8))), count_nodes((0, 8, 1))]
    told = {"KIMI_OPS": "conv,scan,require", "GGML_SCHED_DEBUG": "2"}
    fused = play(engine, model, Setup(), steps, **told)
    single = play(engine, model, Setup(), steps, **told, GGML_CPU_DISABLE_FUSION="1")
    graph = fused.log[fused.log.rindex("## SPLIT") :]
    # upstream computes a norm and its weight as one
    norms = len(re.findall(r"\(  ?RMS_NORM\).*\n.*\( *MUL\)", graph))
    (one_by_one,), (all_nodes,) = single.removed, fused.removed
    assert one_by_one - all_nodes == 2 * spec.layers.count("K") + norms
    assert_same(fused.logits, single.logits)
