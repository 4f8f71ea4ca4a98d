"""A sequence is saved, restored to any slot and continued: the logits do not change.

Tested for every cache type, with and without rollback states, between slots, processes and builds. A restored cache has
the saved bytes, so its logits have the same bits. Between builds the logits are within the limit of the gate.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_script import Logits, Setup, Step, assert_same, cut, decode, load, play, save, text
from random_checkpoint import VOCAB_SIZE, Spec
from synthetic_case import error_of, make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

# Activations large enough for upstream's norm constants to have no effect; cache rows that all types can store.
SPEC = Spec(layers="KKMK", heads=4, kda_head_dim=64, kv_lora=64, rope=32, std=0.2, seed=71)
A, B = np.random.default_rng(71).integers(0, VOCAB_SIZE, (2, 250))
SAVED = 120  # tokens of A in the state; the memory also has 50 of B
FLASH = Setup(n_seq_max=3, flash_attention=True)
SETUPS = {
    "F32, plain attention": Setup(n_seq_max=3),
    **{name: replace(FLASH, cache_type=name) for name in ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0")},
    "F32, unified": replace(FLASH, kv_unified=True),
    "F32, rollback": replace(FLASH, n_rs_seq=4),
    "Q8_0, rollback": replace(FLASH, cache_type="Q8_0", n_rs_seq=4),
}
BEGINNING = [decode(*text(0, A[:SAVED])), decode(*text(1, B[:50]))]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("saved"), SPEC)


def going_on(slot: int) -> list[Step]:
    """Steps that decode A after the saved tokens: a batch large enough for chunks, a small batch, single tokens."""
    steps = [decode(*text(slot, A[SAVED:190], SAVED)), decode(*text(slot, A[190:195], 190))]
    return steps + [decode((slot, i, int(A[i]))) for i in range(195, 205)]


def last(logits: Logits, steps: list[Step]) -> Logits:
    """The logits of these steps, which are the last of the run."""
    return logits[-sum(len(tokens) for name, tokens, *_ in steps if name == "decode") :]


FUTURE = text(0, B[60:90], SAVED)
# Steps between saving and continuing, and the slot that then has A.
WAYS = {
    "emptied and restored": (0, lambda file: [save(0, file), cut(0, -1), load(0, file)]),
    "into a free slot, the old one emptied": (2, lambda file: [save(0, file), cut(0, -1), load(2, file)]),
    "over what the slot held": (1, lambda file: [save(0, file), load(1, file)]),
    "over its own future": (0, lambda file: [save(0, file), decode(*FUTURE), load(0, file)]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["F32, unified", "Q8_0, rollback"])
def test_it_goes_on_as_if_nothing_had_happened(
    name: str, way: str, gguf: Path, engine: Engine, tmp_path: Path
) -> None:
    setup, (slot, steps) = SETUPS[name], WAYS[way]
    without = play(engine, gguf, setup, [*BEGINNING, *going_on(0)]).logits
    got = play(engine, gguf, setup, [*BEGINNING, *steps(tmp_path / "state"), *going_on(slot)]).logits
    assert_same(last(got, going_on(slot)), last(without, going_on(0)))
    if not setup.kv_unified:
        np.testing.assert_array_equal(last(got, going_on(slot)), last(without, going_on(0)))


@pytest.mark.parametrize("name", SETUPS)
def test_in_another_process_with_another_number_of_slots(
    name: str, gguf: Path, engine: Engine, tmp_path: Path
) -> None:
    setup, alone = SETUPS[name], [*BEGINNING[:1], *going_on(0)]
    first = play(engine, gguf, setup, [*alone[:1], save(0, tmp_path / "state"), *alone[1:]]).logits
    second = play(engine, gguf, setup, [load(0, tmp_path / "state"), *going_on(0)]).logits
    np.testing.assert_array_equal(second, last(first, going_on(0)))


@pytest.mark.parametrize("name", ["F32, plain attention", "F32", "F16", "Q8_0"])
@pytest.mark.parametrize("to_patched", [True, False], ids=["to patched", "to upstream"])
def test_between_upstream_and_patched(
    name: str, to_patched: bool, gguf: Path, engine: Engine, upstream: Engine, tmp_path: Path
) -> None:
    """Both builds continue from the same state. Cache types other than F32 round, which differs between builds."""
    setup, file = replace(SETUPS[name], n_seq_max=2), tmp_path / "state"  # upstream aborts with three
    source, target = (upstream, engine) if to_patched else (engine, upstream)
    here = play(source, gguf, setup, [*BEGINNING, save(0, file), *going_on(0)]).logits
    there = play(target, gguf, setup, [load(1, file), *going_on(1)]).logits
    if name == "F32, plain attention":
        assert_same(there, last(here, going_on(0)))
    else:
        assert error_of(there, last(here, going_on(0))).in_all < 1e-4


@pytest.mark.parametrize("cache_type", ["F32", "Q8_0"])
def test_tokens_taken_back_after_a_restore(
    cache_type: str, gguf: Path, engine: Engine, tmp_path: Path
) -> None:
    """In another slot, which has rollback states of its previous sequence: draft five tokens, remove three."""
    setup = Setup(n_seq_max=2, flash_attention=True, cache_type=cache_type, n_rs_seq=4)
    file, wrong = tmp_path / "state", B[100:105].copy()
    wrong[:2] = A[SAVED : SAVED + 2]
    rest, straight = ([decode((slot, i, int(A[i]))) for i in range(SAVED + 2, SAVED + 12)] for slot in (1, 0))
    draft = [decode(*text(1, wrong, SAVED)), cut(1, SAVED + 2), *rest]
    beginning = [decode(*text(0, A[:SAVED])), decode(*text(1, B[:90])), decode(*text(1, B[90:95], 90))]
    got = play(engine, gguf, setup, [*beginning, save(0, file), load(1, file), *draft]).logits
    alone = [decode(*text(0, A[:SAVED])), decode(*text(0, A[SAVED : SAVED + 2], SAVED)), *straight]
    expected = play(engine, gguf, setup, alone).logits
    if cache_type == "F32":
        assert_same(last(got, rest), last(expected, rest))
    else:
        assert error_of(last(got, rest), last(expected, rest)).in_all < 1e-6
