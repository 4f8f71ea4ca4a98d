"""0009, 0010, 0013 and 0051: tokens are rolled back correctly, or not at all.

There is a snapshot of the recurrent state before each token of the last ubatch. A rollback to an older state, of a
restored state, or of a state that sequences share is refused. The caller gets an error; the memory is unchanged.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import llama_script
import numpy as np
import pytest
from llama_script import Logits, Setup, Step, remove
from random_checkpoint import Spec
from random_family import FamilySpec, write_family
from synthetic_case import error_of, make_case

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

N_BACK = 8
SETUP = Setup(n_seq_max=3, n_rs_seq=N_BACK, n_ubatch=64, cells=256, flash_attention=None)
VOCAB = 128  # number of tokens in every model here
ARCHS = ("kimi-linear", "kimi-k3", "qwen35", "lfm2", "nemotron_h", "bailingmoe3", "glm5-next")
Steps = list[Step]


FAMILY = [
    FamilySpec("bailingmoe3", "KKMK", seed=91),
    FamilySpec("glm5-next", "KKM", rope=0, seed=92),
    FamilySpec("kimi-k3", "KKMK", seed=93),
]


@pytest.fixture(scope="module", params=[None, *FAMILY], ids=lambda spec: spec.id if spec else "kimi-linear")
def gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose KDA layers run on the operators."""
    folder = tmp_path_factory.mktemp("rollback")
    if request.param is not None:
        return write_family(folder / "model.gguf", request.param)
    return make_case(folder, Spec(layers="KKMK", heads=4, kda_head_dim=64, seed=90)).gguf


def play(engine: Engine, gguf: Path, steps: Steps, setup: Setup = SETUP) -> tuple[list[bool], Logits]:
    """The results of all removals, and the logits [decodes, V] after the last token of each decode."""
    played = llama_script.play(engine, gguf, setup, steps)
    return played.removed, played.logits


def token(seq: int, pos: int) -> tuple[int, int, int]:
    """The token of a sequence at a position, as in a step."""
    return seq, pos, (7 * pos + 31 * seq + 1) % VOCAB


def decode(start: int, end: int, seq: int = 0) -> Step:
    tokens = [token(seq, pos) for pos in range(start, end)]
    return llama_script.decode(*tokens, wanted=[len(tokens) - 1])


# A draft of sequence 0, in a batch with tokens of 1 and 2. The draft has a ubatch of its own. Sequences 1 and 2 share
# the next one, for which they need adjacent cells. The cell of 0 is between theirs.
BATCH = ((3, 7), (3, 6), (2, 5))  # positions of each sequence
NEXT = (5, 6, 5)  # the position of the next token of each sequence, after a rollback of the draft
DRAFT_AMONG_OTHERS: Steps = [
    decode(0, 3, 1),
    decode(0, 3, 0),
    decode(0, 2, 2),
    llama_script.decode(*(token(seq, pos) for seq, span in enumerate(BATCH) for pos in range(*span))),
    remove(0, NEXT[0]),
    *(decode(pos, pos + 1, seq) for seq, pos in enumerate(NEXT)),
]
EACH_ALONE: Steps = [step for seq, pos in enumerate(NEXT) for step in (["clear"], decode(0, pos + 1, seq))]


@pytest.mark.parametrize("unified", [False, True], ids=["a stream each", "unified"])
def test_other_sequences_of_a_batch_leave_the_snapshots_of_a_draft(
    engine: Engine, gguf: Path, unified: bool
) -> None:
    setup = replace(SETUP, kv_unified=unified)
    said, logits = play(engine, gguf, [*DRAFT_AMONG_OTHERS, *EACH_ALONE], setup)
    assert said == [True]
    assert error_of(logits[-6:-3], logits[-3:]).in_all <= 1e-10


