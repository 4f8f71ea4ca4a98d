"""A file that grows beside its place: one writer at a time, takes its name when whole, can be gone on with.

Flows in: bytes in order, and marks where something is finished. Flows out: the file under its name, or a hidden
`.NAME.unfinished` with a journal `.NAME.journal` of what in it is finished and safe on disk.

Data go past the page cache where the file system lets them (several times as fast on large files, and other
programs keep their pages). A mark is noted only after the data before it are on the disk, so that a journal never
promises more than is there, whatever ends the process or the machine.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from typing import Any, Final

import numpy as np

from .errors import ConvertError, ReadError
from .quantise import Bytes

BUFFER: Final = 8 << 20
SECTOR: Final = 4096  # what unbuffered writes must be multiples of
SYNC_SECONDS = 1.0  # between marks that are noted
_FORMAT: Final = 1


@dataclass(frozen=True)
class Identity:
    """What the bytes of a file follow from; a file begun with another one is not gone on with."""

    plan: str  # hash of options and layout
    sources: str  # hash of the input files' names, sizes, times and headers


@dataclass(frozen=True)
class Mark:
    """So many steps are finished, and end at this byte."""

    done: int
    end: int


class Unfinished:
    """The growing file; made by `unfinished`."""

    def __init__(self, fd: int, journal: Path, mark: Mark) -> None:
        self.mark = mark  # where to go on: `done` steps are finished
        self.noted = mark.done
        self._journal = journal
        self._fd = fd
        self._synced = time.monotonic()
        self._buffers = [np.frombuffer(mmap.mmap(-1, BUFFER), np.uint8) for _ in range(2)]
        self._start = mark.end // SECTOR * SECTOR  # file offset of the buffer in use
        self._used = mark.end - self._start
        if self._used:
            head = os.pread(fd, self._used, self._start)
            self._buffers[0][: self._used] = np.frombuffer(head, np.uint8)
        _bypass_cache(fd, True)
        self._pool = ThreadPoolExecutor(1, "write")
        self._writing: Future[None] | None = None

    @property
    def at(self) -> int:
        """Bytes so far."""
        return self._start + self._used

    def write(self, data: Bytes) -> None:
        """Append. Raises `OSError`, perhaps of an earlier piece."""
        done = 0
        while done < len(data):
            count = min(len(data) - done, BUFFER - self._used)
            self._buffers[0][self._used : self._used + count] = data[done : done + count]
            self._used += count
            done += count
            if self._used == BUFFER:
                self._hand_over()

    def finished(self, done: int) -> None:
        """All bytes of `done` steps are written; noted in the journal now and then."""
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._settle()
            os.fdatasync(self._fd)
            _append(self._journal, {"done": done, "end": self.at})
            self.noted = done
            self._synced = time.monotonic()

    def complete(self) -> None:
        """Everything is written: cut to size and make it last."""
        self._settle()
        os.ftruncate(self._fd, self.at)
        os.fsync(self._fd)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _hand_over(self) -> None:
        """The full buffer is written while the other one fills."""
        self._wait()
        self._writing = self._pool.submit(_write_all, self._fd, self._buffers[0], self._start)
        self._buffers.reverse()
        self._start += BUFFER
        self._used = 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _settle(self) -> None:
        """Write what is buffered, filled up to whole sectors; it is written again when more has come."""
        self._wait()
        whole = -(-self._used // SECTOR) * SECTOR
        self._buffers[0][self._used : whole] = 0
        _write_all(self._fd, self._buffers[0][:whole], self._start)


@contextmanager
def unfinished(path: Path, identity: Identity, resume: bool, overwrite: bool) -> Iterator[Unfinished]:
    """The unfinished file of `path`, from its last mark with `resume`, else from the beginning.

    When the block ends well the file takes the name `path`. After an interrupt, a failing disk or a failing
    source it stays with its journal if anything in it is finished; after any other error it vanishes.
    Raises `ConvertError` when somebody else writes it, or when it was begun with another identity.
    """
    data, journal = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.journal")
    fd = _locked(data, path)
    file: Unfinished | None = None
    keep = False
    try:
        try:
            mark = _last_mark(data, journal, identity, os.fstat(fd).st_size) if resume else None
        except ConvertError:
            keep = True
            raise
        if mark is None:
            mark = Mark(0, 0)
            os.ftruncate(fd, 0)
            journal.unlink(missing_ok=True)
            _append(journal, {"format": _FORMAT, "plan": identity.plan, "sources": identity.sources})
        file = Unfinished(fd, journal, mark)
        yield file
        file.complete()
        if path.exists() and not overwrite:
            raise ConvertError(f"{path}: was made by someone else meanwhile; choose another name")
        journal.unlink(missing_ok=True)  # from here on another run may have files of these names
        data.replace(path)
        keep = True
        _sync_folder(path.parent)
    except (KeyboardInterrupt, OSError, ReadError) as error:
        keep = file is not None and file.noted > 0
        if not isinstance(error, OSError):
            raise
        left = f"make room or mend it, then go on with --resume ({data.name})" if keep else "nothing was left"
        raise ConvertError(f"{path}: cannot be written: {error.strerror or error}; {left}") from None
    finally:
        if file is not None:
            file.close()
        if not keep:
            for name in (journal, data):  # in this order: the lock is on the data
                with suppress(OSError):
                    name.unlink(missing_ok=True)
        os.close(fd)


def leftover(path: Path) -> Path | None:
    """The unfinished file of an earlier run, if there is one."""
    data = path.with_name(f".{path.name}.unfinished")
    return data if data.exists() else None


def _locked(data: Path, path: Path) -> int:
    """The unfinished file, opened and locked; the lock goes with the process, however it ends."""
    while True:
        try:
            fd = os.open(data, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise ConvertError(f"{path}: cannot be written: {error.strerror}; nothing was left") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConvertError(
                f"{path}: another conversion is writing it ({data.name} is locked); wait for it, or choose "
                "another name"
            ) from None
        except OSError:  # a file system without locks
            return fd
        with suppress(FileNotFoundError):
            if os.path.samestat(data.stat(), os.fstat(fd)):
                return fd
        os.close(fd)  # it was finished or removed in between: try again


def _last_mark(data: Path, journal: Path, identity: Identity, size: int) -> Mark | None:
    """The last mark of the journal, None where there is nothing to go on from."""
    if size == 0 or not journal.exists():
        return None
    entries = _entries(journal)
    remedy = f"remove {data.name} and {journal.name}, or leave --resume out, to begin anew"
    if not entries or entries[0].get("format") != _FORMAT:
        raise ConvertError(f"{journal}: no journal of this version; {remedy}")
    if entries[0].get("sources") != identity.sources:
        raise ConvertError(
            f"{journal}: the unfinished file was begun from another checkpoint, or this one has changed since; "
            f"{remedy}"
        )
    if entries[0].get("plan") != identity.plan:
        raise ConvertError(
            f"{journal}: the unfinished file was begun with other options or versions; {remedy}"
        )
    marks = [Mark(e["done"], e["end"]) for e in entries[1:] if isinstance(e.get("done"), int)]
    if not marks:
        return None
    if not 0 <= marks[-1].end <= size:
        raise ConvertError(
            f"{data}: expected at least the {marks[-1].end} bytes that its journal calls finished, found {size}; "
            f"{remedy}"
        )
    return marks[-1]


def _entries(journal: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; the last may have been cut off."""
    try:
        lines = journal.read_bytes().split(b"\n")[:-1]
        found = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ConvertError(f"{journal}: cannot be read: {error}; remove it to begin anew") from None
    return [entry for entry in found if isinstance(entry, dict)]


def _append(journal: Path, entry: dict[str, Any]) -> None:
    with journal.open("ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _write_all(fd: int, data: Bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:].data, offset + done)
        except OSError as error:
            if error.errno != EINVAL or not _bypass_cache(fd, False):
                raise


def _bypass_cache(fd: int, wanted: bool) -> bool:
    """Switch unbuffered writing on or off; whether that changed anything."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
    except OSError:
        return False
    return bool(flags & direct) != wanted


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
