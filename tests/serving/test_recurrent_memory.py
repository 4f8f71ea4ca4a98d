"""0013-recurrent-memory-computed-states, 0016-kv-cache-streams: every answer comes from a computed state.

A pending rollback belongs to the state, for any sequences that own the state. A state is lost if the batch that should
have computed it fails. Everything that would use a lost state is refused until the sequence is removed or restored.
"""

from __future__ import annotations

import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import llama_script
import pytest
from llama_script import Logits, PlayError, Setup, Step, assert_same, attempt, copy, keep, load, remove, save
from random_checkpoint import Spec
from synthetic_case import make_case

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

VOCAB = 128
Steps = list[Step]


def setup(n_rs_seq: int) -> Setup:
    return Setup(n_seq_max=3, n_rs_seq=n_rs_seq, n_ubatch=64, cells=256, flash_attention=None)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    return make_case(folder, Spec(layers="KKMK", heads=4, kda_head_dim=64, seed=91)).gguf


def tokens(start: int, end: int, seq: int = 0, text: int = 0) -> list[tuple[int, int, int]]:
    """Positions [start, end) of one of two texts, for a sequence."""
    return [(seq, pos, (7 * pos + 31 * text + 1) % VOCAB) for pos in range(start, end)]


def decode(start: int, end: int, seq: int = 0, text: int = 0) -> Step:
    """The logits after the last token are kept."""
    return llama_script.decode(*tokens(start, end, seq, text), wanted=[end - start - 1])


def play(engine: Engine, gguf: Path, steps: Steps, n_rs_seq: int = 8) -> tuple[list[bool], Logits]:
    """The results of all removals and attempts, and the logits [decodes, V]."""
    played = llama_script.play(engine, gguf, setup(n_rs_seq), steps)
    return played.removed, played.logits


ROLLED_BACK = [decode(0, 20), remove(0, 15)]  # pending on sequence 0
SECOND = [decode(0, 20, seq=1, text=1), remove(1, 15)]  # pending on sequence 1

# (steps while a rollback is pending, a decode of one position, a text): the logits of the decode must be those of the
# same position of the text in an empty context
PENDING: dict[str, tuple[Steps, Step, int]] = {
    "copied, the copy goes on": ([*ROLLED_BACK, copy(0, 1)], decode(15, 16, seq=1), 0),
    "copied, the original goes on": ([*ROLLED_BACK, copy(0, 1)], decode(15, 16), 0),
    "copied, the original first": (
        [*ROLLED_BACK, copy(0, 1), decode(15, 18, text=1)],
        decode(15, 16, seq=1),
        0,
    ),
    "overwritten by a copy": ([decode(0, 15), *SECOND, copy(0, 1)], decode(15, 16, seq=1), 0),
    "removed by keeping another": (
        [decode(0, 3), *SECOND, keep(0), decode(0, 15, seq=1)],
        decode(15, 16, seq=1),
        0,
    ),
    "kept": ([decode(0, 3), *SECOND, keep(1)], decode(15, 16, seq=1, text=1), 1),
    "both go on at once": (
        [*ROLLED_BACK, copy(0, 1), attempt(*tokens(15, 16), *tokens(15, 16, seq=1, text=1))],
        decode(16, 17),
        0,
    ),
}


@pytest.mark.parametrize("case", PENDING.values(), ids=list(PENDING))
def test_a_pending_rollback_belongs_to_the_state(
    engine: Engine, gguf: Path, case: tuple[Steps, Step, int]
) -> None:
    steps, last, text = case
    end = last[1][-1][1]
    said, logits = play(
        engine, gguf, [*steps, last, ["clear"], decode(0, end, text=text), decode(end, end + 1, text=text)]
    )
    assert all(said)
    assert_same(logits[-3:-2], logits[-1:])


@pytest.mark.parametrize(("nodes", "n_rs_seq"), [(0, 0), (5, 8), (40, 0), (80, 8)])
def test_what_an_aborted_batch_leaves_is_refused(
    engine: Engine, gguf: Path, nodes: int, n_rs_seq: int
) -> None:
    steps = [
        decode(0, 12),
        decode(0, 9, seq=1, text=1),
        attempt(*tokens(12, 15), nodes=nodes),
        attempt(*tokens(12, 13)),  # the batch again
        attempt(*tokens(15, 16)),  # as if it had been decoded
        remove(0, 12),
        remove(0, 14),
        copy(0, 2),
        attempt(*tokens(15, 16, seq=2)),
        attempt(*tokens(15, 16), *tokens(9, 10, seq=1, text=1)),
    ]
    goes_on: Steps = [decode(9, 10, seq=1, text=1), remove(0, -1), remove(2, -1), decode(0, 13)]
    fresh: Steps = [["clear"], decode(0, 9, text=1), decode(9, 10, text=1), ["clear"], decode(0, 13)]
    said, logits = play(engine, gguf, [*steps, *goes_on, *fresh], n_rs_seq)
    assert said == [False] * 7 + [True] * 2
    assert_same(logits[2:4], logits[[5, 6]])


