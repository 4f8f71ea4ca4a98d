"""llama.cpp played step by step in a process of its own: what runs where, and what happens to states on the way.

Input: a build, a GGUF, a `Setup` (devices, cache, sequences) and steps made by the functions below. Output: `Played`
with the logits of the decoded tokens, in order, what the removals answered, and the log. `PlayError` holds why
llama.cpp refused. The process is llama_test_worker.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
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
    """How the model and its context are made; the defaults keep all of it on the CPU, in float32."""

    backend: str | None = None  # a shared library with another backend, loaded first
    tensors_on: tuple[tuple[str, str], ...] = ()  # pattern of tensors, device: as --override-tensor
    workers: tuple[str, ...] = ()  # HOST:PORT, their devices are RPC0, RPC1, ...
    devices: tuple[str, ...] | None = None  # by name; None: llama.cpp's own choice
    n_gpu_layers: int = 0  # the output counts as one
    offload_kqv: bool = True
    op_offload: bool = True
    flash_attention: bool | None = False  # None: llama.cpp's choice
    cache_type: str = "F32"
    n_seq_max: int = 1
    n_rs_seq: int = 0  # states kept for taking tokens back
    pooling: int | None = None  # llama_pooling_type, for `embed`
    mtp: bool = False  # load the MTP layer, for `draft`
    kv_unified: bool = False
    n_ubatch: int = 512
    cells: int = 512  # of each sequence


@dataclass(frozen=True)
class Played:
    """What the steps left."""

    logits: Logits  # [tokens, V] in the order in which they were decoded
    removed: list[Any]  # of each `remove`, whether llama.cpp did it; what other steps answered
    log: str


class PlayError(Exception):
    """Why there are no logits: what llama.cpp said."""


def decode(*tokens: tuple[int, int, int], wanted: Sequence[int] | None = None) -> Step:
    """One llama_decode of (sequence, position, token id). wanted: indices of those that give logits; None: all."""
    return ["decode", [[int(number) for number in token] for token in tokens], wanted]


def text(sequence: int, ids: Sequence[int] | NDArray[np.int64], first: int = 0) -> list[tuple[int, int, int]]:
    """Tokens for `decode`: the ids of one sequence from position `first` on."""
    return [(sequence, first + i, int(token)) for i, token in enumerate(ids)]


def together(ids: NDArray[np.int64], *positions: int | None) -> Step:
    """One token of each sequence with a position. ids: [sequences, tokens]."""
    return decode(*((s, n, int(ids[s][n])) for s, n in enumerate(positions) if n is not None))


def batches(ids: NDArray[np.int64], sizes: Sequence[int], first: int = 0) -> list[Step]:
    """Batches of one sequence from position `first` on, one after the other; all tokens give logits."""
    steps = []
    for size in sizes:
        steps.append(decode(*text(0, ids[first : first + size], first)))
        first += size
    return steps


def pauses(ids: NDArray[np.int64]) -> list[Step]:
    """Sequences that come, pause and go, after prompts of 5, 6 and 7 tokens."""
    return [
        together(ids, 5, 6, 7),
        together(ids, 6, None, 8),  # cells are not contiguous: the one between them moves to the end
        together(ids, 7, 7),
        together(ids, None, 8, 9, 0),
        cut(1, -1),
        together(ids, 8, None, 10, 1),
        together(ids, 9, 0, 11, 2),
        together(ids, 10, 1, 12, 3),
    ]


def drafts_rolled_back(
    ids: NDArray[np.int64], first: int = 8, second: int = 6
) -> tuple[list[Step], dict[str, Any]]:
    """Two sequences with drafts of which some tokens are taken back, and what their `Setup` needs.

    first, second: tokens of the two prompts.
    """
    m, n = first, second
    steps = [
        decode(*text(0, ids[0][:m])),
        decode(*text(1, ids[1][:n])),
        decode(*text(0, ids[0][m : m + 4], m), *text(1, ids[1][n : n + 4], n)),
        cut(0, m + 2),
        cut(1, n + 1),
        together(ids, m + 2, n + 1),
        together(ids, m + 3, n + 2),
        decode(*text(0, ids[0][m + 4 : m + 7], m + 4), *text(1, ids[1][n + 3 : n + 6], n + 3)),
        cut(1, n + 4),
        together(ids, m + 7, n + 4),
    ]
    return steps, {"n_seq_max": 2, "n_rs_seq": 4}


def saved_for_another(ids: NDArray[np.int64], file: Path) -> list[Step]:
    """A prompt, saved; two tokens of two sequences; the same two tokens after the saved state, in another sequence."""
    return [
        decode(*text(0, ids[0][:8])),
        save(0, file),
        *(together(ids, n) for n in (8, 9)),
        cut(0, -1),
        load(1, file),
        *(decode((1, n, int(ids[0][n]))) for n in (8, 9)),
    ]


def saved_conversation(ids: NDArray[np.int64], folder: Path, count: int) -> list[Step]:
    """Two prompts, three tokens of both together; then `count` tokens after the first prompt, from a saved state."""
    return [
        decode(*text(0, ids[0][:8])),
        decode(*text(1, ids[1][:5])),
        save(0, folder / "state"),
        *(together(ids, 8 + i, 5 + i) for i in range(3)),
        load(0, folder / "state"),
        decode(*text(0, ids[0][8 : 8 + count], 8)),
    ]


def save(sequence: int, file: Path) -> Step:
    """Write the state of a sequence into a file."""
    return ["save", sequence, str(file)]


def load(sequence: int, file: Path) -> Step:
    """Give a sequence the state that a file holds."""
    return ["load", sequence, str(file)]


def cut(sequence: int, first: int) -> Step:
    """Take back the tokens of a sequence from position `first` on; -1 empties it."""
    return ["cut", sequence, first]


def remove(sequence: int, first: int, end: int = -1) -> Step:
    """Remove positions [first, end) of a sequence; llama.cpp may refuse, see `Played.removed`. -1: to the last."""
    return ["remove", sequence, first, end]


def attempt(*tokens: tuple[int, int, int], nodes: int | None = None) -> Step:
    """As `decode`, aborted after so many nodes of the graph; None: not.

    Whether the tokens were decoded is in `Played.removed`. The last token of each sequence gives logits if they were.
    """
    return ["attempt", [[int(number) for number in token] for token in tokens], nodes]


def count_nodes(*tokens: tuple[int, int, int]) -> Step:
    """As `decode`; how many nodes the CPU computed one by one is in `Played.removed`. The last token gives logits."""
    return ["count_nodes", [[int(number) for number in token] for token in tokens]]


def copy(sequence: int, to: int) -> Step:
    """Let another sequence share the tokens of this one."""
    return ["copy", sequence, to]


def keep(sequence: int) -> Step:
    """Remove all other sequences."""
    return ["keep", sequence]


def threads(count: int) -> Step:
    """Set the number of threads from here on."""
    return ["threads", count]


def adapters(scales: Mapping[Path, float]) -> Step:
    """From here on, use these LoRA adapters with their scales, and no others."""
    return ["adapters", {str(file): scale for file, scale in scales.items()}]


def control(scale: float) -> Step:
    """From here on, add a random control vector, times the scale, to the output of each layer."""
    return ["control", scale]


def embed(*tokens: tuple[int, int, int]) -> Step:
    """As `decode`; the embeddings of the sequences, or without pooling of the tokens, are kept as logits."""
    return ["embed", [[int(number) for number in token] for token in tokens]]


def draft(*tokens: tuple[int, int, int]) -> Step:
    """As `decode`, also with the MTP layer, whose logits follow the others. Once in a play."""
    return ["draft", [[int(number) for number in token] for token in tokens]]


def store(sequence: int, name: str) -> Step:
    """Keep the state of a sequence in memory under a name. Whether it was saved is in `Played.removed`."""
    return ["store", sequence, name]


def fetch(sequence: int, name: str) -> Step:
    """Give a sequence the state that was stored under a name."""
    return ["fetch", sequence, name]


def context(**environment: str) -> Step:
    """Make one more context under this environment."""
    return ["context", environment]


def use(number: int) -> Step:
    """The steps from here on are for this context; the first is 0."""
    return ["use", number]


def play(engine: Engine, model: Path, setup: Setup, steps: Sequence[Step], **environment: str) -> Played:
    """Play the steps on a build. Raises `PlayError`."""
    variables = {**engine.environment(), **environment}
    with (
        tempfile.NamedTemporaryFile(suffix=".npy") as logits,
        Worker(str(WORKER), environment=variables) as worker,
    ):
        try:
            removed = worker.ask(
                "play", gguf=str(model), setup=asdict(setup), steps=list(steps), file=logits.name
            )
        except LlamaError as error:
            raise PlayError(f"{error}\n{worker.log[-1500:]}") from None
        return Played(np.load(logits.name), removed, worker.log)


def assert_same(got: Logits, expected: Logits) -> None:
    """The gate of the project for one model run in two ways: NMSE 1e-10 in all, 1e-8 at the worst position."""
    assert got.shape == expected.shape
    assert error_of(got, expected).passes
