"""Metrics that compare two sets of logits, for each position and in total. All sums are in float64.

Input: logits [T, V] of the reference and of the model under test, token ids, chosen experts.
Output: `Positions` (each metric at each position), `Summary` of any subset of positions, `LayerError`.

Every KLD is KL(reference || test), in nats, over the whole vocabulary. NMSE is the sum of squared errors divided by
the sum of squares of the reference. "Next token" is the next token of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
AnyFloats = NDArray[np.floating[Any]]
AnyInts = NDArray[np.integer[Any]]

BLOCK = 16  # positions processed together: 163,840 logits each in float64 take 21 MB
TOP = 5
NEAR_TIE = 1e-6  # router margins below this are decided by rounding, even in float32


@dataclass(frozen=True)
class Positions:
    """Metrics at each position [T]. The last position has no next token: its p_next and nll_* are NaN."""

    squared_error: Floats
    squared_reference: Floats
    kld: Floats
    best_reference: AnyInts  # top-1 token
    best_test: AnyInts
    top5: Floats  # share of the reference's top-5 tokens that are in the test's top 5
    p_next: Floats  # probability of the next token, test minus reference
    nll_reference: Floats  # -log p(next token), nats
    nll_test: Floats

    @property
    def nmse(self) -> Floats:
        """NMSE of each position [T]."""
        return self.squared_error / self.squared_reference

    @property
    def top1(self) -> Flags:
        """Whether both have the same top-1 token [T]."""
        same: Flags = self.best_reference == self.best_test
        return same

    def __len__(self) -> int:
        return len(self.kld)


@dataclass(frozen=True)
class Summary:
    """Metrics over a set of positions; NaN if the set is empty."""

    positions: int
    nmse: float
    nmse_median: float
    nmse_worst: float
    kld_mean: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    rms_dp: float
    top1: float
    top5: float
    ppl_reference: float
    ppl_test: float


@dataclass(frozen=True)
class Choices:
    """Positions [T] at which the chosen experts differ from the reference's."""

    differs: Flags  # in any layer
    near_tie: Flags  # the reference's margin is below NEAR_TIE in some layer
    fallen: Flags  # at and after the first near tie that was decided differently
    by_layer: Mapping[int, Flags]  # MoE layer -> [T]


@dataclass(frozen=True)
class LayerError:
    """Error of one layer's output, over positions without an expert mismatch up to and including this layer."""

    layer: int
    kind: str
    nmse: float
    nmse_worst: float
    positions: int  # number of positions that the error is computed over
    other_experts: int  # positions with an expert mismatch in this layer


@dataclass(frozen=True)
class Curves:
    """What is plotted of a run: figures at each position [T], and of each layer."""

    nmse: Floats
    kld: Floats
    top1: Flags
    differs: Flags  # expert mismatch in any layer
    layers: list[LayerError]


