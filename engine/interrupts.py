"""Ctrl-C, and output that nobody reads any more: the exit status of all commands; what Ctrl-C does to a child process,
and while modules are imported."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

INTERRUPTED: Final = 130  # the exit status: 128 + SIGINT
NO_READER: Final = 141  # 128 + SIGPIPE


def exit_status(command: Sequence[str], folder: Path | None = None) -> int:
    """The exit status of a command, run in `folder`, as a shell gives it. The command is killed if this process is
    interrupted."""
    return shell_status(subprocess.run(command, cwd=folder, check=False).returncode)


def shell_status(returned: int) -> int:
    """An exit status as a shell gives it. returned: as Python gives it, negative after a signal."""
    return returned if returned >= 0 else 128 - returned


@contextmanager
def interrupt_ends_process() -> Iterator[None]:
    """Within it, Ctrl-C ends the process at once, without a word, with status 130. For imports only: no cleanup runs.

    A KeyboardInterrupt would not do: NumPy and torch turn one that comes during their import into other errors.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as of a job in the background, or someone else's
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def terminable() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, unless they are ignored (as under nohup)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handled = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, stop)) for number in handled]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
