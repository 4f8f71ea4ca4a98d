"""Count the prompt tokens that llama-server evaluates, in conversations, for long prompts and after a restart.

    tools/run prompt_cache

Prints the table of docs/serving.md for both builds. Input: a build of llama.cpp, the demo as F32 GGUF, the chat
template of Kimi K2. Output: for each situation the number of evaluated tokens, the number of tokens of the prompt, and
the limit for the former that the tests check. The text is random words from a seed, so that a run can be repeated. The
counts are `timings.prompt_n` and `timings.cache_n` of the server's answers.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.bench.models import convert_demo
from kimi_gguf.bench.report import Rows, markdown
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.engine.build import Cache, pinned_source
from kimi_gguf.engine.builds import Engine, cache_folder, ensure
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.engine.toolchain import cores
from kimi_gguf.patches.pin import load_pin
from kimi_gguf.tools.server import RunningServer, running

SYSTEM, MESSAGE, DOCUMENT = 600, 80, 500  # words
ANSWER = 60  # tokens
LONG = 3050  # words of the raw prompt, about 15,000 tokens
CONTEXT = 32768  # tokens
ROOM = 64  # tokens that may be evaluated in addition to the new ones
STEP = 1024  # tokens between two checkpoints of a raw prompt

Messages = list[dict[str, str]]
Start = Callable[..., Any]  # starts a server with additional options, as a context manager


@dataclass(frozen=True)
class Count:
    """The token counts of one request. `most`: the limit for `evaluated`; None: no limit."""

    situation: str
    evaluated: int
    prompt: int
    most: int | None


class Conversation:
    """A conversation with one server. Every request sends all previous messages."""

    def __init__(self, server: RunningServer, system: str) -> None:
        self.server = server
        self.messages: Messages = [{"role": "system", "content": system}]
        self.evaluated = self.prompt = 0

    def ask(self, text: str) -> Conversation:
        """Add a user message and the model's answer to it."""
        self.messages.append({"role": "user", "content": text})
        return self.answer()

    def again(self) -> Conversation:
        """Regenerate the last answer."""
        self.messages.pop()
        return self.answer()

    def edit(self, text: str) -> Conversation:
        """Replace the last user message and its answer."""
        del self.messages[-2:]
        return self.ask(text)

    def answer(self) -> Conversation:
        """Let the model answer the last message."""
        request = {"messages": self.messages, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
        got = self.server.post("/v1/chat/completions", request)
        self.messages.append({"role": "assistant", "content": got["choices"][0]["message"]["content"]})
        self.evaluated = got["timings"]["prompt_n"]
        self.prompt = got["timings"]["cache_n"] + self.evaluated
        return self

    def tokens(self, text: str) -> int:
        """The number of tokens that a user message adds to the prompt.

        It includes the end of the previous answer, the markers of the message and the markers of the next answer.
        """
        rendered = (
            f"<|im_end|><|im_user|>user<|im_middle|>{text}<|im_end|><|im_assistant|>assistant<|im_middle|>"
        )
        return len(self.server.post("/tokenize", {"content": rendered})["tokens"])


class Starter:
    """Starts servers of one build with the demo, one after the other. All of them save slots in the same folder."""

    def __init__(self, engine: Engine, gguf: Path, template: Path, folder: Path, threads: int) -> None:
        self._command: list[str | Path] = [
            engine.bin / "llama-server", "--model", gguf, "--jinja", "--chat-template-file", template,
            "-c", str(CONTEXT), "--override-kv", f"kimi-linear.context_length=int:{CONTEXT}", "-fa", "on",
            "-ctk", "f32", "-ctv", "f32", "--threads", str(threads), "--slot-save-path", f"{folder}/",
        ]  # fmt: skip
        self._log = folder / "server.log"

    def __call__(self, *options: str) -> AbstractContextManager[RunningServer]:
        """Start a server with additional options."""
        return running(self._log, *self._command, *options)


def chat_template(reporter: Reporter, name: str = "moonshotai-Kimi-K2") -> Path:
    """The path of a model's chat template in llama.cpp's archive. Raises `EngineError`."""
    source = pinned_source(load_pin(), Cache(cache_folder()), None, reporter)
    return source / "llama.cpp" / "models" / "templates" / f"{name}.jinja"


class Words:
    """Makes texts of random words of three to nine letters."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, count: int) -> str:
        lengths = [self._random.randint(3, 9) for _ in range(count)]
        return " ".join("".join(self._random.choices("abcdefghijklmnopqrstuvwxyz", k=n)) for n in lengths)


def raw(server: RunningServer, prompt: str) -> tuple[int, int]:
    """Send a prompt without a chat template. Returns the numbers of evaluated tokens and of all its tokens."""
    request = {"prompt": prompt, "n_predict": 4, "temperature": 0, "cache_prompt": True}
    timings = server.post("/completion", request)["timings"]
    return timings["prompt_n"], timings["prompt_n"] + timings["cache_n"]


def second_document(start: Start, words: Words) -> Iterator[Count]:
    """Two documents after one system prompt."""
    with start("-np", "1") as server:
        system = words(SYSTEM)
        Conversation(server, system).ask(words(DOCUMENT))
        second = words(DOCUMENT)
        talk = Conversation(server, system).ask(second)
        yield Count("second document after the same system prompt", talk.evaluated, talk.prompt,
                    talk.tokens(second) + ROOM)  # fmt: skip


def resumed(start: Start, words: Words) -> Iterator[Count]:
    """A conversation that continues after three others, with one slot and with the default slots."""
    for options, name in ((("-np", "1"), "one slot"), ((), "default slots")):
        with start(*options) as server:
            system = words(SYSTEM)
            talks = [Conversation(server, system) for _ in range(4)]
            for talk in talks:
                for _ in range(3):
                    talk.ask(words(MESSAGE))
            new = words(MESSAGE)
            first = talks[0].ask(new)
            yield Count(f"first conversation resumed after three others, {name}", first.evaluated, first.prompt,
                        first.tokens(new) + ROOM)  # fmt: skip


def long_prompts(start: Start, words: Words, count: int) -> Iterator[Count]:
    """A raw prompt of `count` words that is changed in the middle, and one that is truncated."""
    text = words(count).split()
    for name, change, most in (
        ("raw prompt changed in the middle", [*text[: count // 2], "changed", *text[count // 2 + 1 :]], None),
        ("raw prompt truncated to 95 %", text[: count * 95 // 100], STEP),
    ):
        with start("-np", "1") as server:
            raw(server, " ".join(text))
            evaluated, total = raw(server, " ".join(change))
            yield Count(name, evaluated, total, most or total // 2 + STEP)


def restored(start: Start, words: Words) -> Iterator[Count]:
    """Slots that one server saves and the next one restores."""
    for situation in ("answer regenerated", "last message edited"):
        with start("-np", "1") as server:
            talk = Conversation(server, words(SYSTEM))
            for _ in range(3):
                talk.ask(words(MESSAGE))
            server.post("/slots/0?action=save", {"filename": "slot.bin"})
        with start("-np", "1") as server:
            server.post("/slots/0?action=restore", {"filename": "slot.bin"})
            talk.server = server
            new = words(MESSAGE)
            edited = situation != "answer regenerated"
            talk = talk.edit(new) if edited else talk.again()
            yield Count(f"{situation} after a restart and a restored slot", talk.evaluated, talk.prompt,
                        talk.tokens(new) + ROOM if edited else 4)  # fmt: skip


def live(start: Start, words: Words) -> Iterator[Count]:
    """Conversations with a server that keeps running."""
    with start("-np", "1") as server:
        system = words(SYSTEM)
        talk = Conversation(server, system)
        for _ in range(3):
            talk.ask(words(MESSAGE))
        yield Count("live: answer regenerated", talk.again().evaluated, talk.prompt, 4)
        new = words(MESSAGE)
        yield Count("live: next turn", talk.ask(new).evaluated, talk.prompt, talk.tokens(new) + ROOM)
        new = words(MESSAGE)
        yield Count(
            "live: last message edited", talk.edit(new).evaluated, talk.prompt, talk.tokens(new) + ROOM
        )
        old = talk.messages[-3]
        old["content"] = old["content"][:-1]
        yield Count("live: old answer trimmed by one character", talk.again().evaluated, talk.prompt,
                    ANSWER + talk.tokens(new) + ROOM)  # fmt: skip
        new = words(MESSAGE)
        other = Conversation(server, system).ask(new)
        yield Count("live: new conversation with the same system prompt", other.evaluated, other.prompt,
                    talk.tokens(new) + ROOM)  # fmt: skip


def measure_prompt_cache(start: Start, seed: int = 1, long: int = LONG) -> Iterator[Count]:
    """Yield for each situation how many tokens the server evaluated. long: length of the raw prompt in words."""
    yield from second_document(start, Words(seed))
    yield from resumed(start, Words(seed))
    yield from long_prompts(start, Words(seed), long)
    yield from restored(start, Words(seed))
    yield from live(start, Words(seed))


def prompt_cache_table(counts: dict[str, list[Count]]) -> Rows:
    """The table of both builds' counts. counts: "upstream" and "patched", the same situations in the same order."""
    table: Rows = [("situation", "upstream", "patched", "at most")]
    for upstream, patched in zip(counts["upstream"], counts["patched"], strict=True):
        evaluated = (f"{count.evaluated} of {count.prompt}" for count in (upstream, patched))
        table.append((patched.situation, *evaluated, str(patched.most)))
    return table


def main(arguments: Sequence[str]) -> int:
    """Print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/run prompt_cache", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="of the random words (default: %(default)s)")
    seed: int = parser.parse_args(arguments).seed
    counts: dict[str, list[Count]] = {}
    try:
        with reporting() as reporter, tempfile.TemporaryDirectory() as folder:
            gguf, template = convert_demo("F32", reporter), chat_template(reporter)
            for name, engine in (("upstream", ensure(upstream=True)), ("patched", ensure())):
                counts[name] = []
                for count in measure_prompt_cache(
                    Starter(engine, gguf, template, Path(folder), cores()), seed
                ):
                    counts[name].append(count)
                    reporter.note(f"{name}: {count.situation}: {count.evaluated} of {count.prompt} tokens")
    except (EngineError, ConvertError) as error:
        print(f"prompt_cache: error: {error}", file=sys.stderr)
        return 1
    print(markdown(prompt_cache_table(counts)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
