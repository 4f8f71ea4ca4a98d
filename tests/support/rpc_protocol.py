"""The messages of llama.cpp's RPC, for peers that misbehave (ggml-rpc.cpp)."""

from __future__ import annotations

import itertools
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

(
    ALLOC_BUFFER, GET_ALIGNMENT, GET_MAX_SIZE, BUFFER_GET_BASE, FREE_BUFFER, BUFFER_CLEAR, SET_TENSOR, SET_TENSOR_HASH,
    GET_TENSOR, COPY_TENSOR, GRAPH_COMPUTE, GET_DEVICE_MEMORY, INIT_TENSOR, GET_ALLOC_SIZE, HELLO, DEVICE_COUNT,
    GRAPH_RECOMPUTE, MEMSET_TENSOR,
) = range(18)  # fmt: skip
BUILD, SUPPORTS_OP = 0xE0, 0xE1
VERSION = (7, 0, 0)
F32, Q4_0 = 0, 2
FLAG_COMPUTE = 16
OP_ADD, OP_MUL_MAT, OP_MAP_CUSTOM1, OP_KDA_CONV = 2, 29, 92, 101
RECEIVED = 1 << 20  # bytes that a fake worker takes before it reads them
KEEP_ALIVE = b"\xff" * 8

TENSOR = struct.Struct("<QIQ4I4II16ii10QQQQ64si")
assert TENSOR.size == 296


@dataclass
class Tensor:
    """A tensor of a message; the defaults are one F32 value without a buffer."""

    id: int = 1
    type: int = F32
    buffer: int = 0
    ne: tuple[int, int, int, int] = (1, 1, 1, 1)
    nb: tuple[int, int, int, int] = (4, 4, 4, 4)
    op: int = 0
    params: tuple[int, ...] = (0,) * 16
    src: Sequence[int] = field(default_factory=tuple)
    view_src: int = 0
    data: int = 0

    def pack(self) -> bytes:
        """The bytes of rpc_tensor."""
        src = [*self.src, *[0] * (10 - len(self.src))]
        return TENSOR.pack(
            self.id, self.type, self.buffer, *self.ne, *self.nb, self.op, *self.params, FLAG_COMPUTE, *src,
            self.view_src, 0, self.data, b"t", 0,
        )  # fmt: skip


def graph(nodes: Sequence[int], tensors: Sequence[Tensor]) -> bytes:
    """The request of GRAPH_COMPUTE for device 0."""
    packed = b"".join(each.pack() for each in tensors)
    head = struct.pack(f"<II{len(nodes)}Q", 0, len(nodes), *nodes)
    return head + struct.pack("<I", len(tensors)) + packed


class Buffer(NamedTuple):
    """A buffer of a worker."""

    pointer: int
    base: int


class Client:
    """A client that can send anything."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.signs_of_life = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, command: int, request: bytes, size: int | None = None) -> None:
        """Send a command. size: claim this instead of the request's."""
        self.socket.sendall(struct.pack("<BQ", command, len(request) if size is None else size) + request)

    def ask(self, command: int, request: bytes) -> bytes:
        """Send a command and return its answer."""
        self.send(command, request)
        while (size := self._read(8)) == KEEP_ALIVE:
            self.signs_of_life += 1
        return self._read(struct.unpack("<Q", size)[0])

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise ConnectionError("the worker closed the connection")
            data += part
        return data

    def hello(self) -> bytes:
        """The answer to HELLO."""
        return self.ask(HELLO, bytes(24))

    def allocate(self, size: int) -> Buffer:
        """Allocate a buffer on device 0."""
        pointer, _ = struct.unpack("<QQ", self.ask(ALLOC_BUFFER, struct.pack("<IQ", 0, size)))
        (base,) = struct.unpack("<Q", self.ask(BUFFER_GET_BASE, struct.pack("<Q", pointer)))
        return Buffer(pointer, base)

    def devices(self) -> int:
        """The number of devices."""
        return int(struct.unpack("<I", self.ask(DEVICE_COUNT, b""))[0])

    def closed(self) -> bool:
        """Whether the worker closes the connection."""
        with suppress(ConnectionError):
            while self.socket.recv(1 << 16):
                pass
        return True


# command and request -> framed answer, or its parts; None: close the connection
Answer = Callable[[int, bytes], bytes | Iterator[bytes] | None]


def framed(answer: bytes) -> bytes:
    """An answer with its size."""
    return struct.pack("<Q", len(answer)) + answer


class Memory:
    """Answers of a worker that has memory and computes nothing: what is read from it is always the same byte."""

    def __init__(self, byte: int = 0) -> None:
        self._pointers = itertools.count(1)
        self._byte = bytes([byte])

    def __call__(self, command: int, request: bytes) -> bytes | None:
        """The framed answer; empty for commands without one."""
        gib = 1 << 30
        if command == ALLOC_BUFFER:
            return framed(struct.pack("<QQ", next(self._pointers), struct.unpack("<IQ", request)[1]))
        if command == BUFFER_GET_BASE:
            return framed(struct.pack("<Q", struct.unpack("<Q", request)[0] << 40))
        if command == GET_TENSOR:
            return framed(self._byte * struct.unpack("<Q", request[-8:])[0])
        fixed = {
            HELLO: struct.pack("<4B24x", *VERSION, 0),
            DEVICE_COUNT: struct.pack("<I", 1),
            GET_ALIGNMENT: struct.pack("<Q", 64),
            GET_MAX_SIZE: struct.pack("<Q", 64 * gib),
            GET_DEVICE_MEMORY: struct.pack("<QQ", 8 * gib, 8 * gib),
            GET_ALLOC_SIZE: struct.pack("<Q", 0),
            SET_TENSOR_HASH: b"\0",
            COPY_TENSOR: b"\1",
        }
        return framed(fixed[command]) if command in fixed else b""


@contextmanager
def fake_worker(answer: Answer) -> Iterator[str]:
    """A worker on loopback that gives these answers; its endpoint."""

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            with suppress(ConnectionError):
                while head := self.rfile.read(9):
                    command, size = struct.unpack("<BQ", head)
                    answered = answer(command, self.rfile.read(size))
                    if answered is None:
                        return
                    for part in [answered] if isinstance(answered, bytes) else answered:
                        self.wfile.write(part)

    class Listener(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED)
            super().server_bind()

    with Listener(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
