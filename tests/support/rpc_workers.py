"""Workers on loopback: processes of ggml-rpc-server that can be stopped, killed and started again on the same port,
and a network that fails.
"""

from __future__ import annotations

import signal
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_server import free_port

from kimi_gguf.engine.builds import Engine

PATIENCE = 60  # seconds, for a busy machine


class RpcWorker:
    """One worker process and its log."""

    def __init__(self, engine: Engine, folder: Path, *options: str, threads: int = 1) -> None:
        self.port = free_port()
        self.log = folder / f"worker-{self.port}.log"
        self._command = [
            str(engine.bin / "ggml-rpc-server"), "--port", str(self.port), "--threads", str(threads), *options
        ]  # fmt: skip
        self.start()

    @property
    def endpoint(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process, and wait until it listens."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + PATIENCE
        while not self._listens():
            assert self.running(), self.log.read_text(errors="replace")
            assert time.monotonic() < end, "the worker does not listen"
            time.sleep(0.02)

    def _listens(self) -> bool:
        """Whether the port is bound. A connection would occupy the worker, which serves one client at a time."""
        hexadecimal = f"0100007F:{self.port:04X}"
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return any(each[1] == hexadecimal and each[3] == "0A" for each in sockets)

    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal; after SIGKILL, wait for the end."""
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()

    def connect(self) -> socket.socket:
        """A connection to the worker."""
        return at_once(socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE))


def at_once(connection: socket.socket) -> socket.socket:
    """Set that each write is sent at once: small ones would wait 40 ms for the acknowledgment of the one before."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    return connection


@contextmanager
def rpc_workers(engine: Engine, folder: Path, count: int, *options: str) -> Iterator[list[RpcWorker]]:
    """Start workers, and end them at the end of the block."""
    workers: list[RpcWorker] = []
    try:
        for _ in range(count):
            workers.append(RpcWorker(engine, folder, *options))
        yield workers
    finally:
        for worker in workers:
            worker.send(signal.SIGKILL)


class Network(socketserver.ThreadingTCPServer):
    """Forwards connections to a worker. When clients have sent a number of bytes, it closes all connections, and new
    ones at once, until it is repaired.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, worker: RpcWorker, fails_after: float) -> None:
        self.worker = worker
        self.starts: list[int] = []  # the bytes sent before each connection
        self.sent = 0
        self.failed = threading.Event()
        self._fails_after = fails_after
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Connection)

    @property
    def endpoint(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.server_address[1]}"

    def repair(self) -> None:
        """Forward everything from now on."""
        self._fails_after = float("inf")
        self.failed.clear()

    def count(self, data: bytes) -> bool:
        """Count bytes that a client sends. Returns whether they are forwarded."""
        with self._lock:
            self.sent += len(data)
            if self.sent >= self._fails_after:
                self.failed.set()
        return not self.failed.is_set()


class _Connection(socketserver.BaseRequestHandler):
    server: Network
    request: socket.socket

    def handle(self) -> None:
        if self.server.failed.is_set():
            return
        self.server.starts.append(self.server.sent)
        at_once(self.request)
        with suppress(OSError), self.server.worker.connect() as worker:
            threading.Thread(target=_answers, args=(worker, self.request), daemon=True).start()
            with suppress(OSError):
                while (data := self.request.recv(1 << 16)) and self.server.count(data):
                    worker.sendall(data)
            worker.shutdown(socket.SHUT_RDWR)  # ends the thread, and the connection with it


def _answers(worker: socket.socket, client: socket.socket) -> None:
    with suppress(OSError):
        while data := worker.recv(1 << 16):
            client.sendall(data)
    with suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


@contextmanager
def network(worker: RpcWorker, fails_after: float = float("inf")) -> Iterator[Network]:
    """A network to the worker. fails_after: bytes sent by clients."""
    with Network(worker, fails_after) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
