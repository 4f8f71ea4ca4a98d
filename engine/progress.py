"""Progress of a build: phases and, inside a phase, steps done of a total.

Input: calls from the engine. Output: a bar on a terminal, plain lines elsewhere, nothing for
`Silent`. All output goes to standard error; standard output is only for a command's own result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress


class Reporter(Protocol):
    """Interface for the progress of the engine."""

    def phase(self, name: str) -> None:
        """Begin a new phase; this ends the previous one."""

    def step(self, done: int, total: int) -> None:
        """`done` of `total` steps of the current phase are finished."""

    def note(self, text: str) -> None:
        """Show a note."""


class Silent(Reporter):
    """Reports nothing."""

    def phase(self, name: str) -> None:
        pass

    def step(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Plain(Reporter):
    """Writes lines to standard error: each phase, and a step line at most every ten seconds."""

    interval = 10.0  # seconds

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last_line = self._began
        self._name = ""

    def phase(self, name: str) -> None:
        self._name = name
        self._line(name)

    def step(self, done: int, total: int) -> None:
        if time.monotonic() - self._last_line >= self.interval:
            self._line(f"{self._name}: {done} of {total}")

    def note(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        print(f"[{self._last_line - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)


class Bar(Reporter):
    """Draws a bar on a terminal; finished phases stay as lines above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def phase(self, name: str) -> None:
        self._finish()
        self._task = self._progress.add_task(name, total=None)

    def step(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def _finish(self) -> None:
        for task in self._progress.tasks:
            if task.id == self._task and task.description:
                elapsed = f"{task.elapsed or 0.0:6.1f} s"
                self._progress.console.print(f"{elapsed}  {task.description}", highlight=False, markup=False)
        self._progress.remove_task(self._task)


@contextmanager
def reporting() -> Iterator[Reporter]:
    """`with reporting() as reporter:` uses a bar if standard error is a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield Plain()
        return
    # Imported here, so that rich is not loaded if the build already exists.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress)
