"""Count the different answers that a llama-server under load gives to one question.

    tools/run equal_requests

Prints a table of both builds with the demo. Input: a build and a GGUF. Output: the number of different answers to equal
greedy requests among others, all sent at once, with the server's default slots, caches and threads; and whether one of
them is the answer given without load.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.bench.models import convert_demo
from kimi_gguf.bench.report import Rows, markdown
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.engine.builds import ensure
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import reporting
from kimi_gguf.engine.toolchain import cores
from kimi_gguf.tools.server import RunningServer, running

TYPES = ("F32", "BF16", "Q8_0", "Q4_K_M", "Q4_0")
HEADING = ("type", "build", "different texts", "different log probabilities", "as without load")
EQUAL = 12  # equal requests, and as many others
ANSWER = 200  # tokens
SYSTEM = "You explain words. " * 40
QUESTION = "define: elephant"
OTHERS = ("define: river", "define: ivory", "define: to walk", "define: stone", "define: a large tree")


@dataclass(frozen=True)
class Answer:
    """The text, and the logarithm of each token's probability, which shows differences that change no token."""

    text: str
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Answers:
    """`alone`: the answer without load. `equal`, `others`: the answers under load."""

    alone: Answer
    equal: tuple[Answer, ...]
    others: tuple[Answer, ...]

    @property
    def texts(self) -> int:
        """Number of different texts among the answers to the equal requests."""
        return len({answer.text for answer in self.equal})

    @property
    def different(self) -> int:
        """Number of different answers to the equal requests, with their log probabilities."""
        return len(set(self.equal))

    @property
    def as_alone(self) -> int:
        """Number of equal requests that got the answer given without load."""
        return self.equal.count(self.alone)


def ask_together(server: RunningServer) -> Answers:
    """Ask once alone, then all at once: every second request is one of the others, each with another length."""

    def ask(text: str) -> Answer:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        request = {
            "messages": messages,
            "max_tokens": ANSWER,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
        }
        (choice,) = server.post("/v1/chat/completions", request)["choices"]
        return Answer(
            choice["message"]["content"], tuple(each["logprob"] for each in choice["logprobs"]["content"])
        )

    others = [f"{OTHERS[i % len(OTHERS)]} {'again ' * i}" for i in range(EQUAL)]
    alone = ask(QUESTION)
    with ThreadPoolExecutor(2 * EQUAL) as pool:
        got = list(pool.map(ask, [text for other in others for text in (QUESTION, other)]))
    return Answers(alone, tuple(got[::2]), tuple(got[1::2]))


def measured_row(kind: str, build: str, answers: Answers) -> tuple[str, ...]:
    """The row of a type and a build, below `HEADING`."""
    alone = f"{answers.as_alone} of {len(answers.equal)}"
    return kind, build, str(answers.texts), str(answers.different), alone


def main(arguments: Sequence[str]) -> int:
    """Print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/run equal_requests", description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", default=TYPES, metavar="TYPE", help=f"default: {' '.join(TYPES)}")
    types: Sequence[str] = parser.parse_args(arguments).types
    rows: Rows = [HEADING]
    try:
        with reporting() as reporter, tempfile.TemporaryDirectory() as folder:
            builds = {"upstream": ensure(upstream=True), "patched": ensure()}
            for kind in types:
                gguf = convert_demo(kind, reporter)
                for build, engine in builds.items():
                    command = (engine.bin / "llama-server", "--model", gguf, "--threads", str(cores()))
                    with running(Path(folder) / "server.log", *command) as server:
                        rows.append(measured_row(kind, build, ask_together(server)))
                    reporter.note("  ".join(rows[-1]))
    except (EngineError, ConvertError) as error:
        print(f"equal_requests: error: {error}", file=sys.stderr)
        return 1
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
