"""The server's prompt cache changes no answer: prefixes, repetitions, truncated texts, removed passages.

Answers with the cache are compared token by token with the answers of the same server without it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from llama_server import Server, serving

from kimi_gguf.bench.prompt_cache import Starter, chat_template, measure_prompt_cache
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.progress import reporting

pytestmark = pytest.mark.engine

COUNT = 24
FIRST = "define: elephant\nThe largest living land animal, with a trunk and two tusks of ivory.\n"
SECOND = "define: river\nA large natural stream of water that flows into the sea or into a lake.\n"
THIRD = "define: to walk\nTo use one's feet to go somewhere; to go on foot, step by step.\n"
DIALOGUE = {
    "first": FIRST,
    "longer": FIRST + SECOND,
    "the same again": FIRST + SECOND,
    "another ending": FIRST + THIRD,
    "cut short": FIRST[:50],
    "something else": SECOND + FIRST + THIRD,
    "a passage removed": SECOND + THIRD,
    "with a few words": SECOND + "And so.\n" + FIRST + THIRD,
    "without them": SECOND + FIRST + THIRD + "define: ivory\n",
    "and another at the end": THIRD + SECOND,
}
DRAFT = ["--spec-type", "draft-simple", "--spec-draft-n-max", "3", "-td", "1"]
SETTINGS = {
    "plain": [],
    "two slots": ["-np", "2"],
    "checkpoints far apart": ["--ctx-checkpoints", "1"],
    "no checkpoints": ["--ctx-checkpoints", "0"],
    "chunks reused": ["--cache-reuse", "8", "--cache-ram", "0"],
    "with a draft": DRAFT,
    "with a draft, chunks reused": [*DRAFT, "--cache-reuse", "8", "--cache-ram", "0"],
}


@pytest.fixture(scope="module")
def gguf(demo_gguf: Callable[[str], Path]) -> Path:
    return demo_gguf("F32")


def answers(server: Server, *, cache: bool) -> dict[str, tuple[int, ...]]:
    """Send the requests one after the other to the same server."""
    return {name: server.complete(prompt, COUNT, cache_prompt=cache).ids for name, prompt in DIALOGUE.items()}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=list(SETTINGS))
def test_answers_do_not_depend_on_what_was_asked_before(
    tmp_path: Path, engine: Engine, gguf: Path, options: list[str]
) -> None:
    drafted = ["-md", str(gguf)] if "--spec-type" in options else []
    with serving(engine, tmp_path, gguf, *options, *drafted) as server:
        expected = answers(server, cache=False)
        assert answers(server, cache=True) == expected
        assert len(set(expected.values())) >= 6, "too many answers are equal to notice a wrong one"


def test_a_longer_prompt_begins_where_the_shorter_one_ended(
    tmp_path: Path, engine: Engine, gguf: Path
) -> None:
    with serving(engine, tmp_path, gguf, "-np", "1") as server:
        first = server.complete(FIRST, 1, cache_prompt=True)
        longer = server.complete(FIRST + SECOND, 1, cache_prompt=True)
    assert longer.timings["cache_n"] >= first.timings["prompt_n"] - 8
    assert longer.timings["prompt_n"] + longer.timings["cache_n"] > first.timings["prompt_n"]


def test_a_prompt_is_evaluated_once(tmp_path: Path, engine: Engine, gguf: Path) -> None:
    with reporting() as reporter:
        start = Starter(engine, gguf, chat_template(reporter), tmp_path, threads=1)
    counts = list(measure_prompt_cache(start, seed=2))
    assert len(counts) >= 12
    assert [count for count in counts if count.evaluated > count.most] == []


def long_text(words: str, tokens: int) -> str:
    """A text of at least `tokens` tokens."""
    return f"define: {words}\n" + f"{words} " * tokens


LONG = [long_text(words, 1000) for words in ("elephant", "river", "to walk", "ivory")]


def places(server: Server) -> list[list[int]]:
    """The positions of the checkpoints of each slot, in tokens. The prompts of LONG have different lengths."""
    return [[each["n_tokens"] for each in slot["checkpoints"]] for slot in server.get("/slots")]


def test_prompts_are_cut_at_the_same_places_under_load(tmp_path: Path, engine: Engine, gguf: Path) -> None:
    options = (
        "-np",
        "4",
        "--no-kv-unified",
        "--no-cache-idle-slots",
        "-c",
        "16384",
        "--checkpoint-min-step",
        "1",
    )
    alone = []
    for prompt in LONG:
        with serving(engine, tmp_path, gguf, *options) as server:
            server.complete(prompt, 4, cache_prompt=True)
            alone += [found for found in places(server) if found]
    with serving(engine, tmp_path, gguf, *options) as server:
        server.complete_together(LONG, 4)
        together = [found for found in places(server) if found]
    assert len(alone) == len(together) == len(LONG)
    assert sorted(together) == sorted(alone)


@pytest.mark.parametrize("mebibytes", [1, 4])
def test_checkpoints_keep_to_their_budget(tmp_path: Path, engine: Engine, gguf: Path, mebibytes: int) -> None:
    options = ("-np", "2", "-c", "32768", "--override-kv", "kimi-linear.context_length=int:16384")
    with serving(engine, tmp_path, gguf, *options, "--ctx-checkpoints-ram", str(mebibytes)) as server:
        for words in ("elephant", "river"):
            server.complete(long_text(words, 12000), 4, cache_prompt=True)
        found = [each for slot in server.get("/slots") for each in slot["checkpoints"]]
        saved = re.findall(r"checkpoints: +(\d+),", server.log.read_text())
    size = found[0]["size"]
    assert mebibytes * 2**20 - 2 * size <= sum(each["size"] for each in found) <= mebibytes * 2**20 or saved
    assert sum(each["size"] for each in found) <= mebibytes * 2**20


def test_checkpoints_become_rarer_towards_the_beginning(tmp_path: Path, engine: Engine, gguf: Path) -> None:
    options = ("-np", "1", "-c", "16384", "--override-kv", "kimi-linear.context_length=int:16384")
    with serving(engine, tmp_path, gguf, *options, "--ctx-checkpoints-ram", "3") as server:
        server.complete(long_text("elephant", 14000), 4, cache_prompt=True)
        found = places(server)[0]
    distances = [after - before for before, after in itertools.pairwise([0, *found])]
    assert 4 <= len(found) <= 7
    assert distances[0] > distances[-2] or distances[1] > distances[-2]
    assert distances == sorted(distances, reverse=True)
