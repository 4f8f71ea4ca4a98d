"""Random operations on the memory of hybrid models: every answer is that of a fresh context, or a refusal.

One of the models has sparse attention. Sequences are decoded in batches of any size, aborted, rolled back, removed,
copied, kept, saved and restored. After each decode the logits are compared with those of the same tokens decoded in
an empty context. To run 5000 examples:

    KIMI_FUZZ=5000 .venv/bin/python -m pytest tests/serving/test_memory_fuzzed.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from llama_script import WORKER, Logits, Setup, Step, assert_same, attempt, copy, keep, remove, use
from random_checkpoint import Spec
from random_family import FamilySpec, write_family
from synthetic_case import make_case

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.worker import Worker

pytestmark = pytest.mark.engine

SEQUENCES, LIMIT, VOCAB = 3, 60, 128
SETUP = Setup(n_seq_max=SEQUENCES, n_rs_seq=4, n_ubatch=16, cells=64)
Tokens = tuple[int, ...]

sequences = st.integers(0, SEQUENCES - 1)
batches = st.dictionaries(sequences, st.integers(1, 24), min_size=1)  # tokens, by sequence
operations = st.one_of(
    st.tuples(st.just("decode"), batches),
    st.tuples(st.just("abort"), batches, st.integers(0, 300)),
    st.tuples(st.just("roll_back"), sequences, st.integers(1, 6)),
    st.tuples(st.just("remove"), sequences, st.sampled_from([(0, -1), (-1, -1), (0, LIMIT + 1)])),
    st.tuples(st.just("copy"), sequences, sequences),
    st.tuples(st.just("keep"), sequences),
    st.tuples(st.just("save"), sequences, st.sampled_from("ab")),
    st.tuples(st.just("restore"), sequences, st.sampled_from("ab")),
)


class Memory:
    """llama.cpp's memory, and the tokens that it should contain."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.fresh: dict[Tokens, Logits] = {}

    def step(self, step: Step) -> tuple[Any, Logits]:
        answer, logits = self.worker.ask("step", step=step)
        return answer, np.array(logits)

    def begin(self) -> None:
        self.step(["clear"])
        self.tokens: list[Tokens] = [()] * SEQUENCES
        self.doubtful: set[int] = set()  # a failed batch may have lost their states
        self.saved: dict[str, Tokens] = {}
        self.n_decoded = 0

    def expected(self, tokens: Tokens) -> Logits:
        """The logits after these tokens, decoded in an empty context."""
        if tokens not in self.fresh:
            self.step(use(1))
            self.step(["clear"])
            self.fresh[tokens] = self.step(attempt(*((0, i, token) for i, token in enumerate(tokens))))[1]
            self.step(use(0))
        return self.fresh[tokens]

    def decode(self, sizes: dict[int, int], nodes: int | None = None) -> None:
        sizes = {s: size for s, size in sizes.items() if len(self.tokens[s]) + size <= LIMIT}
        longer = {
            s: self.tokens[s] + tuple((5 * (self.n_decoded + i) + 3 * s + 1) % VOCAB for i in range(size))
            for s, size in sizes.items()
        }
        self.n_decoded += sum(sizes.values())
        batch = [(s, i, longer[s][i]) for s in sizes for i in range(len(self.tokens[s]), len(longer[s]))]
        if not batch:
            return
        decoded, logits = self.step(attempt(*batch, nodes=nodes))
        if decoded:
            for s, found in zip(sizes, logits, strict=True):
                self.tokens[s] = longer[s]
                assert_same(found[None], self.expected(longer[s]))
            self.doubtful -= sizes.keys()
            return
        assert nodes is not None or self.doubtful & sizes.keys(), "refused without a reason"
        # the batch may have moved the states of other sequences, and ubatches before the failed one are computed
        self.doubtful |= {s for s in range(SEQUENCES) if self.tokens[s]} | sizes.keys()
        for s in sizes:
            self.tokens[s] = longer[s][: self.step(["length", s])[0]]
        self.doubtful -= {s for s in range(SEQUENCES) if not self.tokens[s]}

    def abort(self, sizes: dict[int, int], nodes: int) -> None:
        self.decode(sizes, nodes)

    def roll_back(self, sequence: int, depth: int) -> None:
        end = len(self.tokens[sequence]) - depth
        if end > 0 and self.step(remove(sequence, end))[0]:
            assert sequence not in self.doubtful or self.step(["length", sequence])[0] == end
            self.tokens[sequence] = self.tokens[sequence][:end]

    def remove(self, sequence: int, positions: tuple[int, int]) -> None:
        assert self.step(remove(sequence, *positions))[0]
        self.tokens[sequence] = ()
        self.doubtful.discard(sequence)

    def copy(self, sequence: int, to: int) -> None:
        self.step(copy(sequence, to))
        self.tokens[to] = self.tokens[sequence]
        self.doubtful = self.doubtful - {to} | ({to} if sequence in self.doubtful else set())

    def keep(self, sequence: int) -> None:
        self.step(keep(sequence))
        self.tokens = [tokens if s == sequence else () for s, tokens in enumerate(self.tokens)]
        self.doubtful &= {sequence}

    def save(self, sequence: int, name: str) -> None:
        if self.tokens[sequence] and self.step(["store", sequence, name])[0]:
            self.saved[name] = self.tokens[sequence]

    def restore(self, sequence: int, name: str) -> None:
        if name in self.saved:
            self.step(["fetch", sequence, name])
            self.tokens[sequence] = self.saved[name]
            self.doubtful.discard(sequence)


