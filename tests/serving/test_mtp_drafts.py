"""Speculative decoding with Ling 3's MTP layer: the same tokens and logits as without, after any rejected draft.

Three models, see mtp_models.py: drafts are often accepted and often rejected; they are seldom accepted, and depend on
the MTP layer's own cache; they are always rejected. Weights and caches are float32, with one exception below.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_reference import mtp_logits, reference_of_family
from llama_server import Answer, Server, serving, started
from mtp_models import SPEC, Circle, write_circle
from random_adapter import is_matrix, shapes, write_adapter
from random_checkpoint import VOCAB_SIZE, Spec
from speculation import without_replay
from synthetic_case import error_of, make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

COUNT = 96
PROMPTS = ["the heat on it", "in other nd", "and so on", "on a winter is it"]
IDS = [5, 6, 7, 8, 100, 101, 102]  # a prompt as token ids
CIRCLES = {
    "often": Circle(trunk=0.5, mtp=0.15),
    "seldom": Circle(trunk=0.5, mtp=1.0),
    "never": Circle(trunk=0.3, random_mtp=True),
}
NO_ROLLBACK = ["-ub", "4"]  # 3 drafted tokens require ubatches of 5: checkpoints are restored


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mtp")
    vocabulary = make_gguf(folder, Spec(layers="K", heads=1, kda_head_dim=32))
    return {name: write_circle(folder / f"{name}.gguf", each, vocabulary) for name, each in CIRCLES.items()}


def drafting(length: int = 3) -> list[str]:
    return ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(length)]


def answers(
    engine: Engine, folder: Path, model: Path, *options: str, prompts: Sequence[str] = PROMPTS
) -> list[Answer]:
    """One after the other, from a server with one slot."""
    with serving(engine, folder, model, "-np", "1", *options) as server:
        return [server.complete(prompt, COUNT) for prompt in prompts]


@pytest.fixture(scope="module")
def plain(
    engine: Engine, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[tuple[int, ...]]]:
    """The tokens without drafts."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: [a.ids for a in answers(engine, folder, model)] for name, model in models.items()}


