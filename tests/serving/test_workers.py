"""More than one machine: equal answers, operators on workers of the same build only, and workers that end or hang.

`KIMI_KILLS=200` kills workers 200 times at random moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from llama_script import PlayError, Setup, assert_same, decode, play, text
from llama_server import EXACT, Server, ask, free_port, serving, wait_for_slots
from random_checkpoint import VOCAB_SIZE, Spec
from rpc_workers import RpcWorker, network, rpc_workers
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine

pytestmark = pytest.mark.engine

PROMPT = "define: elephant\nThe largest living land animal, with a trunk and two tusks of ivory.\n"
COUNT = 24
DEADLINE = 2  # seconds
KILLS = int(os.environ.get("KIMI_KILLS", "4"))
RECOVERY = 60  # seconds, for a busy machine
SPEC = Spec(layers="KKMK", heads=4, kda_head_dim=64, seed=40)
ALL = len(SPEC.layers) + 1
IDS = np.random.default_rng(41).integers(0, VOCAB_SIZE, 220)
PREFILLED = 180  # LATENT_ATTN starts at 160 with this model
SAME_BUILD = "is this build: it runs the operators"
UPSTREAM_BUILD = "is an upstream build: it runs upstream's graph"


@pytest.fixture(scope="module")
def gguf(demo_gguf: Callable[[str], Path]) -> Path:
    return demo_gguf("F32")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return make_gguf(folder, SPEC)


def listed(workers: Sequence[RpcWorker]) -> str:
    return ",".join(worker.endpoint for worker in workers)


def endless(server: Server, stream: bool = False) -> tuple[int, str]:
    """A request that takes longer than any test, unless it fails."""
    request = {"prompt": PROMPT, "n_predict": 10**6, "temperature": 0, "ignore_eos": True, "stream": stream}
    return ask(server, "POST", "/completion", request)


def wait_for_tokens(server: Server) -> None:
    """Wait until an answer is being generated."""
    wait_for_slots(server, 1)
    time.sleep(0.3)


def wait_until_healthy(server: Server) -> None:
    end = time.monotonic() + RECOVERY
    while not server.healthy():
        server.check_runs()
        assert time.monotonic() < end, "the server does not recover"
        time.sleep(0.1)


def assert_unavailable(server: Server, reason: str) -> None:
    """Every request gets 503 and the reason, until the model is loaded again."""
    completion = {"prompt": PROMPT, "n_predict": 1}
    for method, path, content in (
        ("GET", "/health", None),
        ("GET", "/metrics", None),
        ("POST", "/completion", completion),
        ("POST", "/tokenize", {"content": "a"}),
    ):
        status, body = ask(server, method, path, content)
        assert status == 503, (path, body)
        assert reason in body
    server.check_runs()


@pytest.mark.parametrize("count", [1, 3])
def test_logits_have_the_same_bits(count: int, engine: Engine, small: Path, tmp_path: Path) -> None:
    """Prompt, and token by token; the output and all layers are on the workers."""
    steps = [decode(*text(0, IDS[:PREFILLED]))]
    steps += [decode((0, i, int(IDS[i]))) for i in range(PREFILLED, len(IDS))]
    local = play(engine, small, Setup(flash_attention=True), steps)
    with rpc_workers(engine, tmp_path, count) as workers:
        endpoints = tuple(worker.endpoint for worker in workers)
        setup = Setup(flash_attention=True, workers=endpoints, n_gpu_layers=ALL)
        remote = play(engine, small, setup, steps)
    assert remote.log.count(SAME_BUILD) == count
    assert "kda: operators in use" in remote.log
    assert "stays absorbed" not in remote.log
    assert np.array_equal(remote.logits, local.logits)


def test_a_killed_worker(engine: Engine, gguf: Path, tmp_path: Path) -> None:
    """Requests in flight and later ones fail with 503; the server recovers when the worker is back."""
    with (
        rpc_workers(engine, tmp_path, 2) as workers,
        serving(
            engine, tmp_path, gguf, "--rpc", listed(workers), "-np", "2", "--slots", "--metrics"
        ) as server,
        ThreadPoolExecutor() as pool,
    ):
        server.check_requests = lambda: None  # type: ignore[method-assign]  # failed requests are not counted
        expected = server.complete(PROMPT, COUNT).ids
        streams = (False, True, True)  # one more than there are slots
        waiting = [pool.submit(endless, server, stream) for stream in streams]
        wait_for_tokens(server)
        workers[1].send(signal.SIGKILL)
        reason = f"{workers[1].endpoint} is lost"
        for stream, request in zip(streams, waiting, strict=True):
            status, body = request.result(RECOVERY)
            assert status == (200 if stream and '"content"' in body else 503)
            assert '"code":503' in body and reason in body
        assert_unavailable(server, reason)
        workers[1].start()
        wait_until_healthy(server)
        assert server.complete(PROMPT, COUNT).ids == expected


def test_a_worker_that_dies_while_nobody_asks(engine: Engine, gguf: Path, tmp_path: Path) -> None:
    with (
        rpc_workers(engine, tmp_path, 1) as workers,
        serving(engine, tmp_path, gguf, "--rpc", listed(workers)) as server,
    ):
        workers[0].send(signal.SIGKILL)
        end = time.monotonic() + 10
        while server.healthy():
            assert time.monotonic() < end, "the server does not notice that the worker has ended"
            time.sleep(0.1)
        workers[0].start()
        wait_until_healthy(server)
        assert server.complete(PROMPT, COUNT).ids


def test_a_worker_that_hangs(
    engine: Engine, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGML_RPC_DEADLINE", str(DEADLINE))
    with (
        rpc_workers(engine, tmp_path, 2) as workers,
        serving(engine, tmp_path, gguf, "--rpc", listed(workers), "--slots", "--metrics") as server,
        ThreadPoolExecutor() as pool,
    ):
        server.check_requests = lambda: None  # type: ignore[method-assign]
        expected = server.complete(PROMPT, COUNT).ids
        waiting = pool.submit(endless, server)
        wait_for_tokens(server)
        workers[0].send(signal.SIGSTOP)
        began = time.monotonic()
        status, body = waiting.result(RECOVERY)
        assert status == 503
        assert f"no progress in receiving for {DEADLINE} s" in body
        assert DEADLINE - 1 < time.monotonic() - began < DEADLINE + 10
        assert_unavailable(server, f"{workers[0].endpoint} is lost")
        workers[0].send(signal.SIGCONT)
        wait_until_healthy(server)
        assert server.complete(PROMPT, COUNT).ids == expected


def test_a_server_that_ends_after_its_worker_saves_no_prompts(
    engine: Engine, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of its slot cannot be read any more. The files of the server before are left as they are."""
    monkeypatch.setenv("GGML_RPC_DEADLINE", str(DEADLINE))
    kept = tmp_path / "kept"
    kept.mkdir()

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in kept.iterdir()}

    with rpc_workers(engine, tmp_path, 1) as workers:
        options = ("--rpc", listed(workers), "-np", "1", "--slot-save-path", f"{kept}/", "--keep-slots")
        with serving(engine, tmp_path, gguf, *options) as server:
            server.complete(PROMPT, COUNT, cache_prompt=True)
        before = files()
        assert before
        with serving(engine, tmp_path, gguf, *options) as server:
            expected = server.complete("define: river\n", COUNT, cache_prompt=True).ids
            workers[0].send(signal.SIGSTOP)
            server.process.terminate()
            server.process.wait(RECOVERY)
            server.check_runs = lambda *_: None  # type: ignore[method-assign]
        assert files() == before
        assert "prompts are not saved" in server.log.read_text(errors="replace")
        workers[0].send(signal.SIGCONT)
        with serving(engine, tmp_path, gguf, *options) as server:
            assert server.complete("define: river\n", COUNT, cache_prompt=True).ids == expected


