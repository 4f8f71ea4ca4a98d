"""A hub and its content network on this machine: the few routes that huggingface_hub uses, and faults on demand.

Input: folders as repositories. Output: two HTTP servers, like the real ones: the hub, which has names and
commits and redirects requests for large files, and the network that has the bytes. Both record all requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_secret_for_the_hub_alone"


@dataclass
class Asked:
    """One request, and the response."""

    server: str  # hub or cdn
    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0  # bytes of content


@dataclass
class Answer:
    """A response before it is sent; a fault changes it."""

    status: int
    headers: dict[str, str]
    content: bytes = b""
    pace: Callable[[bytes], Iterator[bytes]] = lambda content: iter([content])
    length: int | None = None  # the declared Content-Length; default: the correct one


Fault = Callable[[Asked, Answer], Answer]


@dataclass
class FakeHub:
    """Both servers. `files` is (repository, name) -> content; `fault` gets every response before it is sent."""

    files: dict[tuple[str, str], bytes]
    large: Callable[[str], bool] = lambda name: name.endswith(".safetensors")
    fault: Fault = lambda asked, answer: answer
    commit: str = COMMIT
    asked: list[Asked] = field(default_factory=list)
    hub: str = ""
    cdn: str = ""

    def answer(self, asked: Asked) -> Answer:
        return self.fault(asked, self._cdn(asked) if asked.server == "cdn" else self._hub(asked))

    def served(self, server: str = "cdn", suffix: str = "") -> int:
        return sum(a.sent for a in self.asked if a.server == server and a.path.endswith(suffix))

    def _hub(self, asked: Asked) -> Answer:
        parts = [unquote(part) for part in urlsplit(asked.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            repository, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            names = [name for owner, name in self.files if owner == repository]
            if not names:
                return _refused(404, "RepoNotFound")
            if revision not in ("main", self.commit):
                return _refused(404, "RevisionNotFound")
            siblings = [{"rfilename": n, "size": len(self.files[repository, n])} for n in names]
            info = {"id": repository, "modelId": repository, "sha": self.commit, "siblings": siblings}
            return _json(info)
        repository, name = "/".join(parts[:2]), "/".join(parts[4:])
        content = self.files.get((repository, name))
        if len(parts) < 5 or parts[2] != "resolve" or parts[3] != self.commit or content is None:
            return _refused(404, "EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": self.commit, "ETag": etag, "Accept-Ranges": "bytes"}
        if self.large(name):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": etag}
            return Answer(302, headers | {"Location": f"{self.cdn}/{repository}/{name}"})
        return _ranged(asked, headers, content)

    def _cdn(self, asked: Asked) -> Answer:
        parts = urlsplit(asked.path).path.strip("/").split("/")
        content = self.files["/".join(parts[:2]), "/".join(parts[2:])]
        return _ranged(asked, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}, content)


def _ranged(asked: Asked, headers: dict[str, str], content: bytes) -> Answer:
    wanted = asked.headers.get("range", "")
    if not wanted:
        return Answer(200, headers, content)
    begin, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
    headers = headers | {"Content-Range": f"bytes {begin}-{end}/{len(content)}"}
    return Answer(206, headers, content[begin : end + 1])


def _json(value: Any) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _refused(status: int, code: str) -> Answer:
    return Answer(status, {"X-Error-Code": code, "X-Error-Message": code})


@contextmanager
def serving(files: dict[tuple[str, str], bytes]) -> Iterator[FakeHub]:
    """The two servers, until the block ends."""
    hub = FakeHub(files)
    servers = [_server(hub, name) for name in ("hub", "cdn")]
    hub.hub, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def repository(name: str, folder: Path) -> dict[tuple[str, str], bytes]:
    """The files of a folder as a repository."""
    return {(name, file.name): file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def trickle(pieces: int, seconds: float) -> Callable[[bytes], Iterator[bytes]]:
    """This number of bytes one by one, then the rest, each after a pause."""

    def pace(content: bytes) -> Iterator[bytes]:
        for i in range(min(pieces, len(content))):
            time.sleep(seconds)
            yield content[i : i + 1]
        yield content[pieces:]

    return pace


def _server(hub: FakeHub, name: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {key.lower(): value for key, value in self.headers.items()}
            asked = Asked(name, self.command, self.path, headers)
            hub.asked.append(asked)
            answer = hub.answer(asked)
            content = b"" if self.command == "HEAD" else answer.content
            self.send_response(answer.status)
            length = len(answer.content) if answer.length is None else answer.length
            for key, value in (answer.headers | {"Content-Length": str(length)}).items():
                self.send_header(key, value)
            self.end_headers()
            try:
                for piece in answer.pace(content):
                    self.wfile.write(piece)
                    asked.sent += len(piece)
            except OSError:
                self.close_connection = True
            if asked.sent < length and self.command != "HEAD":
                self.close_connection = True

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A reader that disconnected is not an error."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server
