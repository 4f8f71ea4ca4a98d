"""Progress of a conversion: a progress bar on a terminal, plain lines elsewhere, or JSON lines for programs.

Input: the plan, then each tensor and the number of bytes written. Output: text on standard error, or JSON objects
on standard output, one per line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kimi_gguf.convert.conversion import Report
from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.plan import Plan

PROGRAM: Final = "convert-kimi"
PLAIN_INTERVAL = 10.0  # seconds between lines if standard error is not a terminal
JSON_INTERVAL = 1.0

Teller = Callable[[Plan], AbstractContextManager[Report]]


@contextmanager
def quiet(plan: Plan) -> Iterator[Report]:
    """Report nothing."""
    yield lambda tensor, nbytes: None


@contextmanager
def for_people(plan: Plan) -> Iterator[Report]:
    """Print the plan's notes, then a progress bar; without a terminal, a line every PLAIN_INTERVAL."""
    console = Console(stderr=True)
    for note in plan.notes:
        print(f"{PROGRAM}: note: {note}", file=sys.stderr)
    if not console.is_terminal:
        yield _plain(plan)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=_total(plan))
        yield lambda tensor, nbytes: bar.update(task, advance=nbytes, description=tensor.name)


@contextmanager
def for_programs(plan: Plan) -> Iterator[Report]:
    """Print JSON lines: one "plan", then "progress" every JSON_INTERVAL; the caller adds "done" or "error"."""
    say("plan", bytes=_total(plan), tensors=len(plan.tensors), notes=list(plan.notes))
    meter = _Meter(_total(plan), JSON_INTERVAL)

    def report(tensor: PlannedTensor, nbytes: int) -> None:
        if meter.add(nbytes):
            say(
                "progress",
                tensor=tensor.name,
                bytes=meter.done,
                bytes_per_second=round(meter.rate),
                seconds_left=round(meter.seconds_left, 1),
            )

    yield report


def say(event: str, **facts: object) -> None:
    """Print one JSON line on standard output."""
    print(json.dumps({"event": event, **facts}), flush=True)


def _plain(plan: Plan) -> Report:
    meter = _Meter(_total(plan), PLAIN_INTERVAL)

    def report(tensor: PlannedTensor, nbytes: int) -> None:
        if meter.add(nbytes):
            print(
                f"{PROGRAM}: {100 * meter.done / meter.total:.0f} % ({tensor.name}), {meter.rate / 1e6:.0f} MB/s, "
                f"{_duration(meter.seconds_left)} left",
                file=sys.stderr,
                flush=True,
            )

    return report


def _total(plan: Plan) -> int:
    return sum(tensor.nbytes for tensor in plan.tensors)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _Meter:
    """Counts bytes and decides when to report."""

    def __init__(self, total: int, interval: float) -> None:
        self.total, self.done = total, 0
        self._interval = interval
        self._began = self._told = time.monotonic()

    def add(self, nbytes: int) -> bool:
        self.done += nbytes
        now = time.monotonic()
        if now - self._told < self._interval:
            return False
        self._told = now
        return True

    @property
    def rate(self) -> float:
        """Bytes per second since the start."""
        return self.done / max(time.monotonic() - self._began, 1e-9)

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done) / max(self.rate, 1e-9)
