"""Malformed messages: a worker closes the connection and serves the next client; a client fails with an error."""

from __future__ import annotations

import dataclasses
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import rpc_protocol as rpc
from llama_script import PlayError, Setup, decode, play, save, text
from random_checkpoint import Spec
from rpc_protocol import Buffer, Client, Memory, Tensor, fake_worker, framed
from rpc_workers import RpcWorker, rpc_workers
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

SIZE = 4096  # bytes of the client's buffer
CHAIN = 200_000  # tensors; a recursive call for each would overflow the stack
MESSAGES = 100  # random ones
SPEC = Spec(layers="KM", heads=2, kda_head_dim=32, seed=3)
LAYERS = len(SPEC.layers) + 1
WIDE = dataclasses.replace(SPEC, intermediate=1 << 15)  # three tensors of 8 MiB: more than sockets buffer


@pytest.fixture(scope="module")
def worker(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RpcWorker]:
    with rpc_workers(engine, tmp_path_factory.mktemp("worker"), 1) as workers:
        yield workers[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("small"), SPEC)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("wide"), WIDE)


def value(buffer: Buffer, number: int = 1, **more: object) -> Tensor:
    """One F32 value in the buffer."""
    fields = {"id": number, "buffer": buffer.pointer, "data": buffer.base + 64 * number, **more}
    return Tensor(**fields)  # type: ignore[arg-type]


def reads(tensor: Tensor, offset: int, size: int) -> bytes:
    return tensor.pack() + struct.pack("<QQ", offset, size)


def writes(tensor: Tensor, offset: int, data: bytes) -> bytes:
    return tensor.pack() + struct.pack("<BQ", 0, offset) + data


def added(buffer: Buffer, *nodes: int, **more: object) -> bytes:
    """A graph whose tensor 3 is the sum of tensors 1 and 2."""
    total = value(buffer, 3, src=(1, 2), **{"op": rpc.OP_ADD, **more})
    return rpc.graph(nodes, [value(buffer, 1), value(buffer, 2), total])


def chain(buffer: Buffer) -> bytes:
    """Each tensor is the source of the one before it in the message."""
    tensors = [value(buffer, 1, id=i, src=(i + 1,), op=1) for i in range(1, CHAIN)]
    return rpc.graph([1], [*tensors, value(buffer, 1, id=CHAIN)])


GARBAGE: dict[str, Callable[[Buffer], tuple[int, bytes] | tuple[int, bytes, int]]] = {
    "the largest size": lambda _: (rpc.GRAPH_COMPUTE, b"", (1 << 64) - 1),
    "an unknown command": lambda _: (77, b""),
    "a tensor before its buffer": lambda b: (rpc.GET_TENSOR, reads(value(b, data=b.base - 64), 0, 4)),
    "a tensor of no type": lambda b: (rpc.GET_TENSOR, reads(value(b, type=1000), 0, 4)),
    "half a block": lambda b: (rpc.INIT_TENSOR, value(b, type=rpc.Q4_0, ne=(16, 1, 1, 1)).pack()),
    "strides that overflow": lambda b: (
        rpc.GET_TENSOR, reads(value(b, ne=((1 << 32) - 1,) * 4, nb=((1 << 32) - 1,) * 4), 0, 4)
    ),
    "a read after its tensor": lambda b: (rpc.GET_TENSOR, reads(value(b), 4, 4)),
    "a write after its tensor": lambda b: (rpc.SET_TENSOR, writes(value(b), 4, bytes(4))),
    "a copy of another layout": lambda b: (
        rpc.COPY_TENSOR, value(b, ne=(8, 1, 1, 1), nb=(4, 32, 32, 32)).pack() + value(b, 2).pack()
    ),
    "a graph without nodes": lambda _: (rpc.GRAPH_COMPUTE, rpc.graph([], [])),
    "a node twice": lambda b: (rpc.GRAPH_COMPUTE, added(b, 3, 3)),
    "an operator without a number": lambda b: (rpc.GRAPH_COMPUTE, added(b, 3, op=9999)),
    "the address of a function": lambda b: (
        rpc.GRAPH_COMPUTE, added(b, 3, op=rpc.OP_MAP_CUSTOM1, params=(1,) * 16)
    ),
    "an operator of another build": lambda b: (rpc.GRAPH_COMPUTE, added(b, 3, op=rpc.OP_KDA_CONV)),
    "a chain of sources": lambda b: (rpc.GRAPH_COMPUTE, chain(b)),
    "a question about operators": lambda b: (rpc.SUPPORTS_OP, bytes(4) + bytes(11 * rpc.TENSOR.size)),
}  # fmt: skip


def connect(worker: RpcWorker) -> Client:
    client = Client(worker.connect())
    client.hello()
    return client


