"""Reads a file over HTTP in ranges; an interrupted transfer continues at the byte where it stopped.

Input: a function that locates the file (a `Location`, requested again after each failure). Output: `RemoteFile`, a
`Source` that stores nothing on disk. Every response is checked: status, range, length, encoding, ETag, and that the
file is the one that was opened.

The HTTP client is that of huggingface_hub (with its proxies and certificates). The token is sent only to the hub's
own origin.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import PurePath
from typing import Any, Final, TypeVar
from urllib.parse import urljoin, urlsplit

from kimi_gguf.convert.errors import ConvertError, ReadError
from kimi_gguf.convert.source.read_ahead import STOPPED, ReadAhead

ATTEMPTS = 6  # in a row without data
ENOUGH = 64 << 10  # bytes after which the attempts are counted from the start again
FIRST_PAUSE = 1.0  # seconds; doubles with every attempt
LONGEST_PAUSE = 120.0
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 15.0  # without a byte
SLOW_SECONDS = 30.0  # with fewer bytes than `ENOUGH`: counts as silent
REDIRECTS: Final = 5
# Statuses after which another attempt may succeed; after the second ones because a signed URL expires.
PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
EXPIRED: Final = frozenset({401, 403, 404, 410})
_NO_RANGES: Final = (
    "a proxy or mirror may not support ranges: do not use it, or download the checkpoint and give its folder"
)
_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
T = TypeVar("T")


class PassingError(Exception):
    """An error after which another attempt may succeed; `wait` is the pause that the server requires, in seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class Location:
    """The URL of a file at present, and its identity."""

    url: str
    commit: str
    etag: str
    size: int


@dataclass(frozen=True)
class Web:
    """The connection that all files of a checkpoint share."""

    client: Any  # httpx.Client or httpx2.Client, which have the same interface
    failures: type[Exception]  # raised by the client if a connection fails
    hub: str  # the token is sent only to the origin of this URL
    headers: Mapping[str, str]  # for the hub, with the token if there is one
    stopped: threading.Event = field(default_factory=threading.Event)
    _answers: set[Any] = field(default_factory=set)  # being read

    def stop(self) -> None:
        """Stop reading: threads that wait for a connection end."""
        self.stopped.set()
        for answer in list(self._answers):
            with suppress(Exception):  # any kind of connection, and it may be closed already
                answer.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    @contextmanager
    def reading(self, answer: Any) -> Iterator[None]:
        """Within the block `stop` closes the connection of this answer."""
        self._answers.add(answer)
        try:
            self.check_running()
            yield
        finally:
            self._answers.discard(answer)

    def headers_for(self, url: str) -> dict[str, str]:
        """The headers for a request to `url`."""
        if _origin(url) == _origin(self.hub):
            return dict(self.headers)
        return {name: value for name, value in self.headers.items() if name.lower() == "user-agent"}

    def check_running(self) -> None:
        if self.stopped.is_set():
            raise ReadError(STOPPED)

    def persistently(self, what: str, act: Callable[[], T]) -> T:
        """The result of `act`, repeated while it raises `PassingError`. Raises `ReadError` after the last attempt."""
        patience = Patience(self, what)
        while True:
            try:
                return act()
            except PassingError as error:
                patience.failed(error)


class Patience:
    """Counts the attempts in a row without data, and waits between them."""

    def __init__(self, web: Web, what: str) -> None:
        self._web, self._what = web, what
        self._attempts = 0

    def failed(self, error: PassingError, gained: int = 0) -> None:
        """Wait for the next attempt, or raise `ReadError` after the last; this one received `gained` bytes."""
        self._web.check_running()
        self._attempts = 1 if gained >= ENOUGH else self._attempts + 1
        if self._attempts >= ATTEMPTS:
            raise ReadError(
                f"{self._what}: {error}",
                todo=(
                    f"gave up after {self._attempts} attempts without data; check the network, then "
                    "continue with --resume"
                ),
            ) from None
        self._web.stopped.wait(max(error.wait, min(FIRST_PAUSE * 2 ** (self._attempts - 1), LONGEST_PAUSE)))
        self._web.check_running()


