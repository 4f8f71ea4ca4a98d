"""Workers on loopback: processes of ggml-rpc-server that can be stopped, killed and started again on the same port."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)


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
