"""The sub-command `kimi-llama bench`: its arguments, and the order in which things happen.

Flows in: the command line. Flows out: a table on standard output, progress on standard error, files where asked.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

from kimi_gguf.patches.errors import EngineError
from kimi_gguf.scripts.bench.cells import (
    BATCHES,
    DEPTHS,
    PRISTINE,
    QUICK_BATCHES,
    QUICK_DEPTHS,
    THREADS,
    grid,
)
from kimi_gguf.scripts.bench.contender import environment_of
from kimi_gguf.scripts.bench.measure import Arena, Result, Settings, measure
from kimi_gguf.scripts.bench.models import generate, open_model
from kimi_gguf.scripts.bench.report import as_data, table
from kimi_gguf.scripts.bench.shapes import FAMILIES, SHAPES, TYPES, BenchModel
from kimi_gguf.scripts.engine import ensure
from kimi_gguf.scripts.progress import reporting
from kimi_gguf.scripts.toolchain import cores

EXAMPLES = """\
  kimi-llama bench                                   the quick subset on a generated model, Q4_0: minutes
  kimi-llama bench --grid --out out/bench            everything: types x batches x depths x threads; hours
  kimi-llama bench model.gguf --batch 1,512 --depth 0,16384
  kimi-llama bench --type Q8_0 --layers 4 --batch 1 --cache-type f16,q8_0
  kimi-llama bench --libraries ~/llama.cpp/build/bin --batch 512     another build in the place of ours
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-command's arguments."""
    parser.add_argument("model", nargs="?", type=Path, metavar="FILE", help="a GGUF file (default: a generated model)")
    made = parser.add_argument_group("the generated model")
    made.add_argument("--type", type=_words(TYPES), default=None, metavar="T,..", help=f"of {', '.join(TYPES)} (Q4_0)")
    made.add_argument("--layers", type=_positive, default=8, metavar="N", help="default 8")
    made.add_argument("--experts", type=_positive, default=32, metavar="N", help="in each layer but the first (32)")
    made.add_argument("--family", choices=tuple(FAMILIES), default="kimi-linear")
    made.add_argument("--shapes", choices=tuple(SHAPES), default="48b", help="tiny is for trying the command out")
    what = parser.add_argument_group("what is measured")
    size = what.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a small subset (the default)")
    size.add_argument("--grid", action="store_true", help="every type, batch, depth and number of threads")
    what.add_argument("--batch", type=_numbers(1), metavar="N,..", help="tokens of a sequence decoded at once")
    what.add_argument("--depth", type=_numbers(0), metavar="N,..", help="tokens in the cache before them")
    what.add_argument("--threads", type=_numbers(1), metavar="N,..")
    what.add_argument("--cache-type", type=_words(None), default=("f16",), metavar="T,..", help="such as f16,q8_0")
    what.add_argument("--sequences", type=_numbers(1), default=(1,), metavar="N,..", help="decoded side by side")
    what.add_argument("--seconds", type=float, default=8.0, metavar="S", help="alternating in each cell, at most (8)")
    what.add_argument("--budget", type=float, default=math.inf, metavar="S", help="begin no cell after so long")
    what.add_argument("--libraries", type=Path, metavar="DIR", help="libraries that stand in for our build's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")


def run(parsed: argparse.Namespace) -> int:
    """Measure. Returns the exit status."""
    began = time.monotonic()
    patched, pristine = ensure(), ensure(pristine=True)
    environments = {
        "patched": environment_of(patched.environment(), parsed.libraries, ours=True),
        "pristine": environment_of(pristine.environment(), None, ours=False),
    }
    threads = parsed.threads or (THREADS if parsed.grid else (cores(),))
    cells = grid(
        parsed.cache_type,
        parsed.sequences,
        parsed.depth or (DEPTHS if parsed.grid else QUICK_DEPTHS),
        threads,
        parsed.batch or (BATCHES if parsed.grid else QUICK_BATCHES),
    )
    settings = Settings(parsed.seconds, began + parsed.budget)
    data = []
    with reporting() as told:
        if parsed.model is not None:
            files = [parsed.model]
        else:
            types = parsed.type or (TYPES if parsed.grid else TYPES[:1])
            models = [BenchModel(parsed.family, parsed.layers, parsed.experts, each, parsed.shapes) for each in types]
            files = [generate(model, pristine, told) for model in models]
        for file in files:
            model = open_model(file)
            results: list[Result] = []
            with Arena(model, environments, told, max(threads)) as arena:
                for result in measure(arena, cells, PRISTINE, settings):
                    results.append(result)
                    told.note(" | ".join(table([result]).splitlines()[-1].strip("| ").split(" | ")))
                data.append({"model": model.name, "about": vars(arena.about), "cells": [*map(as_data, results)]})
            print(f"\n{model.name}\n\n{table(results)}", flush=True)
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(data, indent=1))
    return 0


def _positive(text: str) -> int:
    return _numbers(1)(text)[0]


def _numbers(least: int):  # type: ignore[no-untyped-def]
    def read(text: str) -> tuple[int, ...]:
        try:
            numbers = tuple(int(word) for word in text.split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers from {least} on, with commas")
        return numbers

    return read


def _words(allowed: tuple[str, ...] | None):  # type: ignore[no-untyped-def]
    def read(text: str) -> tuple[str, ...]:
        words = tuple(text.split(","))
        for word in words:
            if allowed is not None and word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r}: expected one of {', '.join(allowed)}")
        return words

    return read


__all__ = ["EXAMPLES", "EngineError", "add_arguments", "run"]
