"""Starts a llama-server, sends it requests, and reads from its debug log which tokens it evaluated.

Input: a build of llama.cpp, a GGUF and options. Output: answers as token ids, and an `Account` of the work.

cpp-httplib closes a connection on which no request arrives for 5 seconds, without an answer. On a busy machine
this happens between a client's connect and its first byte, so the client repeats such a request. A check at the
end shows that the server did not process both.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.server import PATIENCE, RunningServer, end_server, free_port

ATTEMPTS = 3  # times that a request is sent
BUSY = 60  # seconds that a request may take on a busy machine
ENDING = 1  # seconds between closing a process's connections and its exit
EXACT = ("--flash-attn", "on", "-ctk", "f32", "-ctv", "f32", "--threads", "1", "--verbosity", "5")


@dataclass(frozen=True)
class Account:
    """The tokens that the target model evaluated after the prompts, according to the server's debug log."""

    tokens: int
    batches: int
    restored: int  # checkpoints that were restored to verify accepted tokens again


@dataclass(frozen=True)
class Answer:
    """One completion with its timings."""

    ids: tuple[int, ...]
    timings: Mapping[str, Any]  # the server's own: predicted_n, draft_n, draft_n_accepted, cache_n, ...


class Server(RunningServer):
    """A running llama-server."""

    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        super().__init__(port, log, process)
        self._answered: list[str] = []  # paths of the requests; appended to by several threads

    def complete(self, prompt: str | Sequence[int], count: int, **more: Any) -> Answer:
        """`count` tokens after a prompt, each the most likely one."""
        request = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True}
        request |= {"ignore_eos": True, "cache_prompt": False} | more
        got = self.post("/completion", request)
        return Answer(tuple(got["tokens"]), got["timings"])

    def complete_together(self, prompts: Sequence[str], count: int) -> list[Answer]:
        """The same for several prompts at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, count), prompts))

    def post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a JSON request, which is repeated if the server closed the connection."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                got = super().post(path, content)
                break
            except urllib.error.HTTPError:
                self._answered.append(path)
                raise
            except OSError as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                self.check_runs(ENDING)
                if attempt == ATTEMPTS or not isinstance(reason, ConnectionResetError | BrokenPipeError):
                    raise
        self._answered.append(path)
        return got

    def slot(self, action: str, file: str = "slot.bin") -> None:
        """Save or restore slot 0; raises `HTTPError` if the server refuses."""
        self.post(f"/slots/0?action={action}", {"filename": file})

    def metric(self, name: str) -> float:
        """A counter of the server, which needs the option --metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE) as answer:
            (value,) = re.findall(rf"^llamacpp:{name} (\S+)$", answer.read().decode(), re.MULTILINE)
        return float(value)

    def check_runs(self, wait: float = 0) -> None:
        """Fail with the end of the log if the process has ended, or ends within `wait` seconds."""
        try:
            status = self.process.wait(wait)
        except subprocess.TimeoutExpired:
            return
        raise AssertionError(f"the server ended with status {status}:\n{self._end_of_log()}")

    def check_requests(self) -> None:
        """Fail if the server processed more requests than it answered: one of them was repeated."""
        started = self.log.read_text(errors="replace").count("processing task, is_child = 0")
        answered = len(self._answered)
        assert started <= answered, f"{started} requests for {answered} answers\n{self._end_of_log()}"

    def _end_of_log(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def account(self, requests: int) -> Account:
        """The work for this number of requests, once the log has all of them."""
        end = time.monotonic() + PATIENCE
        while (text := self.log.read_text(errors="replace")).count("stop processing: n_tokens") < requests:
            assert time.monotonic() < end, "the log lacks the end of a request"
            time.sleep(0.05)
        drafts = [int(size) for size in re.findall(r"generate_draft: .*#draft=(\d+)", text)]
        drafts += [0] * len(re.findall(r"slot decode token, id=", text))
        restored = len(re.findall(r"restoring speculative checkpoint", text))
        return Account(sum(1 + size for size in drafts), len(drafts), restored)


def ask(
    server: RunningServer,
    method: str,
    path: str,
    content: Mapping[str, Any] | None = None,
    patience: float = BUSY,
) -> tuple[int, str]:
    """Status and body of the answer to one request, also if it is an error; within `patience` seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=patience)
    connection.request(method, path, content and json.dumps(content), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def wait_for_slots(server: RunningServer, count: int) -> None:
    """Wait until this number of slots processes a request."""
    end = time.monotonic() + BUSY
    while sum(slot["is_processing"] for slot in json.loads(ask(server, "GET", "/slots")[1])) < count:
        assert time.monotonic() < end
        time.sleep(0.05)


def serving(engine: Engine, folder: Path, gguf: Path, *options: str) -> AbstractContextManager[Server]:
    """A llama-server with an F32 cache on one thread."""
    return started(folder, engine.bin / "llama-server", "--model", gguf, *EXACT, *options)


@contextmanager
def started(folder: Path, *command: str | Path) -> Iterator[Server]:
    """Start the server with the command on a free port, and wait until it is ready; its log is a file in `folder`."""
    port, path = free_port(), folder / "server.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [*map(str, command), "--port", str(port)], stdout=log, stderr=subprocess.STDOUT
        )
    server = Server(port, path, process)
    try:
        end = time.monotonic() + PATIENCE
        while not server.healthy():
            server.check_runs()
            assert time.monotonic() < end, "the server does not come up"
            time.sleep(0.1)
        yield server
        server.check_runs()
    finally:
        end_server(process, path)
    server.check_requests()
