"""The logits of a token on the CPU have the same bits whatever else is decoded, and wherever its sequence is stored.

The logits of a sequence that is decoded alone, token by token, are compared with those of the same tokens next to other
sequences, prompts and drafts, with other numbers of threads, with a unified cache, and after other sequences were
removed. Without our operators, whose cells are listed for each sequence, the mask has to keep sequences apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from llama_script import WORKER, Logits, Setup, Step, adapters, decode, remove, text
from random_adapter import is_matrix, shapes, write_adapter

from kimi_gguf.bench.models import generate
from kimi_gguf.bench.shapes import BenchModel
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.progress import Silent
from kimi_gguf.engine.worker import Worker

pytestmark = pytest.mark.engine

SLOTS, SUBJECT, PROMPT, STEPS = 24, 5, 150, 4
VOCABULARY = 512
# Type of the weights, type of the cache, and one cache for all sequences or a stream for each: every kind of matmul
# and of attention, in both kinds of cache.
MODELS = (
    ("F32", "F32", "unified"),
    ("F16", "F16", "streams"),
    ("BF16", "BF16", "unified"),
    ("Q8_0", "Q8_0", "streams"),
    ("Q4_0", "F16", "unified"),
    ("Q4_K_M", "Q4_0", "streams"),
    ("Q6_K", "F16", "unified"),
)
OTHERS = [slot for slot in range(SLOTS) if slot != SUBJECT]
MASKED = 1e-8  # largest NMSE without our operators, whose sums do not depend on the batch

Tokens = list[tuple[int, int, int]]


def tokens(slot: int, first: int, count: int) -> Tokens:
    """Tokens [first, first + count) of the text of a slot."""
    ids = np.random.default_rng(slot).integers(0, VOCABULARY, first + count)
    return text(slot, ids[first:], first)


def length(slot: int) -> int:
    """Length of the prompt of a slot."""
    return PROMPT if slot == SUBJECT else 20 + slot * 37 % 70


class Slots:
    """A context with many sequences, and the logits of one of them."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._logits: list[Logits] = []

    def step(self, step: Step) -> None:
        """Play a step and keep its logits."""
        self._logits += [np.array(row, np.float32) for row in self._worker.ask("step", step=step)[1]]

    def begin(self, threads: int = 2) -> None:
        """Remove all sequences and all logits so far, and set the number of threads."""
        self.step(["clear"])
        self.step(["threads", threads])
        self._logits.clear()

    def batch(self, *parts: Tokens) -> None:
        """Decode some tokens of each of several slots, and keep the logits of the subject's tokens."""
        batch = [token for part in sorted(parts) for token in part]
        mine = [i for i, token in enumerate(batch) if token[0] == SUBJECT]
        wanted = mine[-1:] if len(mine) >= PROMPT else mine
        self.step(decode(*batch, wanted=wanted))

    def prompts(self, slots: Sequence[int]) -> None:
        """Decode the prompts, one after the other."""
        for slot in slots:
            self.batch(tokens(slot, 0, length(slot)))

    def generate(self, others: Sequence[int]) -> None:
        """Decode the subject token by token, next to the others."""
        for i in range(STEPS):
            self.batch(*(tokens(slot, length(slot) + i, 1) for slot in (SUBJECT, *others)))

    def logits(self) -> Logits:
        """The logits of the subject's prompt and of its tokens."""
        return np.stack(self._logits)