@pytest.mark.parametrize(
    ("name", "length", "choice"),
    [("often", 1, "off"), ("often", 3, "require"), ("seldom", 8, "require"), ("never", 3, "off")],
)
def test_the_server_writes_the_same_and_replays_nothing(
    name: str, length: int, choice: str, engine: Engine, models: dict[str, Path],
    plain: dict[str, list[tuple[int, ...]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("KIMI_OPS", choice)
    with serving(engine, tmp_path, models[name], "-np", "1", *drafting(length)) as server:
        got = [server.complete(prompt, COUNT) for prompt in PROMPTS]
        assert [a.ids for a in got] == plain[name]
        assert server.account(len(got)) == without_replay(got, accepts=name != "never")
        used = "kda: operators in use" in server.log.read_text(errors="replace")
    assert used == (choice == "require")


@pytest.mark.parametrize("name", ["often"])
def test_four_slots_write_what_each_would_alone(
    name: str,
    engine: Engine,
    models: dict[str, Path],
    plain: dict[str, list[tuple[int, ...]]],
    tmp_path: Path,
) -> None:
    with serving(engine, tmp_path, models[name], "-np", "4", *drafting()) as server:
        got = [answer for _ in range(3) for answer in server.complete_together(PROMPTS, COUNT)]
        assert [a.ids for a in got] == plain[name] * 3
        assert server.account(len(got)) == without_replay(got, accepts=name != "never")


def test_drafts_with_an_adapter(
    engine: Engine, models: dict[str, Path], plain: dict[str, list[tuple[int, ...]]], tmp_path: Path
) -> None:
    """Of all matrices, also of the MTP layer."""
    model = models["often"]
    names = [name for name, shape in shapes(model).items() if is_matrix(name, shape)]
    lora = ["--lora", str(write_adapter(tmp_path / "adapter.gguf", model, names).file)]
    expected = [answer.ids for answer in answers(engine, tmp_path, model, *lora)]
    got = answers(engine, tmp_path, model, *lora, *drafting())
    assert [answer.ids for answer in got] == expected
    assert all(answer.timings["draft_n"] for answer in got) and expected != plain["often"]


def log_probabilities(
    server: Server, prompt: Sequence[int], **more: Any
) -> tuple[Answer, np.ndarray[Any, Any]]:
    """An answer, and the log probabilities [tokens, V] of all tokens at each position."""
    request = {"prompt": prompt, "n_predict": 48, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    got = server.post("/completion", request | {"cache_prompt": False, "n_probs": VOCAB_SIZE} | more)
    key = "top_probs" if more.get("post_sampling_probs") else "top_logprobs"
    rows = np.full((len(got["completion_probabilities"]), VOCAB_SIZE), np.nan)
    for row, candidates in zip(rows, got["completion_probabilities"], strict=True):
        for each in candidates[key]:
            row[each["id"]] = each[key.removeprefix("top_").removesuffix("s")]
    return Answer(tuple(got["tokens"]), got["timings"]), rows


@pytest.mark.parametrize(("name", "rollback"), [("often", True), ("seldom", False), ("never", True)])
def test_the_state_after_a_rejected_draft_is_exact(
    name: str, rollback: bool, engine: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    """Also 0035-server-logprobs-of-drafts: every token has its log probabilities."""
    options = ["-np", "1", *([] if rollback else NO_ROLLBACK)]
    with serving(engine, tmp_path, models[name], *options) as server:
        alone, expected = log_probabilities(server, IDS)
    with serving(engine, tmp_path, models[name], *options, *drafting()) as server:
        drafted, got = log_probabilities(server, IDS)
        assert (server.account(1).restored == 0) == rollback
    assert drafted.ids == alone.ids
    rejected = drafted.timings["draft_n"] - drafted.timings["draft_n_accepted"]
    assert rejected > 8
    assert got.shape == expected.shape
    assert error_of(got, expected).passes


def test_probabilities_after_sampling_come_without_drafts(
    engine: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    """0035-server-logprobs-of-drafts: the sampler keeps the candidates of one token only."""
    with serving(engine, tmp_path, models["often"], "-np", "1", *drafting()) as server:
        answer, got = log_probabilities(server, IDS, post_sampling_probs=True)
    assert answer.timings.get("draft_n", 0) == 0
    assert np.nanmax(got, 1) == pytest.approx(1)


Draft = list[tuple[int, int, int, float]]  # step, rank, token id, probability


@dataclass(frozen=True)
class Drafts:
    """The candidates of each draft of a request, by the number of tokens that the answer had."""

    by_length: Mapping[int, Draft]

    def near(self, other: Drafts) -> bool:
        """Whether drafts at the same places have the same candidates; shorter drafts may be cut."""
        common = self.by_length.keys() & other.by_length.keys()
        assert common
        return all(same(self.by_length[n], other.by_length[n]) for n in common)


def same(one: Draft, other: Draft) -> bool:
    """The log has three digits of a probability; small ones may be in another order."""
    pairs = zip(one, other, strict=False)
    return all(abs(a[3] - b[3]) <= 0.0011 and (a[:3] == b[:3] or a[3] < 0.4) for a, b in pairs)


def drafts_of(server: Server, requests: int) -> list[Drafts]:
    """Of each request that a server with one slot has answered, from its debug log."""
    server.account(requests)
    found: list[dict[int, Draft]] = []
    length = 0
    for line in server.log.read_text(errors="replace").splitlines():
        if "processing task, is_child" in line:
            found.append({})
            length = 1  # the first token is sampled from the prompt's logits
        elif match := re.search(r"draft candidate +(\d+), pos +(\d+): +(\d+) \( *([\d.]+)\)", line):
            rank, step, token = (int(number) for number in match.groups()[:3])
            found[-1].setdefault(length, []).append((step, rank, token, float(match[4])))
        elif match := re.search(r"add accepted tokens: .* ids.size=(\d+)", line):
            length += int(match[1])
    return [Drafts(each) for each in found]


def first_requests_differ(engine: Engine, model: Path, folder: Path) -> bool:
    with serving(engine, folder, model, "-np", "1", *drafting()) as server:
        for _ in range(2):
            server.complete(IDS, COUNT)
        first, second = drafts_of(server, 2)
    return not first.near(second)


def test_drafts_do_not_depend_on_the_request_before(
    engine: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    """0034-mtp-hidden-state."""
    assert not first_requests_differ(engine, models["seldom"], tmp_path)


def test_upstream_uses_the_hidden_state_of_the_request_before(
    upstream: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    assert first_requests_differ(upstream, models["seldom"], tmp_path)


def test_drafts_do_not_depend_on_rejected_drafts(
    engine: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    """A draft in the middle of an answer, after many rejected ones, is that of the same text as a prompt."""
    with serving(engine, tmp_path, models["seldom"], "-np", "1", *drafting()) as server:
        answer = server.complete(IDS, COUNT)
        starts = range(0, 80, 5)
        for start in starts:
            server.complete([*IDS, *answer.ids[:start]], 8)
        whole, *parts = drafts_of(server, 1 + len(starts))
    compared = 0
    for start, part in zip(starts, parts, strict=True):
        if start + 1 in whole.by_length:
            compared += 1
            assert same(whole.by_length[start + 1], part.by_length[1]), start
    assert compared > 3


def test_drafts_are_those_of_the_reference(engine: Engine, models: dict[str, Path], tmp_path: Path) -> None:
    """The first drafted token after each token of an answer, by the torch reference of the MTP layer.

    Candidates are the ten most likely tokens; their probabilities have three digits.
    """
    with serving(engine, tmp_path, models["seldom"], "-np", "1", *drafting()) as server:
        answer = server.complete(IDS, COUNT)
        (drafts,) = drafts_of(server, 1)
    reference = reference_of_family(SPEC, change=CIRCLES["seldom"].change)
    logits = mtp_logits(reference, np.array([*IDS, *answer.ids]))
    assert len(drafts.by_length) > 30
    for length, draft in drafts.by_length.items():
        row = logits[len(IDS) + length - 1]
        best = np.argsort(-row)[:10]
        odds = np.exp(row[best] - row[best[0]])
        expected = dict(zip(best.tolist(), odds / odds.sum(), strict=True))
        first = {token: found for step, _, token, found in draft if step == 0}
        assert next(iter(first)) == best[0], length
        assert all(abs(expected[token] - found) <= 0.0011 for token, found in first.items()), length


STORED = [(7 * i) % 120 + 3 for i in range(100)]  # saved before another prompt takes the slot
OTHER = [(11 * i) % 120 + 5 for i in range(100)]
TAIL = [9, 8, 7]


def stored_then_continued(
    way: str, engine: Engine, folder: Path, model: Path, *options: str
) -> tuple[Answer, Drafts]:
    """The answer to a prompt that continues an earlier one and its answer, and its drafts.

    way: what happens to the earlier prompt. It stays in the slot, another prompt takes the slot, the slot's file is
    restored by a new server, or all prompts are saved at the end and restored by a new server.
    """
    given = ("-np", "1", *drafting(), "--slot-save-path", f"{folder}/", *options)
    if way == "kept":
        given = (*given, "--keep-slots")
    with serving(engine, folder, model, *given) as server:
        first = server.complete(STORED, 8, cache_prompt=True)
        longer = [*STORED, *first.ids, *TAIL]
        if way in ("slot", "cache"):
            if way == "cache":
                server.complete(OTHER, 8, cache_prompt=True)
            answer = server.complete(longer, COUNT, cache_prompt=True)
            return answer, drafts_of(server, 2 + (way == "cache"))[-1]
        if way == "file":
            server.slot("save")
    with serving(engine, folder, model, *given) as server:
        server.complete(OTHER, 8, cache_prompt=True)
        if way == "file":
            server.slot("restore")
        answer = server.complete(longer, COUNT, cache_prompt=True)
        return answer, drafts_of(server, 2)[-1]


@pytest.mark.parametrize(
    ("way", "options"),
    [("cache", NO_ROLLBACK), ("file", []), ("kept", NO_ROLLBACK)],
    ids=["cache", "file", "kept"],
)
def test_drafts_after_a_restored_prompt(
    way: str, options: list[str], engine: Engine, models: dict[str, Path], tmp_path: Path
) -> None:
    """0034-mtp-hidden-state, 0053-server-prompt-cache: the hidden state is saved and restored with the prompt."""
    expected, its_drafts = stored_then_continued("slot", engine, tmp_path, models["seldom"], *options)
    answer, drafts = stored_then_continued(way, engine, tmp_path, models["seldom"], *options)
    assert answer.timings["cache_n"] == expected.timings["cache_n"] >= len(STORED)
    assert answer.ids == expected.ids
    assert drafts.by_length == its_drafts.by_length
    for count in ("draft_n", "draft_n_accepted"):
        assert answer.timings[count] == expected.timings[count]


def test_the_command_uses_the_mtp_layer(models: dict[str, Path], tmp_path: Path, engine: Engine) -> None:
    """`kimi-llama serve` as a user runs it, with an F16 cache: the same text, and drafted tokens are accepted."""
    request = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": COUNT, "ignore_eos": True}
    texts = []
    for options in ([], ["--spec-type", "draft-mtp"]):
        command = [sys.executable, "-m", "kimi_gguf.scripts.kimi_llama", "serve", models["often"], *options]
        with started(tmp_path, *command) as server:
            got = server.post("/v1/completions", request)
        texts.append(got["choices"][0]["text"])
        assert (got["timings"].get("draft_n_accepted", 0) > 0) == bool(options)
    assert texts[0] == texts[1] != ""
