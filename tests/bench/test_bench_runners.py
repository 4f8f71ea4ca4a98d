"""The processes of the bench: states that both builds load, edited and repeated states, stopped processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kimi_gguf.bench.ab_run import Loaded, LogitsAfterState, check_logits
from kimi_gguf.bench.cells import PATCHED, UPSTREAM, Cell
from kimi_gguf.bench.models import generate
from kimi_gguf.bench.runner import Runner, environment_of
from kimi_gguf.bench.shapes import BenchModel
from kimi_gguf.bench.state import StateError, plain_layout, repeated
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import Silent

pytestmark = pytest.mark.engine

Logits = NDArray[np.float64]
DEPTH = 96
CONTEXT = {"n_ctx": 1024, "n_batch": 512, "n_ubatch": 512, "sequences": 1, "cache_type": "f16", "threads": 1}


@pytest.fixture
def gguf(upstream: Engine) -> Path:
    return generate(BenchModel("kimi-linear", 4, 8, "BF16", "tiny"), upstream, Silent())


def start(engine: Engine) -> Runner:
    return Runner("upstream" if engine.is_upstream else "patched", environment_of(engine))


@pytest.fixture
def runners(gguf: Path, engine: Engine, upstream: Engine) -> Iterator[tuple[Runner, Runner]]:
    with start(engine) as patched, start(upstream) as upstream:
        for runner in (patched, upstream):
            runner.ask("load", gguf=str(gguf), repack=True)
            runner.ask("context", name="fa", flash=True, **CONTEXT)
            runner.ask("context", name="plain", flash=False, **CONTEXT)
        yield patched, upstream


def logits(runner: Runner, context: str, folder: Path, empty: bool = False) -> Logits:
    file = folder / "logits.npy"
    runner.ask("logits", name=context, threads=1, file=str(file), empty=empty)
    values = np.load(file).astype(np.float64)
    assert np.isfinite(values).all()
    return values


def nmse(a: Logits, b: Logits) -> float:
    return float(np.square(a - b).sum() / np.square(b).sum())


def test_upstream_loads_a_state_of_patched(runners: tuple[Runner, Runner], tmp_path: Path) -> None:
    patched, upstream = runners
    file = str(tmp_path / "state")
    patched.ask("fill", name="fa", depth=DEPTH, file=file)
    wanted = logits(patched, "fa", tmp_path)
    upstream.ask("fill", name="fa", depth=DEPTH, file=str(tmp_path / "upstream"))
    # each from its own state: shows how much the builds differ
    alone = nmse(logits(upstream, "fa", tmp_path), wanted)
    for runner, context in ((upstream, "fa"), (upstream, "plain"), (patched, "plain")):
        runner.ask("empty", name=context)
        assert nmse(logits(runner, context, tmp_path), wanted) > 1e-2, "another state gives other logits"
        runner.ask("restore", name=context, file=file)
        assert nmse(logits(runner, context, tmp_path), wanted) < max(1e-3, 2 * alone)


def test_logits_of_an_empty_context_leave_the_state(runners: tuple[Runner, Runner], tmp_path: Path) -> None:
    patched, _ = runners
    patched.ask("fill", name="fa", depth=DEPTH, file=str(tmp_path / "state"))
    before = logits(patched, "fa", tmp_path)
    assert nmse(logits(patched, "fa", tmp_path, empty=True), before) > 1e-2
    assert (logits(patched, "fa", tmp_path) == before).all()


def test_a_state_that_is_another_one_after_restoring_is_an_error(
    runners: tuple[Runner, Runner], tmp_path: Path
) -> None:
    patched, _ = runners
    file = tmp_path / "state"
    patched.ask("fill", name="fa", depth=DEPTH, file=str(file))
    state = np.fromfile(file, np.uint8)
    state[8 + 4 : 8 + 8] = (5, 0, 0, 0)  # of sequence 5
    state.tofile(file)
    patched.ask("restore", name="fa", file=str(file))
    with pytest.raises(EngineError, match="sequence 0: the state is not the one that was restored"):
        logits(patched, "fa", tmp_path)


@pytest.mark.parametrize(
    ("of_empty", "apart", "near", "far"),
    [
        (0.8, 0.0, 0.39, 0.41),  # half the NMSE of the empty context's logits
        (4.0, 0.0, 0.49, 0.51),  # at most 0.5
        (4.0, 0.4, 0.59, 0.61),  # unless upstream's variants differ more: 1.5 times their difference
        (2.0, 0.9, 0.99, 1.01),  # but never more than half of the first
    ],
)
def test_logits_must_be_near_those_of_the_state_not_of_an_empty_context(
    of_empty: float, apart: float, near: float, far: float
) -> None:
    """All numbers are NMSE to patched's logits."""
    row, empty, other = np.eye(1000)[:3]
    cell = Cell("q8_0", 1, 64, 1, 1)

    def check(error: float) -> Loaded:
        about, difference = Loaded(), math.sqrt(error) * other
        nearer = (1 - math.sqrt(apart / error)) * difference
        rows = {PATCHED: row, UPSTREAM[0]: row + difference, UPSTREAM[1]: row + nearer}
        check_logits(about, LogitsAfterState(cell, rows, row + math.sqrt(of_empty) * empty))
        return about

    assert list(check(near).shared.values())[:2] == pytest.approx([0.0, near])
    with pytest.raises(EngineError, match=r"its logits differ from patched: expected an NMSE up to .* found"):
        check(far)


