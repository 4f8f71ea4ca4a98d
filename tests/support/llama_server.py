"""A llama-server on the demo: started, asked over HTTP, and its debug log read for what it evaluated.

Flows in: a build of llama.cpp, a GGUF and options. Flows out: answers as token ids, and an `Account` of the work.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.engine.builds import Engine

PATIENCE = 300  # seconds, for a busy machine
EXACT = ("--flash-attn", "on", "-ctk", "f32", "-ctv", "f32", "--threads", "1", "--verbosity", "5")


@dataclass(frozen=True)
class Account:
    """What the target model evaluated behind the prompts, by the server's debug log."""

    tokens: int
    batches: int
    restored: int  # checkpoints put back to verify accepted tokens again


@dataclass(frozen=True)
class Answer:
    """One completion."""

    ids: tuple[int, ...]
    timings: Mapping[str, Any]  # the server's own: predicted_n, draft_n, draft_n_accepted, cache_n, ...


class Server:
    """A running llama-server."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self.log = log

    def complete(self, prompt: str, count: int, **more: Any) -> Answer:
        """`count` tokens behind a prompt, always the most likely one."""
        request = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True}
        request |= {"ignore_eos": True, "cache_prompt": False} | more
        got = self.post("/completion", request)
        return Answer(tuple(got["tokens"]), got["timings"])

    def complete_together(self, prompts: Sequence[str], count: int) -> list[Answer]:
        """The same for several prompts at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, count), prompts))

    def post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a JSON request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            got: dict[str, Any] = json.load(answer)
        return got

    def healthy(self) -> bool:
        """Whether it has loaded its models."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def account(self, requests: int) -> Account:
        """The work done for this many requests, once the log's thread has told of all of them."""
        end = time.monotonic() + PATIENCE
        while (text := self.log.read_text(errors="replace")).count("stop processing: n_tokens") < requests:
            assert time.monotonic() < end, "the log does not end"
            time.sleep(0.05)
        drafts = [int(size) for size in re.findall(r"generate_draft: .*#draft=(\d+)", text)]
        drafts += [0] * len(re.findall(r"slot decode token, id=", text))
        restored = len(re.findall(r"restoring speculative checkpoint", text))
        return Account(sum(1 + size for size in drafts), len(drafts), restored)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def serving(engine: Engine, folder: Path, gguf: Path, *options: str) -> AbstractContextManager[Server]:
    """A llama-server with an F32 cache on one thread."""
    return started(folder, engine.bin / "llama-server", "--model", gguf, *EXACT, *options)


@contextmanager
def started(folder: Path, *command: str | Path) -> Iterator[Server]:
    """What the command starts, ready to be asked, on a port of its own; its log goes to a file in `folder`."""
    server = Server(free_port(), folder / "server.log")
    words = [*map(str, command), "--port", str(server.port)]
    with server.log.open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + PATIENCE
        while not server.healthy():
            assert process.poll() is None, server.log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < end, "the server does not come up"
            time.sleep(0.1)
        yield server
        assert process.poll() is None, server.log.read_text(errors="replace")[-2000:]
    finally:
        process.terminate()
        process.wait()
