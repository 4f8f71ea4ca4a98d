"""The server's prompt cache changes no answer: prefixes, repetitions, truncated texts, removed passages.

Answers with the cache are compared token by token with the answers of the same server without it.
"""

from __future__ import annotations

import itertools
import re
import threading
import urllib.error
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from llama_server import Server, serving

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.progress import reporting
from kimi_gguf.tools.prompt_cache import Starter, chat_template, measure_prompt_cache

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
    "no checkpoints": ["--ctx-checkpoints", "0"],
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


def test_a_prompt_is_evaluated_once(tmp_path: Path, engine: Engine, gguf: Path) -> None:
    with reporting() as reporter:
        start = Starter(engine, gguf, chat_template(reporter), tmp_path, threads=1)
    counts = list(measure_prompt_cache(start, seed=2, long=400))
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
    with serving(engine, tmp_path, gguf, *options) as server:
        for prompt in LONG:  # each takes a free slot
            server.complete(prompt, 4, cache_prompt=True)
        alone = [found for found in places(server) if found]
    with serving(engine, tmp_path, gguf, *options) as server:
        server.complete_together(LONG, 4)
        together = [found for found in places(server) if found]
    assert len(alone) == len(together) == len(LONG)
    assert sorted(together) == sorted(alone)


def test_checkpoints_keep_to_their_budget(tmp_path: Path, engine: Engine, gguf: Path) -> None:
    mebibytes = 1
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


def test_a_checkpoint_of_one_more_token_is_not_taken_for_another_prompt(
    tmp_path: Path, engine: Engine, gguf: Path
) -> None:
    """Prompts of which one is a token longer have checkpoints a token apart, four tokens before their ends."""
    with serving(engine, tmp_path, gguf, "-np", "1") as server:
        text = server.post("/tokenize", {"content": long_text("elephant", 590)})["tokens"][:600]
        a, b, c, d, e, f = server.post("/tokenize", {"content": "river stone salt ivory tree walk go"})[
            "tokens"
        ][:6]

        def answer(*end: int, cache: bool = True) -> list[float]:
            return logprobs(server, [*text, *end], cache_prompt=cache)

        answer(a, b, c, d)
        answer(a, b, c, d, e)
        got = [answer(f, b, c, d, e), answer(f, b, c, d, e)]
        expected = answer(f, b, c, d, e, cache=False)
    # the prompt is cut at another place than without the cache
    np.testing.assert_allclose(got, [expected, expected], atol=1e-5)


def logprobs(server: Server, prompt: str | Sequence[int], **more: Any) -> list[float]:
    """Of the tokens of a greedy answer: they tell states apart that give the same tokens."""
    request = {"prompt": prompt, "n_predict": 8, "temperature": 0, "n_probs": 1, "cache_prompt": True} | more
    found = server.post("/completion", request)["completion_probabilities"]
    return [each["logprob"] for each in found]


def test_conversations_in_idle_slots_are_not_lost_to_several_choices(
    tmp_path: Path, engine: Engine, gguf: Path
) -> None:
    with serving(engine, tmp_path, gguf, "-np", "2", "--no-cache-idle-slots") as server:
        server.complete(LONG[0], 4, cache_prompt=True)
        server.post("/v1/completions", {"prompt": LONG[1], "n": 2, "max_tokens": 4, "temperature": 0})
        again = server.complete(LONG[0], 4, cache_prompt=True)
    assert again.timings["prompt_n"] == 4


def test_a_prompt_waits_for_few_others(tmp_path: Path, engine: Engine, gguf: Path) -> None:
    """A prompt that fits in no batch next to other prompts, which always wait for the other slots."""
    options = "-np 4 --ctx-checkpoints 0 -b 512 -ub 512 --no-cache-idle-slots --cache-ram 0"
    clients = WORDS * 3
    with (
        serving(engine, tmp_path, gguf, *options.split()) as server,
        ThreadPoolExecutor(len(clients)) as pool,
    ):
        done = threading.Event()

        def others(word: str) -> int:
            answers = 0
            while not done.is_set() and answers < MOST:
                server.complete(f"{word} {answers}", 1, id_slot=WORDS.index(word))
                answers += 1
            return answers

        pending = [pool.submit(others, word) for word in clients]
        try:
            long = server.complete(LONG[0], 1, id_slot=3)
        finally:
            done.set()
        answers = sum(each.result() for each in pending)
    # A batch of the others before each of its own, and requests that are on their way at the beginning and the end.
    batches = long.timings["prompt_n"] / 512 + 2
    assert answers < 4 * len(WORDS) * batches