def small_model(kind: str, engine: Engine) -> Path:
    return generate(BenchModel("kimi-linear", 4, 8, kind, "tiny"), engine, Silent())


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def model(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    return request.param  # type: ignore[no-any-return]


def slots_of(engine: Engine, model: tuple[str, str, str], ops: str = "") -> Iterator[Slots]:
    kind, cache_type, cache = model
    setup = Setup(
        flash_attention=True, cache_type=cache_type, n_seq_max=SLOTS, n_rs_seq=4, kv_unified=cache == "unified",
        cells=256,
    )  # fmt: skip
    with Worker(str(WORKER), environment={**engine.environment(), "KIMI_OPS": ops}) as worker:
        worker.ask("begin", gguf=str(small_model(kind, engine)), setup=asdict(setup))
        yield Slots(worker)


@pytest.fixture(scope="module")
def alone(engine: Engine, model: tuple[str, str, str]) -> Logits:
    """The logits of the subject in an empty context with a cache for each sequence."""
    (logits,) = (_alone(slots) for slots in slots_of(engine, (*model[:2], "streams")))
    return logits


def _alone(slots: Slots, threads: int = 1) -> Logits:
    slots.begin(threads)
    slots.prompts([SUBJECT])
    slots.generate([])
    return slots.logits()


@pytest.fixture(scope="module")
def slots(engine: Engine, model: tuple[str, str, str]) -> Iterator[Slots]:
    yield from slots_of(engine, model)


def nmse(got: Logits, expected: Logits) -> float:
    return float(np.sum(np.square(got - expected)) / np.sum(np.square(expected)))


def assert_equal_bits(got: Logits, expected: Logits) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_threads_and_the_kind_of_cache(slots: Slots, alone: Logits) -> None:
    for threads in (2, 3):
        assert_equal_bits(_alone(slots, threads), alone)


@pytest.mark.parametrize("count", [1, 7, 23])
def test_other_sequences(slots: Slots, alone: Logits, count: int) -> None:
    slots.begin()
    slots.prompts([*OTHERS[: count // 2], SUBJECT, *OTHERS[count // 2 : count]])
    slots.generate(OTHERS[:count])
    assert_equal_bits(slots.logits(), alone)


def test_cells_of_removed_sequences(slots: Slots, alone: Logits) -> None:
    """In a unified cache the prompt gets the cells of removed sequences; later tokens can get lower cells."""
    slots.begin()
    slots.prompts([0, 1, 2, 3])
    for slot in (0, 2):
        slots.step(remove(slot, -1))
    slots.prompts([SUBJECT])
    slots.step(remove(1, -1))
    slots.generate([3])
    assert_equal_bits(slots.logits(), alone)


def test_a_prompt_next_to_tokens_and_prompts(slots: Slots, alone: Logits) -> None:
    slots.begin()
    generating, reading = OTHERS[:6], OTHERS[6:9]
    slots.prompts(generating)
    slots.batch(
        tokens(SUBJECT, 0, PROMPT),
        *(tokens(slot, 0, length(slot)) for slot in reading),
        *(tokens(slot, length(slot), 1) for slot in generating),
    )
    slots.generate(reading)
    assert_equal_bits(slots.logits(), alone)


@pytest.mark.parametrize("others", [0, 9])
def test_verified_drafts(slots: Slots, alone: Logits, others: int) -> None:
    """All tokens are in one batch, next to drafts of other lengths."""
    slots.begin()
    slots.prompts([SUBJECT, *OTHERS[:others]])
    slots.batch(
        tokens(SUBJECT, PROMPT, STEPS),
        *(tokens(slot, length(slot), 1 + slot % 4) for slot in OTHERS[:others]),
    )
    assert_equal_bits(slots.logits(), alone)


@pytest.mark.parametrize("count", [1, 23])
def test_other_sequences_with_an_adapter(engine: Engine, tmp_path: Path, count: int) -> None:
    """Of all matrices, so that latent attention is absorbed for prompts too."""
    model = MODELS[3]
    gguf = small_model(model[0], engine)
    names = [name for name, shape in shapes(gguf).items() if is_matrix(name, shape)]
    active = adapters({write_adapter(tmp_path / "adapter.gguf", gguf, names).file: 1.0})
    for slots in slots_of(engine, model):
        without = _alone(slots)
        slots.step(active)
        alone = _alone(slots)
        slots.begin()
        slots.prompts([SUBJECT, *OTHERS[:count]])
        slots.generate(OTHERS[:count])
        assert_equal_bits(slots.logits(), alone)
        assert nmse(without, alone) > 0.01


@pytest.fixture(scope="module")
def masked(engine: Engine) -> Iterator[Slots]:
    """A context without our operators and with one cache for all sequences: only the mask keeps them apart."""
    yield from slots_of(engine, ("F32", "F32", "unified"), "off")


def test_the_mask_of_a_single_sequence(masked: Slots) -> None:
    """Each token sees its predecessors, also in a batch, next to other sequences, and among cells that are empty."""
    masked.begin()
    for i in range(PROMPT + STEPS):
        masked.step(decode(*tokens(SUBJECT, i, 1), wanted=[0] if i >= PROMPT - 1 else []))
    one_by_one = masked.logits()

    assert nmse(_alone(masked, 2), one_by_one) < MASKED
    masked.begin()
    masked.prompts([0, SUBJECT, 1])
    masked.generate([0, 1])
    assert nmse(masked.logits(), one_by_one) < MASKED
    masked.begin()
    masked.prompts([0, 1])
    masked.step(remove(0, -1))
    masked.prompts([SUBJECT])
    masked.step(remove(1, -1))
    masked.generate([])
    assert nmse(masked.logits(), one_by_one) < MASKED