def test_an_upstream_worker_runs_upstreams_graph(
    engine: Engine, upstream: Engine, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [decode(*text(0, IDS[:PREFILLED])), decode((0, PREFILLED, 7))]
    local = play(engine, small, Setup(flash_attention=True), steps)
    with rpc_workers(upstream, tmp_path, 1) as workers:
        setup = Setup(flash_attention=True, workers=(workers[0].endpoint,), n_gpu_layers=ALL)
        with pytest.raises(PlayError, match="KIMI_OPS=require: KDA operators cannot be used: RPC0"):
            play(engine, small, setup, steps)
        monkeypatch.setenv("KIMI_OPS", "")
        remote = play(engine, small, setup, steps)
    assert remote.log.count(f"{workers[0].endpoint} {UPSTREAM_BUILD}") == 1
    assert "kda: operators not used, upstream's graph instead: RPC0" in remote.log
    assert "latent attention: layer 2 stays absorbed in large batches: RPC0" in remote.log
    assert_same(remote.logits, local.logits)


def test_an_upstream_client_uses_our_worker(
    engine: Engine, upstream: Engine, small: Path, tmp_path: Path
) -> None:
    steps = [decode(*text(0, IDS[:PREFILLED])), decode((0, PREFILLED, 7))]
    local = play(upstream, small, Setup(), steps)
    with rpc_workers(engine, tmp_path, 1) as workers:
        remote = play(upstream, small, Setup(workers=(workers[0].endpoint,), n_gpu_layers=ALL), steps)
        assert workers[0].running()
    assert_same(remote.logits, local.logits)


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.full)])
def test_a_worker_that_is_lost_while_the_model_is_loaded(
    every: int, engine: Engine, gguf: Path, tmp_path: Path
) -> None:
    """The first time, too: the server answers 503 until the worker is back, and loads the model again."""
    with rpc_workers(engine, tmp_path, 1) as workers:
        with network(workers[0]) as good, loading(engine, tmp_path, gguf, good.endpoint) as server:
            wait_until_healthy(server)
            whole, starts = good.sent, good.starts
            expected = server.complete(PROMPT, COUNT).ids
        # the options are read over the first connection; the others ask for the memory, and load the model
        moments = [start + 1 for start in starts[1:]]
        moments += [whole * share // 100 for share in (20, 40, 60, 80)] + [whole - 1]
        for fails_after in moments[::every]:
            with (
                network(workers[0], fails_after) as bad,
                loading(engine, tmp_path, gguf, bad.endpoint) as server,
            ):
                wait_for_log(server, "next attempt in 1.0 s")
                for method, path in (("GET", "/health"), ("POST", "/completion")):
                    assert ask(server, method, path, {"prompt": PROMPT})[0] == 503
                bad.repair()
                wait_until_healthy(server)
                assert server.complete(PROMPT, COUNT).ids == expected


def test_a_server_that_waits_for_its_worker_can_be_ended(engine: Engine, gguf: Path, tmp_path: Path) -> None:
    with (
        rpc_workers(engine, tmp_path, 1) as workers,
        network(workers[0], 1 << 20) as bad,
        loading(engine, tmp_path, gguf, bad.endpoint) as server,
    ):
        wait_for_log(server, "next attempt")
        server.process.terminate()
        server.process.wait(10)


@contextmanager
def loading(engine: Engine, folder: Path, gguf: Path, endpoint: str) -> Iterator[Server]:
    """A server that has not loaded its model yet."""
    port, log = free_port(), folder / "server.log"
    command = [engine.bin / "llama-server", "--model", gguf, *EXACT, "--rpc", endpoint, "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield Server(port, log, process)
    finally:
        process.kill()
        process.wait()


def wait_for_log(server: Server, line: str) -> None:
    end = time.monotonic() + RECOVERY
    while line not in server.log.read_text(errors="replace"):
        server.check_runs()
        assert time.monotonic() < end, f"the log lacks {line!r}"
        time.sleep(0.1)


def test_a_model_that_cannot_be_loaded_over_a_worker(engine: Engine, gguf: Path, tmp_path: Path) -> None:
    """This is no reason to wait for the worker."""
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf.read_bytes()[: gguf.stat().st_size // 2])
    with rpc_workers(engine, tmp_path, 1) as workers:
        command = [engine.bin / "llama-server", "--model", damaged, "--rpc", workers[0].endpoint]
        result = subprocess.run(command, capture_output=True, text=True, timeout=RECOVERY, check=False)
    assert result.returncode == 1
    assert "next attempt" not in result.stdout + result.stderr


def test_a_worker_that_is_not_there(engine: Engine, gguf: Path, tmp_path: Path) -> None:
    with rpc_workers(engine, tmp_path, 1) as workers:
        workers[0].send(signal.SIGKILL)
        command = [engine.bin / "llama-server", "--model", gguf, "--rpc", workers[0].endpoint]
        result = subprocess.run(command, capture_output=True, text=True, timeout=RECOVERY, check=False)
    assert result.returncode == 1
    said = result.stdout + result.stderr
    assert f"no device at RPC server {workers[0].endpoint}" in said
    assert f"start an RPC server at {workers[0].endpoint}" in said


@pytest.mark.full
def test_kills_at_random_moments(engine: Engine, gguf: Path, tmp_path: Path) -> None:
    """While loading, reading a prompt, generating, or recovering: no wrong answer, and the server never ends."""
    chance = random.Random(KILLS)
    with (
        rpc_workers(engine, tmp_path, 2) as workers,
        serving(engine, tmp_path, gguf, "--rpc", listed(workers), "-np", "2") as server,
        ThreadPoolExecutor() as pool,
    ):
        server.check_requests = lambda: None  # type: ignore[method-assign]
        expected = server.complete(PROMPT, COUNT).ids
        request = {
            "prompt": PROMPT,
            "n_predict": COUNT,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
        }
        for _ in range(KILLS):
            asked = [pool.submit(ask, server, "POST", "/completion", request) for _ in range(3)]
            time.sleep(chance.uniform(0, 1.5))
            worker = chance.choice(workers)
            worker.send(signal.SIGKILL)
            time.sleep(chance.uniform(0, 1.5))
            worker.start()
            time.sleep(chance.uniform(0, 1.5))  # the next kill can hit the reload
            for each in asked:
                status, body = each.result(RECOVERY)
                assert status in (200, 503), body
                assert status == 503 or tuple(json.loads(body)["tokens"]) == expected
            server.check_runs()
        end = time.monotonic() + RECOVERY
        while (got := ask(server, "POST", "/completion", request))[0] == 503:  # an idle server notices late
            assert time.monotonic() < end, "the server does not recover"
            time.sleep(0.1)
        assert tuple(json.loads(got[1])["tokens"]) == expected
