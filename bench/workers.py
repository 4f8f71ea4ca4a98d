"""`kimi-llama bench --workers HOST:PORT,...`: speed on this machine and over workers, and bytes on the wire.

Input: parsed arguments, the patched build, a model. Output: a table on standard output.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from kimi_gguf.bench import report
from kimi_gguf.bench.cells import SIZES
from kimi_gguf.bench.models import ModelFile
from kimi_gguf.bench.runner import Runner, environment_of
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError, reason
from kimi_gguf.engine.toolchain import cores

STEPS = 32  # timed decodes of single tokens
WARM = 2
PATIENCE = 10  # seconds until a worker counts as unreachable


def check_reachable(addresses: Sequence[str]) -> None:
    """Raise `EngineError` unless something listens at each address: a model is generated for minutes before llama.cpp
    connects."""
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), PATIENCE).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise EngineError(
                f"{address}: no connection",
                expected="a worker that listens there",
                found=reason(error),
                todo="start it on its machine: kimi-llama worker --help",
            ) from None


def measure_workers(
    parsed: argparse.Namespace, addresses: Sequence[str], engine: Engine, model: ModelFile
) -> None:
    """Measure each batch at each depth, here and over the workers."""
    batches, depths = SIZES[False, False]
    depths, batches = parsed.depth or depths, parsed.batch or batches
    table: report.Rows = [
        ("batch", "depth", "where", "tokens/s", "bytes sent per token", "bytes received per token")
    ]
    threads = (parsed.threads or (cores(),))[0]
    environment = environment_of(engine, parsed.libraries, "")
    n_ctx = max(depths) + max(batches) * (WARM + max(map(steps_of, batches)))
    everywhere: tuple[tuple[str, list[str]], ...] = (
        ("here", []),
        (f"{len(addresses)} workers", list(addresses)),
    )
    for where, workers in everywhere:
        with Runner(where, environment) as runner:
            runner.ask("load", gguf=str(model.path), repack=True, workers=workers)
            made = runner.ask(
                "context", name="c", n_ctx=n_ctx, n_batch=max(*batches, 512), n_ubatch=parsed.ubatch, sequences=1,
                flash=True, cache_type=parsed.cache_type[0], threads=threads,
            )  # fmt: skip
            for line in made["fallbacks"]:
                print(line, file=sys.stderr)
            for depth in sorted(depths):
                runner.ask("fill", name="c", depth=depth, file="/dev/null")
                for batch in batches:
                    decode: dict[str, Any] = {"name": "c", "batch": batch, "warm": 0, "threads": threads}
                    runner.ask("time", steps=WARM, back=True, **decode)  # restores the state too
                    before = runner.ask("traffic", workers=workers)
                    timed = runner.ask("time", steps=steps_of(batch), back=False, **decode)
                    after = runner.ask("traffic", workers=workers)
                    tokens = batch * steps_of(batch)
                    sent, received = ((after[key] - before[key]) / tokens for key in ("sent", "received"))
                    speed = batch / statistics.median(timed["seconds"])
                    numbers = f"{speed:.4g}", f"{sent:,.0f}", f"{received:,.0f}"
                    table.append((f"{batch}", f"{depth}", where, *numbers))
    report.show(f"{model.name}, {model.nbytes / 1e9:.2f} GB", table)


def steps_of(batch: int) -> int:
    """Timed decodes of a batch."""
    return max(2, STEPS // batch)