def assert_serves(worker: RpcWorker) -> None:
    """The next client is served: a sum is computed."""
    with connect(worker) as client:
        assert client.devices() == 1
        buffer = client.allocate(SIZE)
        for number in (1, 2):
            client.send(rpc.SET_TENSOR, writes(value(buffer, number), 0, struct.pack("<f", number)))
        client.send(rpc.GRAPH_COMPUTE, added(buffer, 3))
        assert client.ask(rpc.GET_TENSOR, reads(value(buffer, 3), 0, 4)) == struct.pack("<f", 3)


@pytest.mark.parametrize("message", GARBAGE.values(), ids=list(GARBAGE))
def test_a_worker_closes_the_connection(
    message: Callable[[Buffer], tuple[int, bytes]], worker: RpcWorker
) -> None:
    with connect(worker) as client:
        sent = message(client.allocate(SIZE))
        client.send(*sent)
        if len(sent) == 3:  # the worker waits for the rest of the message
            client.socket.shutdown(socket.SHUT_WR)
        assert client.closed()
    assert_serves(worker)


def test_a_worker_survives_random_messages(worker: RpcWorker) -> None:
    """Messages of valid and invalid sizes. Graphs are left out, because their operators are not checked."""
    chance = random.Random(5)
    for _ in range(MESSAGES):
        command = chance.choice([each for each in range(18) if each not in (rpc.HELLO, rpc.GRAPH_COMPUTE)])
        size = chance.choice([0, 4, 8, 12, 16, 296, 304, 312, 313, 592, 4 + 11 * 296])
        request = bytearray(chance.randbytes(size))
        with connect(worker) as client:
            buffer = client.allocate(SIZE)
            if size >= rpc.TENSOR.size:
                request[: rpc.TENSOR.size] = value(buffer, chance.randrange(1, 60)).pack()
                for _ in range(chance.randrange(4)):
                    request[chance.randrange(rpc.TENSOR.size)] = chance.randrange(256)
            client.send(command, bytes(request))
            with suppress(OSError):  # it is closed already
                client.socket.shutdown(socket.SHUT_WR)
            assert client.closed()
    assert_serves(worker)


def test_a_worker_survives_clients_that_do_not_read(worker: RpcWorker) -> None:
    """They send requests and disconnect before the answers."""
    for _ in range(20):
        with connect(worker) as client:
            for _ in range(50):
                client.send(rpc.DEVICE_COUNT, b"")
            reset = struct.pack("ii", 1, 0)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    assert_serves(worker)


def test_a_silent_client_does_not_occupy_a_worker(worker: RpcWorker) -> None:
    with worker.connect():
        began = time.monotonic()
        assert_serves(worker)
    assert time.monotonic() - began < 20


def test_the_announcement_of_a_build_is_invisible_to_upstream(worker: RpcWorker) -> None:
    """An upstream client checks the version, ignores the fourth byte and never sends BUILD or SUPPORTS_OP."""
    with Client(worker.connect()) as client:
        answer = client.hello()
        assert tuple(answer[:4]) == (*rpc.VERSION, 1)
        assert len(answer) == 28
        # another build gets an answer, and no operators
        assert len(client.ask(rpc.BUILD, b"0" * 64)) == 64
        client.send(rpc.GRAPH_COMPUTE, added(client.allocate(SIZE), 3, op=rpc.OP_KDA_CONV))
        assert client.closed()
    assert_serves(worker)


def test_a_worker_gives_signs_of_life_while_it_computes(worker: RpcWorker) -> None:
    """Keep-alive messages are sent only to clients that have sent BUILD."""
    side = 2048  # of a matrix
    square = {"ne": (side, side, 1, 1), "nb": (4, 4 * side, 4 * side * side, 4 * side * side)}
    for announced in (False, True):
        with connect(worker) as client:
            if announced:
                client.ask(rpc.BUILD, b"0" * 64)
            buffer = client.allocate(3 * 4 * side * side)
            sources = [value(buffer, i, data=buffer.base + i * 4 * side * side, **square) for i in (1, 2)]
            results = [
                value(buffer, i, data=buffer.base, op=rpc.OP_MUL_MAT, src=(1, 2), **square)
                for i in range(3, 15)
            ]
            client.send(rpc.GRAPH_COMPUTE, rpc.graph([each.id for each in results], [*sources, *results]))
            client.ask(rpc.GET_TENSOR, reads(value(buffer, data=buffer.base), 0, 4))
            assert (client.signs_of_life > 0) == announced


def replaced(command: int, answer: bytes | None) -> rpc.Answer:
    """The answers of a worker that gives `answer` to one command, and valid answers to the others."""
    honest = Memory()
    return lambda asked, request: answer if asked == command else honest(asked, request)


def number(value: int) -> bytes:
    return framed(struct.pack("<Q", value))