def test_timing_goes_back_to_the_state_each_time(runners: tuple[Runner, Runner], tmp_path: Path) -> None:
    patched, _ = runners
    patched.ask("fill", name="fa", depth=DEPTH, file=str(tmp_path / "state"))
    before = logits(patched, "fa", tmp_path)
    answer = patched.ask("time", name="fa", batch=7, steps=3, warm=2, threads=1)
    assert len(answer["seconds"]) == 3
    assert all(seconds > 0 for seconds in answer["seconds"])
    assert (logits(patched, "fa", tmp_path) == before).all()


def test_a_repeated_state_is_as_deep_as_it_says(runners: tuple[Runner, Runner], tmp_path: Path) -> None:
    patched, _ = runners
    file = tmp_path / "state"
    patched.ask("fill", name="fa", depth=DEPTH, file=str(file))
    state = np.fromfile(file, np.uint8)[8:]
    assert (repeated(state, DEPTH) == state).all()
    # the positions of the attention's rows and of the recurrent state must agree; the smaller one counts
    assert patched.ask("restore", name="fa", file=str(file), depth=3 * DEPTH + 5) == {"depth": 3 * DEPTH + 5}
    answer = patched.ask("time", name="fa", batch=1, steps=2, warm=0, threads=1, back=False)
    assert len(answer["seconds"]) == 2
    patched.ask("fill", name="fa", depth=3 * DEPTH, file=str(tmp_path / "deep"))
    deep = np.fromfile(tmp_path / "deep", np.uint8)[8:]
    assert len(deep) == len(repeated(state, 3 * DEPTH)), "as many bytes as a state that was decoded"


def test_bytes_that_are_no_state_are_refused() -> None:
    for change in (plain_layout, lambda state: repeated(state, 10)):
        with pytest.raises(StateError):
            change(np.full(4096, 7, np.uint8))


def test_an_error_of_llama_cpp_is_one_line(gguf: Path, engine: Engine) -> None:
    with start(engine) as patched:
        with pytest.raises(EngineError, match=r"patched: llama\.cpp cannot load it"):
            patched.ask("load", gguf=str(gguf.parent / "absent.gguf"), repack=True)
        patched.ask("load", gguf=str(gguf), repack=True)
        with pytest.raises(EngineError, match=r"type of the cache: expected one of ggml's types.*found q9_9"):
            patched.ask("context", name="fa", flash=True, **(CONTEXT | {"cache_type": "q9_9"}))


def test_a_process_that_dies_is_reported_with_its_last_line(gguf: Path, engine: Engine) -> None:
    with start(engine) as patched:
        patched.ask("load", gguf=str(gguf), repack=True)
        with pytest.raises(EngineError, match=r"the llama\.cpp process ended with status 1: KeyError"):
            patched.ask("time", name="absent", batch=1, steps=1, warm=0, threads=1)


def test_an_idle_runner_is_stopped_and_can_be_ended(gguf: Path, engine: Engine) -> None:
    with start(engine) as patched:
        patched.ask("load", gguf=str(gguf), repack=True)
        stat = Path(f"/proc/{patched.pid}/stat")
        deadline = time.monotonic() + 5
        while stat.read_text().rpartition(")")[2].split()[0] != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stat.read_text().rpartition(")")[2].split()[0] == "T"
    assert not stat.exists()


@pytest.mark.engine
def test_switches_that_no_record_names_have_their_defaults(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIMI_REPACK", "1")
    monkeypatch.setenv("KIMI_OPS", "off")
    environment = environment_of(engine)
    assert (environment["KIMI_REPACK"], environment["KIMI_AMX"], environment["KIMI_OPS"]) == ("", "", "off")
