"""Progress of a conversion: a progress bar on a terminal, plain lines elsewhere, or JSON lines for programs.

Input: the plan, then each tensor and the number of bytes written. Output: text on standard error, or JSON objects
on standard output, one per line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich import progress
from rich.console import Console

from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.output.writer import ProgressCallback
from kimi_gguf.convert.plan import Plan

PROGRAM: Final = "convert-kimi"
PLAIN_INTERVAL = 10.0  # seconds between lines if standard error is not a terminal
JSON_INTERVAL = 1.0


@contextmanager
def for_people(plan: Plan) -> Iterator[ProgressCallback]:
    """Print the plan's notes, then a progress bar; without a terminal, a line every PLAIN_INTERVAL."""
    console = Console(stderr=True)
    for note in plan.notes:
        print(f"{PROGRAM}: note: {note}", file=sys.stderr)
    if not console.is_terminal:
        yield _plain(plan.data_bytes)
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=plan.data_bytes)
        yield lambda tensor, nbytes: bar.update(task, advance=nbytes, description=tensor.name)


@contextmanager
def for_programs(plan: Plan) -> Iterator[ProgressCallback]:
    """Print JSON lines: one "plan", then "progress" every JSON_INTERVAL; the caller adds "done" or "error"."""
    say("plan", bytes=plan.data_bytes, tensors=len(plan.tensors), notes=list(plan.notes))

    def show(name: str, done: int, rate: float, left: float) -> None:
        say("progress", tensor=name, bytes=done, bytes_per_second=round(rate), seconds_left=round(left, 1))

    yield _every(JSON_INTERVAL, plan.data_bytes, show)


def say(event: str, **facts: object) -> None:
    """Print one JSON line on standard output."""
    print(json.dumps({"event": event, **facts}), flush=True)


def _plain(total: int) -> ProgressCallback:
    def show(name: str, done: int, rate: float, left: float) -> None:
        minutes, seconds = divmod(round(left), 60)
        duration = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        print(
            f"{PROGRAM}: {100 * done / total:.0f} % ({name}), {rate / 1e6:.0f} MB/s, {duration} left",
            file=sys.stderr,
            flush=True,
        )

    return _every(PLAIN_INTERVAL, total, show)


def _every(interval: float, total: int, show: Callable[[str, int, float, float], None]) -> ProgressCallback:
    """A callback that calls `show` at most once in `interval` seconds, with the tensor's name, the bytes that are
    done, the bytes per second since the start, and the seconds left."""
    began = shown = time.monotonic()
    done = 0

    def report(tensor: PlannedTensor, nbytes: int) -> None:
        nonlocal shown, done
        done += nbytes
        now = time.monotonic()
        if now - shown >= interval:
            shown = now
            rate = max(done / max(now - began, 1e-9), 1e-9)
            show(tensor.name, done, rate, (total - done) / rate)

    return report
