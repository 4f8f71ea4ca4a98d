"""The figures of a report, compared with values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kimi_gguf.validate.metrics import compare, compare_choices, first_diverging, layer_errors, summarise

LN2, LN3 = math.log(2), math.log(3)


def test_nmse_is_squared_error_over_squared_reference() -> None:
    reference = np.array([[3.0, 4.0], [1.0, 0.0]], dtype=np.float32)
    test = np.array([[3.0, 4.5], [1.0, 2.0]], dtype=np.float32)
    at = compare(reference, test, np.array([0, 1]))
    assert at.nmse.tolist() == [0.25 / 25, 4.0]
    summary = summarise(at)
    assert summary.nmse == pytest.approx(4.25 / 26)
    assert summary.nmse_worst == 4.0
    assert summary.nmse_median == pytest.approx((0.01 + 4.0) / 2)


def test_kld_goes_from_the_reference_to_the_test() -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4): KL(p||q) = ln(2/sqrt 3), while KL(q||p) would be 3/4 ln 3 - ln 2."""
    p, q = np.array([[0.0, 0.0]]), np.array([[LN3, 0.0]])
    at = compare(p, q, np.array([0]))
    assert at.kld[0] == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-12)
    back = compare(q, p, np.array([0]))
    assert back.kld[0] == pytest.approx(0.75 * LN3 - LN2, rel=1e-12)


def test_kld_and_perplexity_do_not_depend_on_an_offset_of_the_logits() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 9))
    ids = rng.integers(0, 9, 6)
    summary = summarise(compare(logits, logits + 1000.0, ids))
    assert summary.kld_max == pytest.approx(0, abs=1e-12)
    assert summary.ppl_test == pytest.approx(summary.ppl_reference)
    assert summary.rms_dp == pytest.approx(0, abs=1e-12)


def test_perplexity_and_delta_p_are_of_the_next_token() -> None:
    """The text is 0 1 1: p(1) is 1/2 then 3/4 for the reference, 3/4 then 3/4 for the test."""
    reference = np.array([[0.1, 0.1], [0.0, LN3], [9.0, 0.0]])
    test = np.array([[0.0, LN3], [0.0, LN3], [0.0, 9.0]])
    at = compare(reference, test, np.array([0, 1, 1]))
    assert np.isnan(at.p_next[2]) and np.isnan(at.nll_test[2])
    summary = summarise(at)
    assert summary.ppl_reference == pytest.approx(1 / math.sqrt(1 / 2 * 3 / 4))
    assert summary.ppl_test == pytest.approx(4 / 3)
    assert summary.rms_dp == pytest.approx(math.sqrt((1 / 4) ** 2 / 2))


def test_top1_and_top5_agreement() -> None:
    """Second position: the best two are swapped (top 5 the same); third: two of the five differ."""
    reference = np.tile(np.arange(10.0), (3, 1))
    test = reference.copy()
    test[1, [8, 9]] = test[1, [9, 8]]
    test[2, [5, 6, 0, 1]] = [0.0, 1.0, 5.5, 6.5]
    at = compare(reference, test, np.zeros(3, int))
    assert at.top1.tolist() == [True, False, True]
    assert at.top5.tolist() == [1.0, 1.0, 0.6]
    assert summarise(at).top1 == pytest.approx(2 / 3)


def test_percentiles_and_subsets() -> None:
    """101 positions with KLD of 0, 1, .. 100 units: the 99th percentile is 99 units."""
    unit = 1e-3
    at = compare(np.zeros((101, 2)), np.zeros((101, 2)), np.zeros(101, int))
    object.__setattr__(at, "kld", unit * np.arange(101.0))
    object.__setattr__(at, "squared_reference", np.ones(101))
    summary = summarise(at)
    assert summary.kld_p99 == pytest.approx(99 * unit)
    assert summary.kld_p999 == pytest.approx(99.9 * unit)
    assert summary.kld_mean == pytest.approx(50 * unit)
    few = summarise(at, np.arange(101) < 3)
    assert (few.positions, few.kld_max) == (3, pytest.approx(2 * unit))
    assert summarise(at, np.zeros(101, bool)).positions == 0
    assert math.isnan(summarise(at, np.zeros(101, bool)).nmse)


def test_a_nan_in_the_logits_shows_in_every_error() -> None:
    reference = np.zeros((4, 3), dtype=np.float32) + np.arange(3, dtype=np.float32)
    test = reference.copy()
    test[2, 1] = np.nan
    summary = summarise(compare(reference, test, np.zeros(4, int)))
    assert all(math.isnan(x) for x in (summary.nmse, summary.nmse_worst, summary.kld_mean, summary.kld_max))


def test_sums_are_float64_however_many_positions() -> None:
    """An error of 1e-7 of the size: in float32 its square would be lost."""
    reference = np.full((50, 1000), 1.0)
    summary = summarise(compare(reference, reference * (1 + 1e-7), np.zeros(50, int)))
    assert summary.nmse == pytest.approx(1e-14, rel=1e-6)


def test_choices_count_near_ties_and_later_positions() -> None:
    """Position 1 is a near tie that is decided differently; 3 differs without a tie; 4 is a tie decided equally."""
    same = np.tile([0, 1], (6, 1))
    other = same.copy()
    other[[1, 3]] = [2, 1]
    margin = np.array([1, 1e-7, 1, 0.5, 1e-8, 1])
    choices = compare_choices({1: same[:, ::-1]}, {1: margin}, {1: other}, 6)
    assert choices.differs.tolist() == [False, True, False, True, False, False]
    assert choices.near_tie.tolist() == [False, True, False, False, True, False]
    assert choices.fallen.tolist() == [False, True, True, True, True, True]


def test_a_mismatch_caused_by_an_earlier_layer_is_not_a_near_tie() -> None:
    """Layer 1 has an expert mismatch without a tie, then layer 2 at a former tie: a fault, not chance."""
    same, other = np.array([[0, 1]]), np.array([[0, 2]])
    choices = compare_choices(
        {1: same, 2: same}, {1: np.array([0.5]), 2: np.array([1e-9])}, {1: other, 2: other}, 1
    )
    assert not choices.fallen.any()


def test_layer_errors_leave_out_positions_with_other_experts() -> None:
    """Two positions; in layer 1 the second has an expert mismatch, so from there on only the first counts."""
    reference = {0: np.array([[1.0], [1.0]]), 1: np.array([[2.0], [2.0]]), 2: np.array([[4.0], [4.0]])}
    test = {0: np.array([[1.0], [1.1]]), 1: np.array([[2.0], [7.0]]), 2: np.array([[4.4], [9.0]])}
    choices = compare_choices(
        {1: np.array([[0], [0]])}, {1: np.array([1.0, 1.0])}, {1: np.array([[0], [3]])}, 2
    )
    layers = layer_errors(reference, test, {0: "kda", 1: "kda", 2: "mla"}, choices)
    assert [layer.nmse for layer in layers] == pytest.approx([0.01 / 2, 0.0, 0.01])
    assert [layer.positions for layer in layers] == [2, 1, 1]
    assert [layer.other_experts for layer in layers] == [0, 1, 0]
    diverging = first_diverging(layers, 6e-3)
    assert diverging is not None and (diverging.layer, diverging.kind) == (2, "mla")
    assert first_diverging(layers, 1.0) is None
