"""Tests of the gates: they catch every deliberate fault of the reference, also those that perplexity does not show.

llama.cpp runs once for the trained demo checkpoint; each faulty reference is then compared with the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.faults import FAULTS
from kimi_gguf.validate.gates import Evidence, GateResult, judge
from kimi_gguf.validate.llama import RunOptions, tokenize
from kimi_gguf.validate.measure import VARIANTS, Answer, Ids, Measured, answer, measure, truth
from kimi_gguf.validate.probe import reference_of, write_quiet_gguf
from kimi_gguf.validate.reference import Reference
from kimi_gguf.validate.tensors import TensorProof

pytestmark = pytest.mark.engine

TOKENS = 384  # six sections of 64, after each of which one fault loses its state
HIDDEN_FROM_PERPLEXITY = ("MLA output zeroed", "routing bias dropped", "norm constants 1e-5")

Judged = tuple[list[GateResult], Measured]


@pytest.fixture(scope="module")
def judged(
    demo_dir: Path, demo_gguf: Callable[[str], Path], engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, type[Reference]], Judged]:
    """(GGUF type, reference) -> all gates, and the plain run's figures. F32 files include the quiet probe."""
    folder = tmp_path_factory.mktemp("faults")

    @cache
    def answers(kind: str) -> tuple[Ids, list[Answer]]:
        gguf = demo_gguf(kind)
        quiet = write_quiet_gguf(gguf, folder / f"{kind}-quiet.gguf")
        text = (demo_dir / "heldout.txt").read_text(encoding="utf-8")
        ids = np.array(tokenize(engine, gguf, text)[:TOKENS])
        variants = [variant for variant in VARIANTS if kind == "F32" or not variant.quiet]
        return ids, [
            answer(engine, quiet if variant.quiet else gguf, ids, variant, RunOptions())
            for variant in variants
        ]

    @cache
    def judged(kind: str, model: type[Reference]) -> Judged:
        ids, found = answers(kind)
        with open_checkpoint(demo_dir) as checkpoint:
            expected = {
                quiet: truth(reference_of(checkpoint, quiet, model=model), ids) for quiet in (False, True)
            }
        runs = [measure(expected[each.variant.quiet], each) for each in found]
        return judge(Evidence(kind, runs, [], TensorProof())), runs[0]

    return judged


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_the_sound_reference_passes(judged: Callable[..., Judged], kind: str) -> None:
    gates, _ = judged(kind, Reference)
    assert not [gate for gate in gates if not gate.passed]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_caught_on_an_f32_file(judged: Callable[..., Judged], fault: str) -> None:
    gates, _ = judged("F32", FAULTS[fault])
    assert [gate for gate in gates if not gate.passed]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "norm constants 1e-5"])
def test_every_fault_but_the_constants_is_caught_through_bf16(
    judged: Callable[..., Judged], fault: str
) -> None:
    """The constants have less effect than bf16 rounding: F32 files and the quiet probe exist for them."""
    gates, _ = judged("BF16", FAULTS[fault])
    assert [gate for gate in gates if not gate.passed]


@pytest.mark.parametrize("fault", HIDDEN_FROM_PERPLEXITY)
def test_perplexity_moves_less_than_two_percent(judged: Callable[..., Judged], fault: str) -> None:
    _, measured = judged("F32", FAULTS[fault])
    assert measured.all.ppl_test == pytest.approx(measured.all.ppl_reference, rel=0.02)


def test_the_norm_constants_show_in_the_quiet_probe_alone(judged: Callable[..., Judged]) -> None:
    """On the model's own activations their effect is below float32's own rounding error."""
    gates, measured = judged("F32", FAULTS["norm constants 1e-5"])
    failed = {gate.variant for gate in gates if not gate.passed}
    assert failed == {"quiet probe"}
    assert measured.all.nmse < 1e-10
