"""Speculative decoding on the demo: the same tokens as without a draft, and no token evaluated twice.

The draft model is the demo itself as Q2_K: it needs no training or storage, and its tokens are often accepted and often
rejected. Weights and caches of the target are float32. The logits of a batch of drafted tokens and of the same tokens
one by one therefore differ only by rounding, which is far less than the difference between two candidate tokens.

Every generated or rejected token is evaluated once, except the last one, which has no successor.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from llama_server import serving
from speculation import figures, without_replay

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

DRAFT_TYPE = "Q2_K"
PROMPTS = ["define: elephant", "define: river", "define: to walk", "The sea is"]
COUNT = 64
COMMAND = "kimi_gguf.scripts.kimi_llama"


@pytest.fixture(scope="module")
def target(demo_gguf: Callable[[str], Path]) -> Path:
    return demo_gguf("F32")


@pytest.fixture(scope="module")
def draft(target: Path, engine: Engine) -> Path:
    gguf = target.with_name(f"demo-{DRAFT_TYPE}.gguf")
    quantize = [engine.bin / "llama-quantize", target, gguf, DRAFT_TYPE, "1"]
    subprocess.run(quantize, check=True, capture_output=True)
    return gguf


def drafting(draft: Path, length: int) -> list[str]:
    return ["--spec-type", "draft-simple", "-md", str(draft), "--spec-draft-n-max", str(length), "-td", "1"]


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, engine: Engine, target: Path
) -> Iterator[dict[str, tuple[int, ...]]]:
    """The server's output without a draft."""
    with serving(engine, tmp_path_factory.mktemp("plain"), target, "-np", "1") as server:
        yield {prompt: server.complete(prompt, COUNT).ids for prompt in PROMPTS}


