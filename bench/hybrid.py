"""Compares the 3:1 hybrid with a model that has latent attention in every layer, both with the patched build.

Input: the two generated models, depths. Output: cache bytes and decode rate of both at each depth, and their
extrapolation to a million tokens. A depth is reached by repeating the rows of a real state of SEED tokens (state.py);
the time of attention does not depend on the values of the rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from kimi_gguf.bench.ab_run import Runners
from kimi_gguf.bench.cells import PATCHED, Cell
from kimi_gguf.bench.models import ModelFile
from kimi_gguf.bench.roofline import demand
from kimi_gguf.engine.limits import available_memory
from kimi_gguf.engine.progress import Reporter

SEED = 1024  # tokens of the state that is repeated
DEPTHS = (4096, 16384, 65536, 262144, 524288)
MILLION = 1 << 20  # the 48B's trained context
STEPS = 4  # decodes of a sample
ROUNDS = 5  # samples of each model, alternating
ROOM = 256  # cells after the deepest state
NAMES = ("3:1", "all MLA")
TOO_DEEP = "the caches of both models do not fit in memory"


def fit(depths: Sequence[int], seconds: Sequence[float]) -> np.poly1d:
    """Seconds of a decode by depth: a line by least squares, weighted by 1/seconds so that relative errors count."""
    return np.poly1d(np.polyfit(depths, seconds, 1, w=1 / np.asarray(seconds)))


def enough_memory(depth: int, models: Sequence[ModelFile], cache_type: str) -> bool:
    """Whether the caches at a depth and one state that is being loaded fit in memory, if this is known."""
    needed = [demand(model, Cell(cache_type, 1, depth, 1, 1)).cache_bytes for model in models]
    free = available_memory()
    return free is None or sum(needed) + max(needed) < 0.9 * free


def measure_hybrid(
    models: Sequence[ModelFile],
    environments: Mapping[str, Mapping[str, str]],
    depths: Sequence[int],
    cache_type: str,
    threads: int,
    reporter: Reporter,
) -> Iterator[dict[str, Any]]:
    """A row for each depth. models: the hybrid, then the all-MLA model. depths: ascending. Raises `EngineError`."""
    if not depths:
        return
    with ExitStack() as stack:
        places = {}
        for name, model in zip(NAMES, models, strict=True):
            runners = stack.enter_context(Runners(model, environments, reporter, threads))
            seed = Cell(cache_type, 1, SEED, threads, 1)
            small = runners.context(PATCHED, seed, SEED + ROOM, 512)
            file = runners.go_to(PATCHED, seed, small)
            small[0].ask("free", name=small[1])
            process, context = runners.context(PATCHED, seed, depths[-1] + ROOM, 512)
            places[name] = process, context, file
        for depth in depths:
            reporter.phase(f"decoding after {depth} tokens")
            samples: dict[str, list[float]] = {name: [] for name in NAMES}
            for process, context, file in places.values():
                process.ask("restore", name=context, file=str(file), depth=depth)
            for turn in range(ROUNDS):
                for name, (process, context, _) in places.items():
                    answer = process.ask("time", name=context, batch=1, steps=STEPS, warm=turn == 0,
                                         threads=threads, back=False)  # fmt: skip
                    samples[name].append(sum(answer["seconds"]) / STEPS)
            cell = Cell(cache_type, 1, depth, threads, 1)
            needs = {name: demand(model, cell) for name, model in zip(NAMES, models, strict=True)}
            yield {
                "depth": depth,
                "samples": samples,
                "seconds": {name: statistics.median(each) for name, each in samples.items()},
                "cache_bytes": {name: each.cache_bytes for name, each in needs.items()},
                "state_bytes": {name: each.state_bytes / 2 for name, each in needs.items()},
            }


def extrapolated(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Seconds of a decode after MILLION tokens by each model's slope; None from fewer than three depths."""
    if len(rows) < 3:
        return None
    depths = [row["depth"] for row in rows]
    return {name: fit(depths, [row["seconds"][name] for row in rows])(MILLION) for name in NAMES}
