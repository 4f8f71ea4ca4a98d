"""Which figures pass and which fail, by the file's type, and the effect of near ties and of upstream's figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from validate_case import FLASH, TOKENS, TRUTH, run_with

from kimi_gguf.validate.gates import LIMITS, Evidence, GateResult, Limit, judge
from kimi_gguf.validate.measure import Measured
from kimi_gguf.validate.tensors import TensorProof


def failed(kind: str, runs: list[Measured], upstream: list[Measured] | None = None) -> list[GateResult]:
    return [gate for gate in judge(Evidence(kind, runs, upstream or [], TensorProof())) if not gate.passed]


@pytest.mark.parametrize(
    ("kind", "error", "passes"),
    [
        ("F32", 0.9e-5, True),
        ("F32", 1.1e-5, False),
        ("F16", 4.3e-4, True),
        ("F16", 4.6e-4, False),
        ("BF16", 3.0e-3, True),
        ("BF16", 3.3e-3, False),
    ],
)
def test_the_limit_of_each_type(kind: str, error: float, passes: bool) -> None:
    """F32: NMSE 1e-10, which is an error of 1e-5 of the logits' size; F16 2e-7, BF16 1e-5."""
    assert (not failed(kind, [run_with(error)])) == passes


@pytest.mark.parametrize(
    ("kind", "limit"), [(kind, limit) for kind, limits in LIMITS.items() for limit in limits if limit.over]
)
def test_each_limit_of_a_summary_alone(kind: str, limit: Limit) -> None:
    """A figure at its limit passes; just beyond it, its gate fails and no other one does."""
    for share, expected in ((1.0, []), (0.99 if limit.at_least else 1.01, [limit.title])):
        run = run_with(0)
        summary = replace(getattr(run, limit.over), **{limit.figure: share * limit.value})
        gates = failed(kind, [replace(run, **{limit.over: summary})])
        assert [gate.title for gate in gates] == expected


def test_every_variant_must_keep_the_limits() -> None:
    gates = failed("F32", [run_with(1e-6), run_with(1e-3, variant=FLASH)])
    assert gates and {gate.variant for gate in gates} == {"flash attention"}


def test_one_bad_position_fails_f32() -> None:
    """NMSE 4e-8 at one of 64 positions is 6e-10 in total."""
    run = run_with(0)
    run.at.squared_error[5] = 4e-8 * run.at.squared_reference[5]
    bad = replace(run, judged=replace(run.judged, nmse_worst=float(run.at.nmse.max())))
    assert [gate.title for gate in failed("F32", [bad])] == ["worst NMSE, near ties excluded"]


def test_logits_that_are_no_numbers_fail() -> None:
    truth = replace(TRUTH, logits=np.full_like(TRUTH.logits, np.nan))
    for kind in LIMITS:
        assert failed(kind, [run_with(0, truth=truth)])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_K"])
def test_one_position_without_numbers_fails_every_type(kind: str) -> None:
    """Also where this position is left out because its experts differ, and of a type without limits of the logits."""
    run = run_with(0, flipped=1)
    run.at.squared_error[0] = np.nan
    assert [gate.title for gate in failed(kind, [run])] == ["positions with NaN or infinity"]


def test_a_wrong_tensor_fails_whatever_the_logits() -> None:
    proof = TensorProof()
    proof.fail("blk.0.ssm_a: wrong")
    gates = judge(Evidence("F32", [run_with(0)], [], proof))
    assert [gate.title for gate in gates if not gate.passed] == ["tensors that differ from the checkpoint"]


def test_a_near_tie_is_set_apart_but_not_most_of_the_text() -> None:
    """An error at a position where the reference itself could have chosen differently does not count; if all
    positions are like this, the validation shows nothing."""
    margins = {1: np.full(TOKENS, 0.1), 2: np.full(TOKENS, 0.1)}
    margins[2][10] = 1e-9
    run = run_with(1e-7, truth=replace(TRUTH, margins=margins))
    assert run.judged.positions == TOKENS - 1
    assert not failed("F32", [run])
    margins[2][: TOKENS // 2 + 1] = 1e-9
    run = run_with(1e-7, truth=replace(TRUTH, margins=margins))
    assert [gate.title for gate in failed("F32", [run])] == ["share of positions without a near tie"]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_a_high_expert_mismatch_rate_fails(kind: str) -> None:
    gates = failed(kind, [run_with(1e-6, flipped=TOKENS // 4)])
    assert [gate.title for gate in gates] == ["expert mismatch rate"]


def test_worse_than_upstream_fails_even_within_the_limits() -> None:
    assert not failed("BF16", [run_with(1e-3)], [run_with(1e-3)])
    titles = {gate.title for gate in failed("BF16", [run_with(1.2e-3)], [run_with(1e-3)])}
    assert titles == {"typical NMSE, ratio to upstream", "typical KLD, ratio to upstream"}
    assert not failed("BF16", [run_with(1e-3)], [run_with(1.2e-3)])


def test_more_top1_mismatches_than_upstream_fail_unless_chance_explains_them() -> None:
    """30 top-1 mismatches of 64 where upstream has none are not chance. The same number at other positions
    can be."""

    def saying_otherwise(positions: list[int]) -> Measured:
        run = run_with(0)
        best = run.at.best_reference.copy()
        best[positions] += 1
        return replace(run, at=replace(run.at, best_test=best))

    first, last = saying_otherwise([*range(30)]), saying_otherwise([*range(30, 60)])
    assert [gate.title for gate in failed("BF16", [first], [run_with(0)])] == [
        "top-1 mismatches, limit from upstream"
    ]
    assert not failed("BF16", [first], [last])


def test_each_variant_is_compared_with_the_same_variant_of_upstream() -> None:
    runs = [run_with(1e-3), run_with(2e-3, variant=FLASH)]
    upstream = [run_with(2e-3, variant=FLASH), run_with(1e-3)]
    assert not failed("BF16", runs, upstream)


def test_types_without_limits_of_their_own_are_compared_with_upstream() -> None:
    assert not failed("Q4_K", [run_with(0.1)])
    assert failed("Q4_K", [run_with(0.2)], [run_with(0.1)])