@pytest.mark.parametrize("nodes", [5, 80])
def test_a_sequence_whose_first_batch_is_aborted_is_empty(engine: Engine, gguf: Path, nodes: int) -> None:
    steps = [attempt(*tokens(0, 12), nodes=nodes), decode(0, 12), ["clear"], decode(0, 12)]
    said, logits = play(engine, gguf, steps)
    assert said == [False]
    assert_same(logits[:1], logits[1:])


def test_the_second_ubatch_is_aborted(engine: Engine, gguf: Path) -> None:
    """Ubatches of 64 tokens: the first is computed, and the sequence is lost with the second."""
    steps = [
        attempt(*tokens(0, 100), nodes=180),
        attempt(*tokens(64, 65)),
        remove(0, 64),
        ["clear"],
        decode(0, 1),
    ]
    played = llama_script.play(engine, gguf, setup(8), steps)
    assert played.removed == [False, False, False]
    assert "pos = [64, +inf)" in played.log


def test_a_lost_state_is_not_saved(engine: Engine, gguf: Path, tmp_path: Path) -> None:
    steps = [decode(0, 12), attempt(*tokens(12, 15), nodes=40), save(0, tmp_path / "state")]
    with pytest.raises(PlayError, match="lost when a batch failed"):
        play(engine, gguf, steps)


def test_a_saved_state_replaces_a_lost_one(engine: Engine, gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "state"
    lost = [decode(0, 12), save(0, file), attempt(*tokens(12, 15), nodes=40)]
    said, logits = play(
        engine, gguf, [*lost, load(0, file), decode(12, 13), ["clear"], decode(0, 12), decode(12, 13)]
    )
    assert said == [False]
    assert_same(logits[1:2], logits[-1:])


LAYERS = 4  # of the model of this file
# number of cells; position and number of sequences of each
ONE_CELL = struct.pack("<IiI", 1, 11, 0)
HOSTILE = {
    "two cells": (
        struct.pack("<IiIiI", 2, 10, 0, 11, 0),
        "expected one recurrent state of one sequence, found 2",
    ),
    "more cells than the cache has": (struct.pack("<I", 2**31), "expected one recurrent state"),
    "a cell of a named sequence": (struct.pack("<IiII", 1, 11, 1, 0), "invalid seq_id-agnostic kv cell"),
}


@pytest.mark.parametrize("case", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_state_is_refused(
    engine: Engine, gguf: Path, tmp_path: Path, case: tuple[bytes, str]
) -> None:
    """0018-restored-recurrent-states."""
    file, (cells, reason) = tmp_path / "state", case
    play(engine, gguf, [decode(0, 12), save(0, file)])
    after = struct.pack("<II", 0, LAYERS)  # not transposed, number of layers
    saved = file.read_bytes()
    assert saved.count(ONE_CELL + after) == 1
    file.write_bytes(saved.replace(ONE_CELL + after, cells + after))
    with pytest.raises(PlayError, match=reason):
        play(engine, gguf, [decode(0, 12), load(0, file)])


def test_a_copy_replaces_what_the_index_holds(engine: Engine, tmp_path: Path) -> None:
    """The index of sparse attention, in a unified cache: seq_cp to a sequence that is not empty."""
    make = [engine.bin / "test-llama-archs", "-a", "glm5-next", "-o", tmp_path]
    subprocess.run(make, check=True, capture_output=True)
    (sparse,) = tmp_path.glob("*.gguf")
    copied = [decode(0, 60), decode(0, 100, seq=1, text=1), copy(0, 1), decode(60, 61, seq=1)]
    fresh = [["clear"], decode(0, 60), decode(60, 61)]
    unified = replace(setup(0), kv_unified=True)
    logits = llama_script.play(engine, sparse, unified, [*copied, *fresh]).logits
    assert_same(logits[2:3], logits[-1:])
