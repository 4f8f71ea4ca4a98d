"""Ctrl-C: the exit status of all commands, and what it does while modules are imported."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

INTERRUPTED: Final = 130  # the exit status: 128 + SIGINT


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