class RemoteFile:
    """A `Source` on the web. `locate` requests its location; it raises `PassingError` or `ConvertError`.

    Raises `ReadError` if another run may succeed, `ConvertError` if the file has changed.
    """

    def __init__(
        self, path: PurePath, web: Web, locate: Callable[[], Location], ahead: ReadAhead[RemoteFile]
    ) -> None:
        self.path = path
        self._web = web
        self._locate = locate
        self._ahead = ahead
        self._etags: dict[str, str] = {}  # of the file, by host
        self._opened = web.persistently(str(path), locate)
        self._now: Location | None = self._opened
        self.stamp = (self._opened.commit, self._opened.etag, self._opened.size)

    @property
    def size(self) -> int:
        return self._opened.size

    def read_into(self, buffer: memoryview, offset: int, what: str) -> None:
        if offset + len(buffer) > self.size:
            raise ConvertError(f"{self.path}: {what}: the file ends at byte {self.size}")
        found = self._ahead.take(self, offset, offset + len(buffer))
        buffer[:] = self.fetch(offset, offset + len(buffer)) if found is None else found

    def unchanged(self) -> bool:
        """Sends no request: every answer is checked when it arrives, and a commit does not change."""
        return True

    def close(self) -> None:
        """There is nothing to release."""

    def fetch(self, begin: int, end: int) -> memoryview:
        """The bytes `begin .. end` of the file, over as many connections as necessary."""
        data, done = memoryview(bytearray(end - begin)), 0
        patience = Patience(self._web, str(self.path))
        while done < len(data):
            self._web.check_running()
            before = done
            try:
                for chunk in self._chunks(begin + done, end):
                    data[done : done + len(chunk)] = chunk
                    done += len(chunk)
            except PassingError as error:
                self._now = None
                patience.failed(error, done - before)
        return data

    def _where(self) -> Location:
        if self._now is None:
            self._now = self._locate()
            stamp = (self._now.commit, self._now.etag, self._now.size)
            if stamp != self.stamp:
                raise ConvertError(
                    f"{self.path}: was changed while it was read (commit, ETag, size",
                    expected=self.stamp,
                    found=f"{stamp})",
                    todo="the output would be a mixture: convert the checkpoint again",
                )
        return self._now

    def _chunks(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes `begin .. end` as they arrive from one connection; if fewer arrive, raises `PassingError`."""
        url = self._where().url
        for _ in range(REDIRECTS + 1):
            headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
            try:
                with self._web.client.stream(
                    "GET",
                    url,
                    headers=self._web.headers_for(url) | headers,
                    timeout=_timeout(),
                    follow_redirects=False,
                ) as answer:
                    if not answer.is_redirect:
                        self._check(answer, url, begin, end)
                        with self._web.reading(answer):
                            yield from self._body(answer, end - begin)
                        return
                    url = self._redirected(url, answer.headers.get("Location", ""))
            except self._web.failures as error:
                raise PassingError(f"the connection failed ({reason(error)})") from None
        raise ReadError(self.path, expected=f"at most {REDIRECTS} redirects, the last is to {_host(url)}")

    def _redirected(self, url: str, target: str) -> str:
        try:
            found = urljoin(url, target)
            allowed = urlsplit(found).scheme in {"https", urlsplit(url).scheme}
        except ValueError:
            allowed = False
        if not allowed:
            raise ReadError(f"{self.path}: {_host(url)} redirects to {target!r:.80}", todo="expected https")
        return found

    def _check(self, answer: Any, url: str, begin: int, end: int) -> None:
        """Raise an error unless the answer's headers promise the requested bytes of the file that was opened."""
        status, headers = answer.status_code, answer.headers
        if status in PASSING | EXPIRED:
            raise PassingError(f"{_host(url)} answers {status}", retry_after(headers.get("Retry-After", "")))

        def wrong(what: str, expected: object, found: object) -> ReadError:
            differ = f"expected {expected}, found {found!r:.80}"
            return ReadError(f"{self.path}: {_host(url)}: {what}: {differ}", todo=_NO_RANGES)

        if status != 206:
            raise wrong(f"request for bytes {begin}-{end - 1}", "status 206", status)
        etag = headers.get("ETag", "")
        if etag and self._etags.setdefault(_host(url), etag) != etag:
            raise ConvertError(
                f"{self.path}: was changed while it was read (ETag at {_host(url)}",
                expected=f"{self._etags[_host(url)]:.80}",
                found=f"{etag:.80})",
                todo="the output would be a mixture: convert the checkpoint again",
            )
        content_range = headers.get("Content-Range", "")
        found = _RANGE.fullmatch(content_range)
        if found is None or tuple(map(int, found.groups())) != (begin, end - 1, self.size):
            raise wrong("Content-Range", f"'bytes {begin}-{end - 1}/{self.size}'", content_range)
        if headers.get("Content-Length", str(end - begin)) != str(end - begin):
            raise wrong("Content-Length", end - begin, headers["Content-Length"])
        if headers.get("Content-Encoding", "identity") != "identity":
            raise wrong("Content-Encoding", "none", headers["Content-Encoding"])

    def _body(self, answer: Any, size: int) -> Iterator[bytes]:
        done, marked, since = 0, 0, time.monotonic()
        for chunk in answer.iter_raw():
            self._web.check_running()
            if done + len(chunk) > size:
                raise ReadError(self.path, expected=f"{size} bytes, received more", todo=_NO_RANGES)
            yield chunk
            done += len(chunk)
            if time.monotonic() - since > SLOW_SECONDS:
                if done - marked < ENOUGH:
                    raise PassingError(f"received only {done - marked} bytes in {SLOW_SECONDS:g} s")
                marked, since = done, time.monotonic()
        if done < size:
            raise PassingError(f"the connection ended after {done} of {size} bytes")


def retry_after(text: str) -> float:
    """Seconds of a Retry-After header, which is a number or a date; at most `LONGEST_PAUSE`."""
    seconds = 0.0
    if re.fullmatch(r"\d{1,9}", text.strip(), re.ASCII):
        seconds = float(text)
    elif text:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # not a date, or without a time zone
            seconds = 0.0
    return min(max(seconds, 0.0), LONGEST_PAUSE)


def _timeout() -> Any:
    """(connecting, reading, writing, waiting for a free connection), in seconds."""
    return (CONNECT_SECONDS, SILENT_SECONDS, SILENT_SECONDS, SILENT_SECONDS)


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _host(url: str) -> str:
    """The part of a URL for errors; the rest may contain a signature."""
    return urlsplit(url).netloc.rpartition("@")[2] or "?"


def reason(error: Exception) -> str:
    """An exception in one line."""
    text = str(error).splitlines()
    return f"{type(error).__name__}{f': {text[0]:.100}' if text else ''}"
