"""From a GGUF file, an engine and the reference to figures: everything that a report shows is measured here.

Flows in: token ids, the reference, an engine, a GGUF file, options. Flows out: the reference's `Truth`,
llama.cpp's `Answer` and, of the two, `Measured`: one per variant of running the file.

Each variant runs twice: once untouched for the logits, once watched for layer outputs and chosen experts
(watching splits the graph, which may keep a backend from fusing operations).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kimi_gguf.engine.worker import Progress
from kimi_gguf.validate.llama import Engine, LlamaRun, RunOptions, run
from kimi_gguf.validate.metrics import (
    Choices,
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
    """One way to run the file."""

    key: str
    title: str
    flash_attention: bool = False
    quiet: bool = False  # on the quiet probe (probe.py); for F32 files


PLAIN = Variant("plain", "plain attention")
VARIANTS = (
    PLAIN,
    Variant("flash", "flash attention", flash_attention=True),
    Variant("quiet", "quiet probe", quiet=True),
)


@dataclass(frozen=True)
class Truth:
    """The reference's answer for the token ids [T]."""

    ids: Ids
    logits: NDArray[np.floating]  # [T, V]
    layer_outputs: dict[int, NDArray[np.floating]]  # layer -> [T, M]
    experts: dict[int, NDArray[np.int64]]  # MoE layer -> [T, K]
    margins: dict[int, NDArray[np.floating]]  # MoE layer -> [T]
    kinds: dict[int, str]  # layer -> "kda" or "mla"


@dataclass(frozen=True)
class Answer:
    """llama.cpp's, to one variant: the run for the logits, and the watched one."""

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
    judged: Summary  # without near ties and what follows one that fell the other way
    same_experts: Summary  # positions where every layer chose the reference's experts
    other_experts: Summary
    watched_nmse: float  # between the untouched and the watched run
    system: str  # llama.cpp's line about CPU features and backends

    @property
    def other_experts_share(self) -> float:
        """Share of all choices (position and MoE layer) that are not the reference's; 0 with no MoE layer."""
        flags = list(self.choices.by_layer.values())
        return float(np.mean(flags)) if flags else 0.0

    @property
    def judged_share(self) -> float:
        return self.judged.positions / self.all.positions


class _CountingTrace(Trace):
    """Tells how many layers are done."""

    def __init__(self, told: Callable[[int], None]) -> None:
        super().__init__()
        self.told = told

    def layer_done(self, output: torch.Tensor) -> None:
        super().layer_done(output)
        self.told(len(self.layer_outputs))


def truth(reference: Reference, ids: Ids, progress: Progress | None = None) -> Truth:
    """Run the reference on the ids [T]; `progress` gets layers done and in all."""
    count = len(reference.config.layers)
    trace = _CountingTrace(lambda done: progress(done, count) if progress else None)
    logits = reference.logits(torch.from_numpy(ids), trace)
    return Truth(
        ids=ids,
        logits=logits.numpy(),
        layer_outputs={i: x.numpy() for i, x in enumerate(trace.layer_outputs)},
        experts={i: route.experts.numpy() for i, route in trace.routes.items()},
        margins={i: route.margin.numpy() for i, route in trace.routes.items()},
        kinds={i: kind.value for i, kind in enumerate(reference.config.layers)},
    )


def answer(
    engine: Engine,
    gguf: Path,
    ids: Ids,
    variant: Variant,
    options: RunOptions,
    progress: Progress | None = None,
) -> Answer:
    """Run one variant, untouched and watched. Raises ValidateError if llama.cpp does not finish."""
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


def noise_floor(engine: Engine, gguf: Path, ids: Ids, options: RunOptions, n_ubatch: int) -> Summary:
    """The same weights in another batch split against themselves: what rounding alone makes of them."""
    one = run(engine, gguf, [ids], options).logits[0]
    other = run(engine, gguf, [ids], replace(options, n_ubatch=n_ubatch)).logits[0]
    return summarise(compare(one, other, ids))