LIES = {
    "another protocol": (rpc.HELLO, framed(struct.pack("<4B24x", 9, 0, 0, 0))),
    "an announcement without an answer": (rpc.HELLO, framed(struct.pack("<4B24x", 7, 0, 0, 1))),
    "an endless answer": (rpc.DEVICE_COUNT, struct.pack("<Q", 1 << 63)),
    "no answer": (rpc.DEVICE_COUNT, None),
    "no device": (rpc.DEVICE_COUNT, framed(bytes(4))),
    "alignment 0": (rpc.GET_ALIGNMENT, number(0)),
    "buffers of 0 bytes": (rpc.GET_MAX_SIZE, number(0)),
    "too little memory": (rpc.ALLOC_BUFFER, framed(struct.pack("<QQ", 1, 64))),
    "a buffer at 0": (rpc.BUFFER_GET_BASE, number(0)),
    "a buffer at the end of memory": (rpc.BUFFER_GET_BASE, number((1 << 64) - 64)),
    "endless tensors": (rpc.GET_ALLOC_SIZE, number((1 << 64) - 1)),
    "half a tensor": (rpc.GET_TENSOR, struct.pack("<Q", 1 << 62) + b"abc"),
    "something without a request": (rpc.GRAPH_COMPUTE, b"\0" * 64),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=list(LIES))
def test_a_client_fails_with_an_error(
    lie: tuple[int, bytes | None], engine: Engine, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_OPS", "")
    monkeypatch.setenv("GGML_RPC_DEADLINE", "1")
    with fake_worker(replaced(*lie)) as endpoint, pytest.raises(PlayError) as caught:
        play(engine, small, Setup(workers=(endpoint,), n_gpu_layers=LAYERS), [decode(*text(0, range(8)))])
    assert "was ended by" not in str(caught.value).splitlines()[0]


def test_a_client_survives_wrong_results(
    engine: Engine, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_OPS", "")
    with fake_worker(Memory(0xFF)) as endpoint:  # NaN
        for layers in (LAYERS, 1):
            setup = Setup(workers=(endpoint,), n_gpu_layers=layers)
            play(engine, small, setup, [decode(*text(0, range(8)))])


def test_a_state_that_cannot_be_read_is_not_saved(
    engine: Engine, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker goes when the first tensor of the state is read."""
    monkeypatch.setenv("KIMI_OPS", "")
    steps = [decode(*text(0, range(8)), wanted=[]), save(0, tmp_path / "state")]
    reason = "the state of sequence 0 cannot be saved"
    with fake_worker(replaced(rpc.GET_TENSOR, None)) as endpoint, pytest.raises(PlayError, match=reason):
        play(engine, small, Setup(workers=(endpoint,), n_gpu_layers=LAYERS), steps)


def busy_worker(busy: int, signs: int) -> Callable[[int, bytes], Iterator[bytes]]:
    """A worker that gives so many signs of life, every 0.5 s, when it has received this command for the first time, and
    does not read meanwhile."""
    honest = Memory()
    waiting = iter(range(signs))

    def answer(command: int, request: bytes) -> Iterator[bytes]:
        if command == rpc.HELLO:
            yield framed(struct.pack("<4B24x", *rpc.VERSION, 1))
        elif command == rpc.BUILD:
            yield framed(bytes(64))
        else:
            if command == busy:
                for _ in waiting:
                    time.sleep(0.5)
                    yield rpc.KEEP_ALIVE
            yield honest(command, request) or b""

    return answer


@pytest.mark.parametrize("busy", [rpc.SET_TENSOR, rpc.GET_TENSOR], ids=["while sending", "while receiving"])
def test_a_client_waits_for_a_worker_that_gives_signs_of_life(
    busy: int, engine: Engine, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is busy for longer than the deadline."""
    monkeypatch.setenv("KIMI_OPS", "")
    monkeypatch.setenv("GGML_RPC_DEADLINE", "2")
    with fake_worker(busy_worker(busy, 6)) as endpoint:
        play(engine, wide, Setup(workers=(endpoint,), n_gpu_layers=LAYERS), [decode(*text(0, range(8)))])


@pytest.mark.parametrize("said", [b"", b"\0" * 8], ids=["nothing", "garbage"])
def test_a_client_does_not_wait_for_a_worker_that_is_silent(
    said: bytes, engine: Engine, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gave signs of life, and stopped reading and giving them."""
    given = busy_worker(rpc.SET_TENSOR, 4)

    def answer(command: int, request: bytes) -> Iterator[bytes]:
        yield from given(command, request)
        if command == rpc.SET_TENSOR:
            yield said
            time.sleep(30)

    monkeypatch.setenv("KIMI_OPS", "")
    monkeypatch.setenv("GGML_RPC_DEADLINE", "2")
    reason = "it sent something without a request" if said else "no progress in sending for 2 s"
    began = time.monotonic()
    with fake_worker(answer) as endpoint, pytest.raises(PlayError, match=reason):
        play(engine, wide, Setup(workers=(endpoint,), n_gpu_layers=LAYERS), [decode(*text(0, range(8)))])
    assert time.monotonic() - began < 25
