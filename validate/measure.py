"""Run the reference and llama.cpp on the same tokens and compute every figure that a report shows.

Input: token ids, the reference, an engine, a GGUF file, options. Output: `Truth` (the reference's results),
`Answer` (llama.cpp's results), and `Measured` (their comparison, one for each variant, and one more for the MTP layer
if the model has one).

Each variant runs twice: once without a callback, for the logits, and once with an eval callback, for layer outputs
and chosen experts. The callback splits the graph and can keep a backend from fusing operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kimi_gguf.engine.worker import Progress
from kimi_gguf.validate.llama import Engine, LlamaRun, RunOptions, is_quantized, run
from kimi_gguf.validate.metrics import (
    Choices,
    Curves,
    LayerError,
    Positions,
    Summary,
    compare,
    compare_choices,
    layer_errors,
    summarise,
)
from kimi_gguf.validate.reference import Reference, Trace

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Variant:
    """A configuration in which the file is run."""

    key: str
    title: str
    flash_attention: bool = False
    quiet: bool = False  # on the quiet probe (probe.py); for F32 files
    mtp: bool = False  # the figures are those of the MTP layer's logits


PLAIN = Variant("plain", "plain attention")
VARIANTS = (
    PLAIN,
    Variant("flash", "flash attention", flash_attention=True),
    Variant("quiet", "quiet probe", quiet=True),
)


def variants_for(cache_type: str) -> tuple[Variant, ...]:
    """The variants that llama.cpp can run with this type of cache: a quantized one requires flash attention."""
    if not is_quantized(cache_type):
        return VARIANTS
    return tuple(replace(variant, flash_attention=True) for variant in VARIANTS if variant is not PLAIN)


@dataclass(frozen=True)
class MtpTruth:
    """The reference's results for the MTP layer."""

    layer: int
    logits: NDArray[np.floating]  # [T, V]
    experts: NDArray[np.int64]  # [T, K]
    margins: NDArray[np.floating]  # [T]


@dataclass(frozen=True)
class Truth:
    """The reference's results for the token ids [T]."""

    ids: Ids
    logits: NDArray[np.floating]  # [T, V]
    layer_outputs: dict[int, NDArray[np.floating]]  # layer -> [T, M]
    experts: dict[int, NDArray[np.int64]]  # MoE layer -> [T, K]
    margins: dict[int, NDArray[np.floating]]  # MoE layer -> [T]
    kinds: dict[int, str]  # layer -> "kda" or "mla"
    mtp: MtpTruth | None = None  # if the model has an MTP layer


@dataclass(frozen=True)
class Answer:
    """llama.cpp's results for one variant: the run without a callback and the run with it."""

    variant: Variant
    untouched: LlamaRun
    watched: LlamaRun


@dataclass(frozen=True)
class Measured:
    """One variant of one file on one engine, compared with the reference."""

    variant: Variant
    at: Positions
    choices: Choices
    layers: list[LayerError]
    all: Summary
    judged: Summary  # without near ties, and without positions after a near tie that was decided differently
    same_experts: Summary  # positions where every layer chose the reference's experts
    other_experts: Summary
    watched_nmse: float  # between the run without a callback and the run with it
    system: str  # llama.cpp's line about CPU features and backends

    @property
    def other_experts_share(self) -> float:
        """Expert mismatch rate: share of (position, MoE layer) pairs whose experts differ from the reference's.

        0 for a model without MoE layers.
        """
        flags = list(self.choices.by_layer.values())
        return float(np.mean(flags)) if flags else 0.0

    @property
    def curves(self) -> Curves:
        return Curves(self.at.nmse, self.at.kld, self.at.top1, self.choices.differs, self.layers)

    @property
    def judged_share(self) -> float:
        return self.judged.positions / self.all.positions