def log_softmax(logits: AnyFloats) -> Floats:
    """Log-probabilities over the last dimension, float64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    result: Floats = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


def compare(reference: AnyFloats, test: AnyFloats, ids: AnyInts) -> Positions:
    """Compare two sets of logits [T, V] for the token ids [T]."""
    if reference.shape != test.shape or len(reference) != len(ids):
        raise ValueError(f"shapes differ: {reference.shape}, {test.shape}, {len(ids)} ids")
    following = np.append(np.asarray(ids)[1:], -1)
    blocks = [
        _compare_block(reference[i : i + BLOCK], test[i : i + BLOCK], following[i : i + BLOCK])
        for i in range(0, len(reference), BLOCK)
    ]
    return Positions(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _compare_block(reference: AnyFloats, test: AnyFloats, following: AnyInts) -> tuple[NDArray[Any], ...]:
    """The fields of `Positions`, in order, for a few positions; `following` is -1 at the last position."""
    r, t = reference.astype(np.float64), test.astype(np.float64)
    log_p, log_q = log_softmax(r), log_softmax(t)
    top_r, top_t = _top(r), _top(t)
    shared = (top_r[:, :, None] == top_t[:, None, :]).any(-1).mean(-1)
    row = np.arange(len(r))
    p_next, q_next = log_p[row, following], log_q[row, following]
    p_next[following < 0] = q_next[following < 0] = np.nan
    return (
        np.square(t - r).sum(-1),
        np.square(r).sum(-1),
        (np.exp(log_p) * (log_p - log_q)).sum(-1),
        r.argmax(-1),
        t.argmax(-1),
        shared,
        np.exp(q_next) - np.exp(p_next),
        -p_next,
        -q_next,
    )


def _top(logits: Floats) -> AnyInts:
    """Indices of the TOP largest logits, unordered."""
    count = min(TOP, logits.shape[-1])
    return np.argpartition(logits, -count, axis=-1)[:, -count:]


def summarise(at: Positions, which: Flags | None = None) -> Summary:
    """Metrics over the positions flagged in `which` [T], or over all positions."""
    keep = np.ones(len(at), bool) if which is None else which
    if not keep.any():
        return Summary(0, *[float("nan")] * 13)
    kld, nmse = at.kld[keep], at.nmse[keep]
    has_next = keep & ~np.isnan(at.nll_reference)
    if has_next.any():
        rms_dp = np.sqrt(np.square(at.p_next[has_next]).mean())
        ppl_r, ppl_t = (np.exp(nll[has_next].mean()) for nll in (at.nll_reference, at.nll_test))
    else:
        rms_dp = ppl_r = ppl_t = np.float64("nan")
    return Summary(
        positions=int(keep.sum()),
        nmse=float(at.squared_error[keep].sum() / at.squared_reference[keep].sum()),
        nmse_median=float(np.median(nmse)),
        nmse_worst=float(nmse.max()),
        kld_mean=float(kld.mean()),
        kld_median=float(np.median(kld)),
        kld_p99=float(np.percentile(kld, 99)),
        kld_p999=float(np.percentile(kld, 99.9)),
        kld_max=float(kld.max()),
        rms_dp=float(rms_dp),
        top1=float(at.top1[keep].mean()),
        top5=float(at.top5[keep].mean()),
        ppl_reference=float(ppl_r),
        ppl_test=float(ppl_t),
    )


def compare_choices(
    reference: Mapping[int, AnyInts],
    margins: Mapping[int, AnyFloats],
    test: Mapping[int, AnyInts],
    tokens: int,
) -> Choices:
    """Compare the experts [T, K] chosen in each MoE layer; their order does not matter.

    A near tie that is decided differently also changes every later position, through the state and the cache.
    `fallen` flags these positions, so that they can be excluded. `margins` are the reference's router margins [T].
    """
    by_layer = {
        layer: (np.sort(chosen, -1) != np.sort(test[layer], -1)).any(-1)
        for layer, chosen in reference.items()
    }
    differs, near_tie, fell = (np.zeros(tokens, bool) for _ in range(3))
    for layer, other in by_layer.items():
        tie = margins[layer] < NEAR_TIE
        fell |= tie & other & ~differs  # if an earlier layer differs, that is the cause, not this tie
        differs |= other
        near_tie |= tie
    return Choices(differs, near_tie, np.logical_or.accumulate(fell), by_layer)


def layer_errors(
    reference: Mapping[int, AnyFloats],
    test: Mapping[int, AnyFloats],
    kinds: Mapping[int, str],
    choices: Choices,
) -> list[LayerError]:
    """Error of each layer's output [T, M]; a position is excluded from its first expert mismatch on."""
    found = []
    same = np.ones(len(choices.differs), bool)
    for layer in sorted(reference):
        other = choices.by_layer.get(layer, np.zeros_like(same))
        same &= ~other
        r, t = reference[layer][same].astype(np.float64), test[layer][same].astype(np.float64)
        error, size = np.square(t - r).sum(-1), np.square(r).sum(-1)
        found.append(
            LayerError(
                layer=layer,
                kind=kinds[layer],
                nmse=float(error.sum() / size.sum()) if same.any() else float("nan"),
                nmse_worst=float((error / size).max()) if same.any() else float("nan"),
                positions=int(same.sum()),
                other_experts=int(other.sum()),
            )
        )
    return found


def first_diverging(layers: list[LayerError], limit: float) -> LayerError | None:
    """The first layer whose error is above `limit` or NaN."""
    return next((layer for layer in layers if not layer.nmse <= limit and layer.positions), None)
