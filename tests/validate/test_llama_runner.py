"""The runner of llama.cpp: the order of its batches, its results, and its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from random_checkpoint import MERGES, VOCAB_SIZE, Spec
from synthetic_case import make_gguf, reference_of

from kimi_gguf.engine.builds import Engine
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.llama import RunOptions, continue_greedily, pieces, run, run_logits, tokenize
from kimi_gguf.validate.llama_worker import plan_batches
from kimi_gguf.validate.reference import Trace

SPEC = Spec(layers="KMK", experts=8, experts_used=3, seed=21)
IDS = np.random.default_rng(21).integers(0, VOCAB_SIZE, 70)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("runner"), SPEC)


def starts(batches: list[list[tuple[int, int]]]) -> list[int]:
    return [batch[0][1] for batch in batches]


def test_batches_hold_n_batch_tokens() -> None:
    batches = plan_batches([10], RunOptions(n_batch=4))
    assert batches == [[(0, p) for p in r] for r in (range(4), range(4, 8), range(8, 10))]


def test_sequences_advance_side_by_side_and_the_shorter_ends_first() -> None:
    batches = plan_batches([3, 5], RunOptions(n_batch=4))
    assert batches == [[(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 2), (1, 2), (1, 3)], [(1, 4)]]


def test_no_batch_crosses_the_position_of_a_step_or_a_save() -> None:
    assert starts(plan_batches([10], RunOptions(n_batch=4, step_from=6))) == [0, 4, 6, 7, 8, 9]
    assert starts(plan_batches([10], RunOptions(n_batch=4, save_restore_at=5))) == [0, 4, 5, 9]


def test_every_token_is_fed_once_even_if_batches_are_smaller_than_the_sequences_are_many() -> None:
    places = [place for batch in plan_batches([2, 3, 4], RunOptions(n_batch=1)) for place in batch]
    assert sorted(places) == [(s, p) for s, n in enumerate((2, 3, 4)) for p in range(n)]


@pytest.mark.engine
def test_logits_layers_and_experts_are_those_of_the_reference(gguf: Path, engine: Engine) -> None:
    """With ubatches of 16 tokens, so that the recorded rows are concatenated from several graphs."""
    trace = Trace()
    expected = reference_of(SPEC).logits(torch.from_numpy(IDS), trace).numpy()
    found = run(engine, gguf, [IDS], RunOptions(n_ubatch=16, trace=True))
    assert found.logits[0].shape == (len(IDS), VOCAB_SIZE)
    assert np.abs(found.logits[0] - expected).max() < 1e-3 * np.abs(expected).max()
    assert sorted(found.layer_outputs) == [0, 1, 2]
    for layer, output in found.layer_outputs.items():
        size = np.abs(trace.layer_outputs[layer].numpy()).max()
        assert np.abs(output - trace.layer_outputs[layer].numpy()).max() < 1e-3 * size
    assert sorted(found.experts) == [1, 2]  # layer 0 is dense
    for layer, chosen in found.experts.items():
        assert np.sort(chosen).tolist() == np.sort(trace.routes[layer].experts.numpy()).tolist()
    assert "CPU" in found.system and found.log


@pytest.mark.engine
def test_each_sequence_gets_its_own_logits(gguf: Path, engine: Engine) -> None:
    found = run(engine, gguf, [IDS[:40], IDS[30:]], RunOptions(n_batch=20, n_ubatch=20))
    alone = [run_logits(engine, gguf, ids) for ids in (IDS[:40], IDS[30:])]
    assert [logits.shape for logits in found.logits] == [logits.shape for logits in alone]
    for together, by_itself in zip(found.logits, alone, strict=True):
        assert np.allclose(together, by_itself, atol=1e-4)
    assert not np.allclose(alone[0], alone[1], atol=0.1)


@pytest.mark.engine
def test_greedy_continuation_takes_the_most_likely_token_each_time(gguf: Path, engine: Engine) -> None:
    written = continue_greedily(engine, gguf, IDS[:20], 5)
    logits = run_logits(engine, gguf, [*IDS[:20], *written])
    assert written == logits[19:-1].argmax(1).tolist()


@pytest.mark.engine
def test_text_becomes_ids_and_ids_their_bytes(gguf: Path, engine: Engine) -> None:
    text = "he is in, 世界\n[EOS]"
    ids = tokenize(engine, gguf, text)
    assert 256 + MERGES.index("he") in ids
    assert ids[-1] == 256 + len(MERGES) + 1  # the text of a special token is matched as this token
    assert b"".join(pieces(engine, gguf, ids)) == text.encode()


@pytest.mark.engine
def test_progress_counts_tokens(gguf: Path, engine: Engine) -> None:
    told: list[tuple[int, int]] = []
    run_logits(engine, gguf, IDS, RunOptions(n_batch=32), lambda *step: told.append(step))
    assert told == [(32, 70), (64, 70), (70, 70)]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        ([VOCAB_SIZE], RunOptions(), f"0..{VOCAB_SIZE - 1}"),
        ([], RunOptions(), "at least one"),
        (IDS, RunOptions(n_ctx=32), "n_ctx is 32, and these sequences need 70"),
        (IDS, RunOptions(n_ubatch=2**32 + 16), "n_ubatch: expected a number that fits, found 4294967312"),
        (IDS, RunOptions(cache_type="Q3_5"), "expected one of ggml's types, such as F16, found Q3_5"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    gguf: Path, engine: Engine, ids: list[int], options: RunOptions, said: str
) -> None:
    with pytest.raises(ValidateError) as error:
        run_logits(engine, gguf, ids, options)
    assert said in str(error.value) and str(gguf) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.engine
def test_a_file_that_llama_cannot_load_is_named_with_its_reason(engine: Engine, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValidateError, match=r"damaged\.gguf: llama\.cpp cannot load it: .+") as error:
        run_logits(engine, damaged, IDS)
    assert "\n" not in str(error.value)
    with pytest.raises(ValidateError, match=r"missing\.gguf: no such file"):
        run_logits(engine, tmp_path / "missing.gguf", IDS)


def test_a_process_that_dies_is_reported_by_signal_and_last_word(tmp_path: Path) -> None:
    """A package llama_cpp that aborts as ggml's assertions do."""

    class Aborting:
        def environment(self) -> dict[str, str]:
            return {"PYTHONPATH": str(tmp_path), "LLAMA_CPP_LIB_PATH": str(tmp_path)}

    (tmp_path / "llama_cpp.py").write_text(
        "import os, sys\nprint('x.c:7: GGML_ASSERT(false) failed', file=sys.stderr, flush=True)\nos.abort()\n"
    )
    (tmp_path / "any.gguf").touch()
    with pytest.raises(ValidateError) as error:
        run_logits(Aborting(), tmp_path / "any.gguf", IDS)
    assert "was ended by SIGABRT: x.c:7: GGML_ASSERT(false) failed" in str(error.value)
