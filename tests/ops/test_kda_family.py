"""All families with KDA on the operators, and on upstream's graphs: the logits of the references in float64.

However the tokens are decoded: in any batches, one sequence or several, saved and restored, rolled back, with flash
attention and without. Kimi-Linear, Ling 3 and Kimi K3 are compared with the torch references, which other tests compare
with transformers and with plain loops; GLM-5.3-Flash is compared with transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_reference import exact_logits
from graph_operators import operators_of_last_graph
from llama_script import Logits, Setup, assert_same, count_nodes, play, remove, text
from llama_script import decode as decode_step
from numpy.typing import NDArray
from random_checkpoint import Spec
from random_family import ON_DEVICES, VOCAB_SIZE, FamilySpec, write_family
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.worker import Worker
from kimi_gguf.validate.llama import RunOptions

pytestmark = pytest.mark.engine

TOKENS = 150
KIMI_LINEAR = [
    Spec(layers="KKMK", heads=4, kda_head_dim=64, seed=60),
    Spec(layers="KM", heads=2, kda_head_dim=128, std=0.02, seed=61),
    Spec(layers="KKM", heads=3, kda_head_dim=32, std=0.2, seed=62),
]
# The second has the group of layers and the size of KDA's heads of Ling-3.0-flash.
LING = [
    FamilySpec("bailingmoe3", "KKMK", mtp=True, clamped=True, seed=70),
    FamilySpec("bailingmoe3", "KKKKKM", heads=4, kda_head_dim=128, groups=(4, 2), clamped=True, std=0.3, seed=71),
    FamilySpec("bailingmoe3", "KM", compressed=True, seed=76),
]  # fmt: skip
# With few heads of the indexer, several pools have a score of exactly zero: which are chosen is not defined.
GLM = [
    FamilySpec("glm5-next", "KM", heads=4, kda_head_dim=32, rope=0, lower_bound=None, index_heads=8, seed=73),
    FamilySpec("glm5-next", "KMKM", rope=0, value=64, index_heads=8, clamped=True, std=0.3, seed=74),
]
K3 = [
    FamilySpec("kimi-k3", "KKMKM", seed=74),
    FamilySpec("kimi-k3", "KM", heads=3, kda_head_dim=32, lower_bound=None, std=0.3, seed=75),
]
LENGTHS = (TOKENS, 61, 120)
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "ubatches of 7": {"n_batch": TOKENS, "n_ubatch": 7},
    "ubatches of 65": {"n_batch": TOKENS, "n_ubatch": 65},
    "token by token": {"step_from": 60},
    "restored in the middle": {"save_restore_at": 75},
    "three sequences, ubatches of 32": {"texts": LENGTHS, "n_batch": 96, "n_ubatch": 32},
    "three sequences, token by token": {"texts": LENGTHS, "step_from": 50, "kv_unified": True},
    "three sequences, restored": {"texts": LENGTHS, "save_restore_at": 40, "n_batch": 96, "n_ubatch": 32},
}
CHOICES = ("require", "off")  # values of KIMI_OPS: the operators, upstream's graph


@dataclass(frozen=True)
class Model:
    """A file, three texts of TOKENS ids, and the logits [TOKENS, V] of each in float64."""

    spec: Spec | FamilySpec
    gguf: Path
    texts: list[NDArray[np.int64]]
    exact: list[NDArray[np.float64]]


SPECS = [*KIMI_LINEAR, *LING, *GLM, *K3]


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.id)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    spec, folder = request.param, tmp_path_factory.mktemp("family")
    is_family = isinstance(spec, FamilySpec)
    gguf = write_family(folder / "model.gguf", spec) if is_family else make_gguf(folder, spec)
    ids = np.random.default_rng(7).integers(0, VOCAB_SIZE, TOKENS)
    texts = [np.roll(ids, i) for i in range(3)]
    return Model(spec, gguf, texts, [exact_logits(spec, text) for text in texts])


@pytest.fixture(scope="module")
def workers(model: Model, engine: Engine) -> Iterator[dict[str, Worker]]:
    """For each choice a process; other models have others, so that a crash fails only the tests of one."""
    command = "-m", "kimi_gguf.validate.llama_worker"
    environments = {choice: {**engine.environment(), "KIMI_OPS": choice} for choice in CHOICES}
    with (
        Worker(*command, environment=environments["require"]) as require,
        Worker(*command, environment=environments["off"]) as off,
    ):
        yield {"require": require, "off": off}


def decode(worker: Worker, model: Model, folder: Path, way: str, flash_attention: bool) -> list[Logits]:
    """Logits of one sequence, or of several."""
    options = dict(WAYS[way])
    lengths = options.pop("texts", (TOKENS,))
    texts = [text[:length].tolist() for text, length in zip(model.texts, lengths, strict=False)]
    chosen = asdict(RunOptions(**options, flash_attention=flash_attention))
    worker.ask("logits", gguf=str(model.gguf), folder=str(folder), options=chosen, sequences=texts)
    return [np.load(folder / f"logits-{i}.npy") for i in range(len(texts))]


@pytest.mark.parametrize("number", range(4))
def test_the_logits_are_those_of_the_reference(
    model: Model, workers: dict[str, Worker], number: int, tmp_path: Path
) -> None:
    """Each architecture in each way; each model, and each way, with each choice with and without flash attention."""
    i = SPECS.index(model.spec)
    way = list(WAYS)[i % 2 + 2 * number]
    combination = (number + i // 2) % 4
    choice, flash_attention = CHOICES[combination // 2], combination % 2 == 1
    for got, exact in zip(
        decode(workers[choice], model, tmp_path, way, flash_attention), model.exact, strict=False
    ):
        assert_same(got, exact[: len(got)])


def test_the_operators_are_another_graph(model: Model, workers: dict[str, Worker], tmp_path: Path) -> None:
    ours, theirs = (decode(workers[choice], model, tmp_path, "at once", False)[0] for choice in CHOICES)
    assert (ours != theirs).any(), "one graph ran twice"


PROMPTS = (40, 30)  # tokens of two sequences in front of a draft
DRAFT, KEPT = 4, (2, 1)  # tokens of a draft, and how many of them are right
END = 60


@pytest.mark.parametrize("choice", CHOICES)
def test_after_a_rollback_the_logits_are_those_of_the_reference(
    model: Model, choice: str, engine: Engine, tmp_path: Path
) -> None:
    """Two sequences with drafts in one batch; then, from a saved state, the same once more."""
    flash_attention = (SPECS.index(model.spec) + CHOICES.index(choice)) % 2 == 0
    right, ends = model.texts[:2], [prompt + kept for prompt, kept in zip(PROMPTS, KEPT, strict=True)]
    drafts = []
    for end, prompt, ids in zip(ends, PROMPTS, right, strict=True):
        draft = ids[: prompt + DRAFT].copy()
        draft[end:] = (draft[end:] + 1) % VOCAB_SIZE
        drafts.append(draft)
    wrong = [exact_logits(model.spec, draft) for draft in drafts]
    both = range(2)

    def tokens(texts: list[NDArray[np.int64]], first: Any, end: Any) -> list[tuple[int, int, int]]:
        return [token for s in both for token in text(s, texts[s][first[s] : end[s]], first[s])]

    drafted = [len(draft) for draft in drafts]
    once = [
        decode_step(*tokens(drafts, PROMPTS, drafted)),
        *(remove(s, ends[s]) for s in both),
        decode_step(*tokens(right, ends, (END, END))),
    ]
    steps = [
        decode_step(*tokens(right, (0, 0), PROMPTS)),
        *(["save", s, str(tmp_path / f"{s}")] for s in both),
        *once,
        *(["load", s, str(tmp_path / f"{s}")] for s in both),
        *once,
    ]
    setup = Setup(n_seq_max=2, n_rs_seq=DRAFT, n_ubatch=16, flash_attention=flash_attention)
    played = play(engine, model.gguf, setup, steps, KIMI_OPS=choice)
    assert played.removed == [True] * 4
    exact = model.exact
    once_exact = [
        *(wrong[s][PROMPTS[s] :] for s in both),
        *(exact[s][ends[s] : END] for s in both),
    ]
    prompts = [exact[s][: PROMPTS[s]] for s in both]
    assert_same(played.logits, np.concatenate([*prompts, *once_exact, *once_exact]))


PREFILL = 300  # tokens of a batch, enough for the decompressed form of latent attention


@pytest.mark.parametrize("spec", [LING[0], GLM[0], K3[0]], ids=lambda spec: spec.id)
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
