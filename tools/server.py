"""Starts llama-server on a free port of this machine, sends it JSON requests and ends it.

Input: a build, a GGUF, options. Output: answers as dictionaries. The log is a file.
"""

from __future__ import annotations

import json
import random
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kimi_gguf.engine.errors import EngineError

PATIENCE = 300  # seconds until a start or an answer counts as failed; long, for a busy machine


class RunningServer:
    """A running llama-server."""

    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.port = port
        self.log = log
        self.process = process

    def get(self, path: str) -> Any:
        """The JSON answer to a GET request. Raises `urllib.error.HTTPError`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE) as answer:
            return json.load(answer)

    def post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON answer to a POST request with JSON content. Raises `urllib.error.HTTPError`."""
        url, encoded = f"http://127.0.0.1:{self.port}{path}", json.dumps(content).encode()
        request = urllib.request.Request(url, encoded, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            got: dict[str, Any] = json.load(answer)
        return got

    def healthy(self) -> bool:
        """Whether the server has loaded its models."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def free_port() -> int:
    """An unused port below 32768: Linux gives ports from 32768 on to outgoing connections, so none takes this one."""
    while True:
        port = random.randrange(10000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@contextmanager
def running(log: Path, *command: str | Path) -> Iterator[RunningServer]:
    """Start a server by a command with a free port, wait until it is ready, and end it after the block.

    log: the file for its output. Raises `EngineError` with the end of the log if it does not start.
    """
    port = free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*map(str, command), "--port", str(port)], stdout=file, stderr=subprocess.STDOUT
        )
    server = RunningServer(port, log, process)
    try:
        end = time.monotonic() + PATIENCE
        while not server.healthy():
            if process.poll() is not None or time.monotonic() > end:
                todo = f"run it to see the whole log: {shlex.join(map(str, command))}"
                raise EngineError("llama-server did not start", found=last_lines(log), todo=todo)
            time.sleep(0.1)
        yield server
    finally:
        end_server(process, log)


def end_server(process: subprocess.Popen[bytes], log: Path) -> None:
    """End a server. If it does not end within `PATIENCE` seconds, kill it and raise `EngineError`."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise EngineError(
            f"llama-server did not end within {PATIENCE} seconds and was killed",
            found=last_lines(log),
            todo=f"report this with the log: {log}",
        ) from None


def last_lines(log: Path) -> str:
    """The last six lines of a log."""
    return " | ".join(log.read_text(errors="replace").splitlines()[-6:]) or "an empty log"
