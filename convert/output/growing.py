"""A file that is written sequentially, bypassing the page cache if the file system supports it.

This is several times faster for large files and does not evict other programs' pages.
Input: bytes in order. Output: the file. When `settle` returns, all bytes written before are on the disk.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from errno import EINVAL
from pathlib import Path
from typing import Final

import numpy as np

from kimi_gguf.engine.tensor_types import Bytes

BUFFER: Final = 8 << 20
SECTOR: Final = 4096  # size and offset of unbuffered writes must be multiples of this


def sync(fd: int) -> None:
    """Flush a file, with its size, to the disk. Raises `OSError`."""
    if sys.platform == "darwin":  # there fsync leaves data in the disk's cache, and Python has no fdatasync
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


class Growing:
    """The file `path`, continued after its first `end` bytes; must be closed."""

    def __init__(self, path: Path, end: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        if end == 0:
            os.ftruncate(self._fd, 0)
        self._buffers = [np.frombuffer(mmap.mmap(-1, BUFFER), np.uint8) for _ in range(2)]
        self._start = end // SECTOR * SECTOR  # file offset of the buffer in use
        self._used = end - self._start
        if self._used:
            head = os.pread(self._fd, self._used, self._start)
            self._buffers[0][: self._used] = np.frombuffer(head, np.uint8)
        _bypass_cache(self._fd, True)
        self._pool = ThreadPoolExecutor(1, "write")
        self._writing: Future[None] | None = None

    @property
    def at(self) -> int:
        """Bytes so far."""
        return self._start + self._used

    def write(self, data: Bytes) -> None:
        """Append. Raises `OSError`, perhaps of an earlier write."""
        done = 0
        while done < len(data):
            count = min(len(data) - done, BUFFER - self._used)
            self._buffers[0][self._used : self._used + count] = data[done : done + count]
            self._used += count
            done += count
            if self._used == BUFFER:
                self._hand_over()

    def settle(self) -> None:
        """Flush everything written so far to the disk. Raises `OSError`."""
        self._flush()
        sync(self._fd)

    def complete(self) -> None:
        """Truncate the file to its final size and sync it. Raises `OSError`."""
        self._flush()
        os.ftruncate(self._fd, self.at)
        sync(self._fd)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        os.close(self._fd)

    def _hand_over(self) -> None:
        """Write the full buffer in the background and continue with the other one."""
        self._wait()
        self._writing = self._pool.submit(_write_all, self._fd, self._buffers[0], self._start)
        self._buffers.reverse()
        self._start += BUFFER
        self._used = 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _flush(self) -> None:
        """Write the buffer, padded to whole sectors; later writes overwrite the padding."""
        self._wait()
        whole = -(-self._used // SECTOR) * SECTOR
        self._buffers[0][self._used : whole] = 0
        _write_all(self._fd, self._buffers[0][:whole], self._start)


def _write_all(fd: int, data: Bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:].data, offset + done)
        except OSError as error:
            if error.errno != EINVAL or not _bypass_cache(fd, False):
                raise


def _bypass_cache(fd: int, wanted: bool) -> bool:
    """Switch unbuffered writing on or off; return whether this changed anything."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
    except OSError:
        return False
    return bool(flags & direct) != wanted