def test_up_to_the_last_batch_tokens_are_taken_back_and_no_further(engine: Engine, gguf: Path) -> None:
    """For every size of the last batch and every depth: refused, or the logits of a run without the removed tokens."""
    cases = [(size, depth) for size in (1, 2, 5, 8, 12) for depth in range(1, N_BACK + 2)]
    granted = [depth <= min(size, N_BACK) for size, depth in cases]
    steps: Steps = [decode(0, 40)]
    for (size, depth), goes in zip(cases, granted, strict=True):
        end = 20 + size
        back = end - depth if goes else end
        steps += [["clear"], decode(0, 20), decode(20, end), remove(0, end - depth), decode(back, 40)]
    said, logits = play(engine, gguf, steps)
    assert said == granted
    for resumed in logits[3::3]:
        assert error_of(resumed[None], logits[:1]).in_all <= 1e-10


def test_a_rollback_outlives_the_move_of_its_cell(engine: Engine, gguf: Path) -> None:
    steps = [decode(0, 20, 2), ["clear"], *DISORDERED, remove(2, 10), *MOVES, decode(10, 20, 2)]
    said, logits = play(engine, gguf, steps)
    assert said == [True]
    assert error_of(logits[-1:], logits[:1]).in_all <= 1e-10


# Sequences 1 and 2 are in each other's cells; a batch of 0 and 1 corrects that, and moves 2 without its snapshots.
DISORDERED: Steps = [decode(0, 12, 0), decode(0, 12, 2), decode(0, 12, 1)]
MOVES: Steps = [llama_script.decode(token(0, 12), token(1, 12))]

REFUSED: dict[str, Steps] = {
    "a batch further back": [decode(0, 12), decode(12, 13), remove(0, 11)],
    "a saved and restored state": [decode(0, 12), ["reload", 0], remove(0, 11)],
    "a second time": [decode(0, 12), remove(0, 11), remove(0, 10)],
    "what another sequence shares": [decode(0, 12), ["copy", 0, 1], remove(1, 11)],
    "after its cell has moved": [*DISORDERED, *MOVES, remove(2, 11)],
}


@pytest.mark.parametrize("steps", REFUSED.values(), ids=list(REFUSED))
def test_it_is_refused(engine: Engine, gguf: Path, steps: Steps) -> None:
    said, _ = play(engine, gguf, steps)
    assert said[-1] is False
    assert all(said[:-1])


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    """Models made by upstream's own program, one for each of ARCHS and for others."""
    folder = tmp_path_factory.mktemp("archs")
    make = [engine.bin / "test-llama-archs", "-a", "|".join(ARCHS), "-o", folder]
    subprocess.run(make, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_takes_back_a_whole_short_batch(
    engine: Engine, small_models: Path, arch: str
) -> None:
    """0009-snapshot-in-front-of-a-short-batch; compares bits: the states of these models depend on few tokens."""
    (gguf,) = small_models.glob(f"{arch}-*.gguf")
    never = [decode(0, 12), decode(12, 13)]
    taken_back = [["clear"], decode(0, 12), decode(12, 15), remove(0, 12), decode(12, 13)]
    said, logits = play(engine, gguf, [*never, *taken_back])
    assert said == [True]
    assert np.array_equal(logits[-1], logits[1])


@pytest.mark.parametrize("arch", ARCHS)
def test_without_the_state_in_front_one_token_stays(engine: Engine, small_models: Path, arch: str) -> None:
    """0051-no-state-in-front-of-a-draft: all tokens of a batch except the first can be rolled back."""
    (gguf,) = small_models.glob(f"{arch}-*.gguf")
    never = [decode(0, 12), decode(12, 13), decode(13, 14)]
    back = [
        ["clear"],
        ["omit_front"],
        decode(0, 12),
        decode(12, 15),
        remove(0, 12),
        remove(0, 13),
        decode(13, 14),
    ]
    single = [remove(0, 13)]
    said, logits = play(engine, gguf, [*never, *back, *single])
    assert said == [False, True, False]
    assert error_of(logits[-1:], logits[2:3]).in_all <= 1e-10
