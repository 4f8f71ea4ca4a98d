"""The client of the server tests: it repeats a lost request, and never hides a failure of the server."""

from __future__ import annotations

import sys
from http.client import RemoteDisconnected
from pathlib import Path

import pytest
from llama_server import Server, started

# A server that closes the first connections that request a completion. The first argument is their number. The second
# says what it does before: nothing (closes), logs that it works on the request (starts), or exits (ends).
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

losses, fault = int(sys.argv[1]), sys.argv[2]

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        global losses
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        lost, losses = losses > 0, losses - 1
        if lost and fault == "ends":
            print("out of memory", flush=True)
            os._exit(3)
        if not lost or fault == "starts":
            print("slot launch_slot_: processing task, is_child = 0", flush=True)
        if lost:
            self.close_connection = True
        else:
            self.answer({"tokens": [len(prompt)], "timings": {}})

    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def ids(server: Server) -> list[tuple[int, ...]]:
    return [answer.ids for answer in server.complete_together(["a", "bb", "ccc"], 1)]


@pytest.mark.parametrize("losses", [1, 2])
def test_a_request_that_the_server_did_not_read_is_sent_again(tmp_path: Path, losses: int) -> None:
    with started(tmp_path, sys.executable, "-c", SERVER, str(losses), "closes") as server:
        assert ids(server) == [(1,), (2,), (3,)]


def test_a_request_is_sent_three_times_at_most(tmp_path: Path) -> None:
    with started(tmp_path, sys.executable, "-c", SERVER, "3", "closes") as server:
        with pytest.raises(RemoteDisconnected):
            server.complete("a", 1)
        assert server.complete("a", 1).ids == (1,)


def test_a_request_that_the_server_worked_on_twice_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="2 requests for 1 answers"),
        started(tmp_path, sys.executable, "-c", SERVER, "1", "starts") as server,
    ):
        assert server.complete("a", 1).ids == (1,)


def test_a_server_that_ended_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="ended with status 3:\nout of memory"),
        started(tmp_path, sys.executable, "-c", SERVER, "1", "ends") as server,
    ):
        server.complete("a", 1)
