"""The server's prompt cache changes no answer: prefixes, repetitions, truncated texts, removed passages.

Answers with the cache are compared, token for token, with those of the same server without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from llama_server import Server, serving

from kimi_gguf.engine.builds import Engine

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
        assert len(set(expected.values())) >= 6, "prompts that all end alike show nothing"


def test_a_longer_prompt_begins_where_the_shorter_one_ended(
    tmp_path: Path, engine: Engine, gguf: Path
) -> None:
    with serving(engine, tmp_path, gguf, "-np", "1") as server:
        first = server.complete(FIRST, 1, cache_prompt=True)
        longer = server.complete(FIRST + SECOND, 1, cache_prompt=True)
    assert longer.timings["cache_n"] >= first.timings["prompt_n"] - 8
    assert longer.timings["prompt_n"] + longer.timings["cache_n"] > first.timings["prompt_n"]