class _CountingTrace(Trace):
    """Reports how many layers are done."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        super().__init__()
        self.progress = progress

    def layer_done(self, output: torch.Tensor) -> None:
        super().layer_done(output)
        self.progress(len(self.layer_outputs))


def truth(reference: Reference, ids: Ids, progress: Progress | None = None) -> Truth:
    """Run the reference on the ids [T]; `progress` gets the number of layers done and the total."""
    count = len(reference.config.layers)
    trace = _CountingTrace(lambda done: progress(done, count) if progress else None)
    tokens = torch.from_numpy(ids)
    hidden = reference.hidden(tokens, trace)
    mtp = _mtp_truth(reference, tokens, hidden) if reference.config.num_mtp_layers else None
    return Truth(
        ids=ids,
        logits=reference.head(hidden).numpy(),
        layer_outputs={i: x.numpy() for i, x in enumerate(trace.layer_outputs)},
        experts={i: route.experts.numpy() for i, route in trace.routes.items()},
        margins={i: route.margin.numpy() for i, route in trace.routes.items()},
        kinds={i: kind.value for i, kind in enumerate(reference.config.layers)},
        mtp=mtp,
    )


def _mtp_truth(reference: Reference, ids: torch.Tensor, hidden: torch.Tensor) -> MtpTruth:
    trace = Trace()
    logits = reference.mtp_logits(ids, hidden, trace)
    ((layer, route),) = trace.routes.items()
    return MtpTruth(layer, logits.numpy(), route.experts.numpy(), route.margin.numpy())


def answer(
    engine: Engine,
    gguf: Path,
    ids: Ids,
    variant: Variant,
    options: RunOptions,
    progress: Progress | None = None,
) -> Answer:
    """Run one variant, without and with the callback; with `options.mtp` also the MTP layer.

    Raises ValidateError if llama.cpp does not finish.
    """
    options = replace(options, flash_attention=variant.flash_attention)
    return Answer(
        variant,
        untouched=run(engine, gguf, [ids], options, progress),
        watched=run(engine, gguf, [ids], replace(options, trace=True), progress),
    )


def measure(expected: Truth, found: Answer) -> Measured:
    """Compare a run with the reference."""
    logits, watched = found.untouched.logits[0], found.watched.logits[0]
    at = compare(expected.logits, logits, expected.ids)
    choices = compare_choices(expected.experts, expected.margins, found.watched.experts, len(expected.ids))
    return Measured(
        variant=found.variant,
        at=at,
        choices=choices,
        layers=layer_errors(expected.layer_outputs, found.watched.layer_outputs, expected.kinds, choices),
        all=summarise(at),
        judged=summarise(at, ~(choices.near_tie | choices.fallen)),
        same_experts=summarise(at, ~choices.differs),
        other_experts=summarise(at, choices.differs),
        watched_nmse=summarise(compare(logits, watched, expected.ids)).nmse,
        system=found.untouched.system,
    )


def measure_mtp(expected: Truth, found: Answer) -> Measured:
    """Compare the logits of the MTP layer with the reference.

    The layer reads the hidden state of the token before, so the main layers' experts count at the position after.
    """
    mtp = expected.mtp
    assert mtp is not None
    layers = [*expected.experts, mtp.layer]
    with_mtp = replace(
        expected,
        logits=mtp.logits,
        layer_outputs={},
        experts={i: _after(expected.experts[i]) for i in expected.experts} | {mtp.layer: mtp.experts},
        margins={i: _after(expected.margins[i], np.inf) for i in expected.margins} | {mtp.layer: mtp.margins},
    )
    chosen = {i: found.watched.experts[i] for i in layers}
    chosen |= {i: _after(chosen[i]) for i in expected.experts}

    def of_mtp(run: LlamaRun) -> LlamaRun:
        return replace(run, logits=run.mtp_logits, layer_outputs={}, experts=chosen)

    variant = replace(
        found.variant, key=f"{found.variant.key}-mtp", title=f"{found.variant.title}, MTP layer", mtp=True
    )
    return measure(with_mtp, Answer(variant, of_mtp(found.untouched), of_mtp(found.watched)))


def _after(rows: NDArray[Any], first: float = 0) -> NDArray[Any]:
    """Each row [T, ...] at the position after its own; `first` at the first position."""
    return np.concatenate([np.full_like(rows[:1], first), rows[:-1]])


def noise_floor(engine: Engine, gguf: Path, ids: Ids, options: RunOptions, n_ubatch: int) -> Summary:
    """Compare the file with itself under another ubatch size: the error that rounding alone causes."""
    one = run(engine, gguf, [ids], options).logits[0]
    other = run(engine, gguf, [ids], replace(options, n_ubatch=n_ubatch)).logits[0]
    return summarise(compare(one, other, ids))
