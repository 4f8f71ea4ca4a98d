"""Counts the different answers that a llama-server under load gives to one question.

Input: a build and a GGUF. Output: the number of different answers to equal greedy requests among others, all sent at
once, with the server's default slots, caches and threads; and whether one of them is the answer given without load.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kimi_gguf.bench.server import RunningServer

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
