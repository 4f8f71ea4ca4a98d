"""0066-server-ends-with-requests: SIGTERM and Ctrl-C end the server while it answers, whatever its clients do."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kimi_gguf.bench.server import RunningServer, running
from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

PATIENCE = 60  # seconds, for a busy machine
ENDLESS = {"n_predict": 10**6, "max_tokens": 10**6, "ignore_eos": True}
REQUESTS = {
    "/completion": {"prompt": "define: river\n"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "define: river"}]},
}


def ask(server: RunningServer, path: str) -> tuple[int, str]:
    """Status and body of the answer to a request that waits for the whole answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=2 * PATIENCE)
    connection.request(
        "POST", path, json.dumps(REQUESTS[path] | ENDLESS), {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def wait_for_tokens(server: RunningServer, count: int) -> None:
    """Wait until this number of requests is being answered."""
    end = time.monotonic() + PATIENCE
    while sum(slot["is_processing"] for slot in server.get("/slots")) < count:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clients_that_wait_get_503(
    number: signal.Signals, tmp_path: Path, engine: Engine, demo_gguf: Callable[[str], Path]
) -> None:
    command = (engine.bin / "llama-server", "--model", demo_gguf("Q8_0"), "-np", "2", "--threads", "1")
    with running(tmp_path / "server.log", *command) as server, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, server, path) for path in REQUESTS]
        wait_for_tokens(server, len(answers))
        server.process.send_signal(number)
        assert server.process.wait(PATIENCE) == 0
        for answer in answers:
            status, body = answer.result()
            assert status == 503 and "the server is stopping" in body