def kimi_linear(folder: Path) -> Path:
    return make_case(folder, Spec(layers="KMK", heads=2, kda_head_dim=32, seed=92)).gguf


def glm(folder: Path) -> Path:
    """Attends to 4 pools of 4 tokens. With few heads of the indexer, pools have equal scores of zero: which of them are
    chosen is not defined, and depends on the batch."""
    spec = FamilySpec("glm5-next", rope=0, value=64, index_heads=8, index_top_k=16, seed=92)
    return write_family(folder / "model.gguf", spec)


def ling(folder: Path) -> Path:
    return write_family(folder / "model.gguf", FamilySpec("bailingmoe3", "KMK", compressed=True, seed=93))


def k3(folder: Path) -> Path:
    return write_family(folder / "model.gguf", FamilySpec("kimi-k3", "KMK", seed=94))


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written: Path = request.param(tmp_path_factory.mktemp("model"))
    return written


@pytest.fixture(scope="module", params=[False, True], ids=["a stream each", "unified"])
def memory(request: pytest.FixtureRequest, model: Path, engine: Engine) -> Iterator[Memory]:
    with Worker(str(WORKER), environment=engine.environment()) as worker:
        worker.ask("begin", gguf=str(model), setup=asdict(SETUP) | {"kv_unified": request.param})
        memory = Memory(worker)
        memory.step(["context", {}])
        memory.step(use(0))
        yield memory


def examples(count: int) -> settings:
    """So many examples, or KIMI_FUZZ."""
    return settings(max_examples=int(os.environ.get("KIMI_FUZZ", count)), deadline=None)


histories = st.lists(operations, min_size=2, max_size=20)


@pytest.mark.parametrize("model", [kimi_linear, glm], ids=["kimi-linear", "glm5-next"], indirect=True)
@examples(40)
@given(histories)
def test_no_answer_is_silently_wrong(memory: Memory, history: list[tuple[Any, ...]]) -> None:
    check(memory, history)


@pytest.mark.parametrize("model", [ling, k3], ids=["bailingmoe3", "kimi-k3"], indirect=True)
@examples(8)
@given(histories)
def test_the_other_families_have_the_same_memory(memory: Memory, history: list[tuple[Any, ...]]) -> None:
    check(memory, history)


def check(memory: Memory, history: list[tuple[Any, ...]]) -> None:
    """Do all operations on an empty memory, then decode one more token of each sequence."""
    memory.begin()
    for name, *given_ in history:
        note(f"{name} {given_}: {memory.tokens}")
        getattr(memory, name)(*given_)
    for sequence in range(SEQUENCES):
        memory.decode({sequence: 1})
