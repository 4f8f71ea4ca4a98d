"""Prefetches ranges of files with a few threads and a limited amount of memory.

Input: the ranges in the order in which they will be read. Output: their bytes, each range once. Consecutive ranges
of a file are fetched with one request.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from kimi_gguf.convert.errors import ReadError

AHEAD_BYTES: Final = 64 << 20  # maximum of bytes that are fetched but not yet read
FETCH_BYTES: Final = 8 << 20  # maximum of one request; a single range is never divided
CONNECTIONS: Final = 4
MOST_BYTES: Final = AHEAD_BYTES + (1 + CONNECTIONS) * FETCH_BYTES  # maximum memory
POLL_SECONDS: Final = 0.2  # between checks whether reading was stopped
STOPPED: Final = "reading was stopped"

F = TypeVar("F")


@dataclass(frozen=True)
class Range(Generic[F]):
    """The bytes `begin .. end` of a file."""

    file: F
    begin: int
    end: int


class _Fetch(Generic[F]):
    """A request, and how many of its ranges were not taken yet."""

    def __init__(self, whole: Range[F], ranges: list[Range[F]], content: Future[memoryview]) -> None:
        self.whole, self.content = whole, content
        self.left = len(ranges)


class ReadAhead(Generic[F]):
    """`fetch` reads the bytes of a file between two offsets, and ends soon after `stop`, which sets `stopped`."""

    def __init__(
        self, fetch: Callable[[F, int, int], memoryview], stopped: threading.Event, stop: Callable[[], None]
    ) -> None:
        self._fetch = fetch
        self._stopped = stopped
        self.stop = stop
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: Iterator[list[Range[F]]] = iter(())
        self._fetches: dict[Range[F], deque[_Fetch[F]]] = {}  # by each range that was not taken yet
        self._held = 0

    @contextmanager
    def expecting(self, ranges: Iterable[Range[F]]) -> Iterator[None]:
        """Within the block these ranges are prefetched in this order; each must be taken once."""
        self._pool = ThreadPoolExecutor(CONNECTIONS, "fetch")
        self._coming = _together(ranges)
        try:
            with self._lock:
                self._fill()
            yield
        except BaseException:
            self.stop()
            raise
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool, self._coming, self._held = None, iter(()), 0
            self._fetches.clear()

    def take(self, file: F, begin: int, end: int) -> memoryview | None:
        """The bytes of an expected range; None for any other. Raises the error of the request."""
        wanted = Range(file, begin, end)
        with self._lock:
            while wanted not in self._fetches:  # this reader is ahead of the prefetched ranges
                if not self._begin_next():
                    return None
            waiting = self._fetches[wanted]
            fetch = waiting.popleft()
            if not waiting:
                del self._fetches[wanted]
        content = self._content(fetch)[begin - fetch.whole.begin : end - fetch.whole.begin]
        with self._lock:
            fetch.left -= 1
            if fetch.left == 0:
                self._held -= fetch.whole.end - fetch.whole.begin
                self._fill()
        return content

    def _content(self, fetch: _Fetch[F]) -> memoryview:
        while not wait([fetch.content], POLL_SECONDS).done:
            if self._stopped.is_set():
                raise ReadError(STOPPED)
        try:
            return fetch.content.result()
        except CancelledError:
            raise ReadError(STOPPED) from None

    def _fill(self) -> None:
        while self._held < AHEAD_BYTES and self._begin_next():
            pass

    def _begin_next(self) -> bool:
        ranges = next(self._coming, None)
        if ranges is None or self._pool is None or self._stopped.is_set():
            return False
        whole = Range(ranges[0].file, ranges[0].begin, ranges[-1].end)
        fetch = _Fetch(whole, ranges, self._pool.submit(self._fetch, whole.file, whole.begin, whole.end))
        for wanted in ranges:
            self._fetches.setdefault(wanted, deque()).append(fetch)
        self._held += whole.end - whole.begin
        return True


def _together(ranges: Iterable[Range[F]]) -> Iterator[list[Range[F]]]:
    """Consecutive ranges, as lists of at most `FETCH_BYTES`."""
    group: list[Range[F]] = []
    for wanted in ranges:
        follows = group and group[-1].file is wanted.file and group[-1].end == wanted.begin
        if group and not (follows and wanted.end - group[0].begin <= FETCH_BYTES):
            yield group
            group = []
        group.append(wanted)
    if group:
        yield group
