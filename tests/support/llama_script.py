"""Runs llama.cpp step by step in a separate process: which device computes, and what happens to states.

Input: a build, a GGUF, a `Setup` (devices, cache, sequences) and steps made by the functions below. Output: `Played`
with the logits of the decoded tokens, in order, the results of the removals, and the log. `PlayError` has the reason
if llama.cpp refused. The process is llama_test_worker.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from synthetic_case import error_of

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.llama import LlamaError, Logits
from kimi_gguf.engine.worker import Worker

WORKER = Path(__file__).with_name("llama_test_worker.py")
Step = list[Any]


@dataclass(frozen=True)
class Setup:
    """Options of the model and its context; with the defaults everything is on the CPU, in float32."""

    backend: str | None = None  # a shared library with another backend, loaded first
    devices: tuple[str, ...] | None = None  # by name; None: llama.cpp's own choice
    n_gpu_layers: int = 0  # the output counts as a layer
    offload_kqv: bool = True
    op_offload: bool = True
    flash_attention: bool | None = False  # None: llama.cpp's choice
    cache_type: str = "F32"
    n_seq_max: int = 1
    n_rs_seq: int = 0  # states that are kept for rollback
    kv_unified: bool = False
    n_ubatch: int = 512
    cells: int = 512  # per sequence


@dataclass(frozen=True)
class Played:
    """The results of the steps."""

    logits: Logits  # [tokens, V] in the order in which they were decoded
    removed: list[bool]  # for each `remove`, whether llama.cpp did it
    log: str


class PlayError(Exception):
    """The error of llama.cpp."""


def decode(*tokens: tuple[int, int, int], wanted: Sequence[int] | None = None) -> Step:
    """One llama_decode of (sequence, position, token id). wanted: indices of the tokens with logits; None: all."""
    return ["decode", [[int(number) for number in token] for token in tokens], wanted]


def text(sequence: int, ids: Sequence[int] | NDArray[np.int64], first: int = 0) -> list[tuple[int, int, int]]:
    """Tokens for `decode`: the ids of one sequence from position `first` on."""
    return [(sequence, first + i, int(token)) for i, token in enumerate(ids)]


def save(sequence: int, file: Path) -> Step:
    """Save the state of a sequence to a file."""
    return ["save", sequence, str(file)]


def load(sequence: int, file: Path) -> Step:
    """Load the state in a file into a sequence."""
    return ["load", sequence, str(file)]


def cut(sequence: int, first: int) -> Step:
    """Remove the tokens of a sequence from position `first` on; -1: all."""
    return ["cut", sequence, first]


def remove(sequence: int, first: int, end: int = -1) -> Step:
    """Remove positions [first, end) of a sequence; llama.cpp may refuse, see `Played.removed`. -1: to the last."""
    return ["remove", sequence, first, end]


def attempt(*tokens: tuple[int, int, int], nodes: int | None = None) -> Step:
    """Like `decode`, without logits, aborted after this number of nodes of the graph; None: not aborted.

    Whether the tokens were decoded is in `Played.removed`.
    """
    return ["attempt", [[int(number) for number in token] for token in tokens], nodes]


def copy(sequence: int, to: int) -> Step:
    """Let another sequence share the tokens of this one."""
    return ["copy", sequence, to]


def keep(sequence: int) -> Step:
    """Remove all other sequences."""
    return ["keep", sequence]


def context(**environment: str) -> Step:
    """Create another context with this environment."""
    return ["context", environment]


def use(number: int) -> Step:
    """Select the context for the following steps; the first is 0."""
    return ["use", number]


def play(engine: Engine, model: Path, setup: Setup, steps: Sequence[Step], **environment: str) -> Played:
    """Run the steps with a build. Raises `PlayError`."""
    told = {**engine.environment(), **environment}
    with (
        tempfile.NamedTemporaryFile(suffix=".npy") as logits,
        Worker(str(WORKER), environment=told) as worker,
    ):
        try:
            removed = worker.ask(
                "play", gguf=str(model), setup=asdict(setup), steps=list(steps), file=logits.name
            )
        except LlamaError as error:
            raise PlayError(f"{error}\n{worker.log[-1500:]}") from None
        return Played(np.load(logits.name), removed, worker.log)


def assert_same(got: Logits, expected: Logits) -> None:
    """The limits of the project for one model run in two ways: NMSE 1e-10 in total, 1e-8 at the worst position."""
    assert got.shape == expected.shape
    assert error_of(got, expected).passes