WORDS = ("river", "stone", "salt")  # of the slots 0, 1 and 2
MOST = 200  # answers of a client: after them, the long prompt is alone
WEIGHT = "blk.0.ffn_down"


@pytest.fixture(scope="module")
def adapters(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LoRA adapters that change the answers: random matrices for a weight of the first layer."""
    model = GGUFReader(gguf)
    (weight,) = (tensor for tensor in model.tensors if tensor.name == f"{WEIGHT}.weight")
    inputs, outputs = (int(size) for size in weight.shape)
    paths = [tmp_path_factory.mktemp("adapter") / f"adapter{seed}.gguf" for seed in range(2)]
    for seed, path in enumerate(paths):
        rng = np.random.default_rng(seed)
        writer = GGUFWriter(path, "kimi-linear")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 4.0)
        writer.add_tensor(f"{WEIGHT}.weight.lora_a", rng.standard_normal((4, inputs), np.float32))
        writer.add_tensor(f"{WEIGHT}.weight.lora_b", rng.standard_normal((outputs, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.fixture(scope="module")
def adapter(adapters: list[Path]) -> Path:
    return adapters[0]


def test_adapters_change_between_requests_of_several_slots(
    tmp_path: Path, engine: Engine, gguf: Path, adapters: list[Path]
) -> None:
    """With the prompt cache, each answer is that of a server which always has these scales."""
    scales = [(1.0, 0.0), (0.0, 1.0), (0.5, -1.0), (0.0, 0.0)]
    expected = {}
    for scale in scales:
        given = ",".join(f"{path}:{factor}" for path, factor in zip(adapters, scale, strict=True))
        with serving(engine, tmp_path, gguf, "-np", "1", "--lora-scaled", given) as server:
            expected[scale] = [logprobs(server, prompt, cache_prompt=False) for prompt in LONG[:2]]
    assert len({str(answers) for answers in expected.values()}) == len(scales)
    loaded = ",".join(map(str, adapters))
    with serving(engine, tmp_path, gguf, "-np", "2", "--lora", loaded, "--lora-init-without-apply") as server:
        for scale in (*scales, *reversed(scales), scales[2], scales[0]):
            for number, prompt in enumerate(LONG[:2]):
                lora = [{"id": id, "scale": factor} for id, factor in enumerate(scale)]
                assert logprobs(server, prompt, lora=lora) == expected[scale][number]


def test_states_of_an_adapter_are_not_continued_without_it(
    tmp_path: Path, engine: Engine, gguf: Path, adapter: Path
) -> None:
    with serving(engine, tmp_path, gguf, "-np", "1", "--lora", str(adapter)) as server:

        def answer(prompt: str, scale: float, cache: bool = True) -> list[float]:
            return logprobs(server, prompt, cache_prompt=cache, lora=[{"id": 0, "scale": scale}])

        with_adapter = answer(LONG[0], 1.0)
        answer(LONG[1], 0.0)
        without = answer(LONG[0], 0.0)
        assert answer(LONG[0], 1.0) == with_adapter
        assert answer(LONG[0], 0.0, cache=False) == without
        server.post("/lora-adapters", [{"id": 0, "scale": 0.0}])  # type: ignore[arg-type]
        assert logprobs(server, LONG[0]) == without
    assert with_adapter != without


def test_a_saved_slot_knows_its_adapters(tmp_path: Path, engine: Engine, gguf: Path, adapter: Path) -> None:
    options, lora = ("-np", "1", "--slot-save-path", f"{tmp_path}/"), ("--lora", str(adapter))

    with serving(engine, tmp_path, gguf, *options, *lora) as server:
        with_adapter = server.complete(LONG[0], COUNT, cache_prompt=True).ids
        server.slot("save")
    with serving(engine, tmp_path, gguf, *options, *lora) as server:
        server.slot("restore")
        again = server.complete(LONG[0], COUNT, cache_prompt=True)
        assert (again.ids, again.timings["prompt_n"]) == (with_adapter, 4)
    with serving(engine, tmp_path, gguf, *options) as server:
        with pytest.raises(urllib.error.HTTPError):
            server.slot("restore")
        assert "the LoRA adapter adapter0.gguf" in server.log.read_text()
        server.complete(LONG[0], COUNT, cache_prompt=True)
        server.slot("save")
    with serving(engine, tmp_path, gguf, *options, *lora) as server:
        server.slot("restore")
        assert server.complete(LONG[0], COUNT, cache_prompt=True).ids == with_adapter
