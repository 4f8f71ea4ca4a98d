"""A lock on a folder, held in a block of code. It ends with its process, also with one that is killed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_lock(folder: Path, wait: bool) -> Iterator[bool]:
    """Lock a folder. Yields whether it is locked: False if the file system has no locks or, without `wait`, if another
    process has the lock. Raises `OSError` for a folder that cannot be opened."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)
