"""0066-server-signals: SIGTERM and Ctrl-C end the server at any instant, whatever its clients do."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from llama_server import BUSY, ask, wait_for_slots
from native_program import compile_shim

from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.server import RunningServer, free_port, running

pytestmark = pytest.mark.engine

PLACES = ("sigaction", "pthread_cond_broadcast")
preloads = pytest.mark.skipif(sys.platform != "linux", reason="sends the signal through LD_PRELOAD")
ENDLESS = {"n_predict": 10**6, "max_tokens": 10**6, "ignore_eos": True}
REQUESTS: dict[str, dict[str, object]] = {
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


def status_if_interrupted(
    place: str, engine: Engine, gguf: Path, folder: Path, patience: float
) -> int | None:
    """The exit status of a server whose main thread gets SIGTERM at a place of signal_at.c; None if it does not end.

    patience: how many seconds to wait for the answer, and then for the end.
    """
    shim, port = compile_shim("signal_at.c", folder), free_port()
    command = [engine.bin / "llama-server", "--model", gguf, "--threads", "1", "--port", str(port)]
    with (folder / "server.log").open("wb") as log:
        variables = {"LD_PRELOAD": str(shim), "SIGNAL_AT": place}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables)
    server = RunningServer(port, folder / "server.log", process)
    try:
        while process.poll() is None and not server.healthy():
            time.sleep(0.1)
        with suppress(OSError):  # it may have ended, or end during the request
            ask(server, "POST", "/completion", REQUESTS["/completion"] | {"n_predict": 2}, patience)
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()
        process.wait()


@preloads
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_at_the_worst_instant(
    place: str, tmp_path: Path, engine: Engine, demo_gguf: Callable[[str], Path]
) -> None:
    assert status_if_interrupted(place, engine, demo_gguf("Q8_0"), tmp_path, BUSY) == 0
    assert ("processing task" in (tmp_path / "server.log").read_text()) == (place != "sigaction")
