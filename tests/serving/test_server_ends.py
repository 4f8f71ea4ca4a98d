"""0066-server-ends-with-requests: SIGTERM and Ctrl-C end the server while it answers, whatever its clients do."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from llama_server import BUSY, ask, wait_for_slots

from kimi_gguf.bench.server import running
from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

ENDLESS = {"n_predict": 10**6, "max_tokens": 10**6, "ignore_eos": True}
REQUESTS = {
    "/completion": {"prompt": "define: river\n"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "define: river"}]},
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clients_that_wait_get_503(
    number: signal.Signals, tmp_path: Path, engine: Engine, demo_gguf: Callable[[str], Path]
) -> None:
    command = (engine.bin / "llama-server", "--model", demo_gguf("Q8_0"), "-np", "2", "--threads", "1")
    with running(tmp_path / "server.log", *command) as server, ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(ask, server, "POST", path, request | ENDLESS) for path, request in REQUESTS.items()
        ]
        wait_for_slots(server, len(answers))
        server.process.send_signal(number)
        assert server.process.wait(BUSY) == 0
        for answer in answers:
            status, body = answer.result()
            assert status == 503 and "the server is stopping" in body