@pytest.mark.parametrize(("length", "choice"), [(1, "off"), (3, "off"), (8, "require")])  # length of drafts
def test_the_server_writes_the_same_and_replays_nothing(
    tmp_path: Path, engine: Engine, target: Path, draft: Path, plain: dict[str, tuple[int, ...]],
    length: int, choice: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("KIMI_OPS", choice)
    with serving(engine, tmp_path, target, "-np", "1", *drafting(draft, length)) as server:
        answers = [server.complete(prompt, COUNT) for prompt in PROMPTS]
        assert [a.ids for a in answers] == [plain[prompt] for prompt in PROMPTS]
        assert server.account(len(answers)) == without_replay(answers)


STATE = (
    3 * (2 * 128 * 128 + 3 * 3 * 2 * 128) * 4
)  # bytes: 3 KDA layers with 2 heads of 128, and 3 convolutions


@pytest.mark.parametrize(("slots", "mib"), [(1, None), (1, 3), (4, 1)])
def test_the_memory_for_rollback_is_limited_and_shown(
    tmp_path: Path, engine: Engine, target: Path, draft: Path, plain: dict[str, tuple[int, ...]],
    slots: int, mib: int | None,
) -> None:  # fmt: skip
    """Drafts are as long as the states allow; with one state per slot, checkpoints are used."""
    states = 9 if mib is None else max(1, (mib << 20) // (slots * STATE))
    options = ["-np", str(slots), *drafting(draft, 8)]
    options += [] if mib is None else ["--spec-rollback-mem", str(mib)]
    with serving(engine, tmp_path, target, *options) as server:
        answer = server.complete(PROMPTS[0], COUNT)
        account, log = server.account(1), server.log.read_text()
    assert answer.ids == plain[PROMPTS[0]]
    total = slots * states * STATE / 2**20
    line = f": {slots} sequences x {states} states x {STATE / 2**20:.1f} MiB = {total:.1f} MiB"
    assert "target" + line in log
    assert "draft" + line in log
    assert ("drafts are shortened" in log) == (1 < states < 9)
    if states > 1:
        assert account == without_replay([answer])
        assert max(map(int, re.findall(r"generate_draft: .*#draft=(\d+)", log))) == states - 1
    else:
        assert account.restored > 0


LONG = 128  # tokens after which a text repeats itself
NGRAMS = ("ngram-simple", "ngram-cache")


@pytest.fixture(scope="module")
def long_texts(
    tmp_path_factory: pytest.TempPathFactory, engine: Engine, target: Path
) -> list[tuple[int, ...]]:
    """The server's output without a draft."""
    with serving(engine, tmp_path_factory.mktemp("long"), target, "-np", "1") as server:
        return [server.complete(prompt, LONG).ids for prompt in PROMPTS]


@pytest.mark.parametrize("kind", NGRAMS)
def test_drafts_from_the_text_itself(
    tmp_path: Path, engine: Engine, target: Path, long_texts: list[tuple[int, ...]], kind: str
) -> None:
    """n-gram drafts need no memory for rollback: if one is not accepted completely, a checkpoint is restored."""
    with serving(engine, tmp_path, target, "-np", "4", "--spec-type", kind, "--metrics") as server:
        answers = server.complete_together(PROMPTS, LONG)
        counted = {
            name: server.metric(f"spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted")
        }
        restored = server.account(len(PROMPTS)).restored
    assert [answer.ids for answer in answers] == long_texts
    drafted = sum(answer.timings.get("draft_n", 0) for answer in answers)
    accepted = sum(answer.timings.get("draft_n_accepted", 0) for answer in answers)
    assert 0 < accepted < drafted
    assert counted == {"draft": drafted, "accepted": accepted}
    assert restored > 0


def test_several_answers_to_one_prompt_share_its_state_and_part(
    tmp_path: Path, engine: Engine, target: Path, draft: Path
) -> None:
    request = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": COUNT, "ignore_eos": True}
    with serving(engine, tmp_path, target, "-np", "3") as server:
        (alone,) = server.post("/v1/completions", request)["choices"]
    with serving(engine, tmp_path, target, "-np", "3", *drafting(draft, 3)) as server:
        choices = server.post("/v1/completions", request | {"n": 3})["choices"]
    assert [choice["text"] for choice in choices] == [alone["text"]] * 3


def test_a_context_that_shifts_is_no_hindrance(
    tmp_path: Path, engine: Engine, target: Path, draft: Path
) -> None:
    """A text twice as long as the context: from time to time the server discards the older half."""
    small, long = ["-np", "1", "-c", "256", "--context-shift"], 500
    with serving(engine, tmp_path, target, *small) as server:
        expected = server.complete(PROMPTS[0], long)
    with serving(engine, tmp_path, target, *small, *drafting(draft, 3)) as server:
        answer = server.complete(PROMPTS[0], long)
        assert server.account(1) == without_replay([answer])
    assert answer.ids == expected.ids
    assert len(answer.ids) == long


def run_command(*words: str | Path) -> str:
    """The output of `kimi-llama run` with an F32 cache on one thread."""
    command = [sys.executable, "-m", COMMAND, "run", *words, "-ctk", "f32", "-ctv", "f32", "-t", "1"]
    command += ["-n", str(COUNT), "--temp", "0", "--ignore-eos"]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return run.stdout


def test_the_command_line_writes_the_same_with_a_draft(engine: Engine, target: Path, draft: Path) -> None:
    prompt = PROMPTS[0]
    plain = run_command(target, "-p", prompt)
    drafted = run_command(target, "-md", draft, "-p", prompt)
    assert plain.strip().startswith(prompt)
    assert drafted.strip() == plain.strip()


@pytest.mark.parametrize("options", [[], ["-ub", "4"]], ids=["replays nothing", "restores checkpoints"])
def test_the_tool_counts_what_it_did(engine: Engine, target: Path, draft: Path, options: list[str]) -> None:
    run = figures(engine, target, PROMPTS[0], COUNT, *drafting(draft, 3), *options)
    assert run.predicted == COUNT
    assert 0 < run.accepted < run.drafted == run.generated
    replayed = run.evaluated - run.once  # 1 if no batch has a single token: the tool then reports 1
    assert replayed > 1 if options else replayed in (0, 1)
