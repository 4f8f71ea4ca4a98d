"""The bench's C++ programs: every case runs on its build, in small; the machine's limits are plausible."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
from bench_case import own_cache

from kimi_gguf.bench import matmuls, operators, programs
from kimi_gguf.bench.load import PATIENCE, Watch, undisturbed
from kimi_gguf.bench.matmuls import WEIGHTS, Shape, measure_matmuls
from kimi_gguf.bench.operators import CASES, Case, libraries_of, measure_operators
from kimi_gguf.bench.page import matmuls_table, operators_table
from kimi_gguf.bench.roofline import measure_peaks
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.progress import Silent
from kimi_gguf.patches.errors import EngineError

SMALL = ("heads=2", "keys=64", "layers=2", "seconds=0.001", "least=1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_GGUF_CACHE", str(own_cache(tmp_path)))


@pytest.mark.engine
def test_every_case_runs(engine: Engine, pristine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tuple(Case(c.title, c.counted, c.upstream, c.patched, (*c.options, *SMALL)) for c in CASES)
    monkeypatch.setattr(operators, "CASES", small)
    monkeypatch.setattr(operators, "ROUNDS", 1)
    rows = list(measure_operators(libraries_of(engine, pristine, None), 1, Silent()))
    assert [row["title"] for row in rows] == [case.title for case in CASES]
    for row in rows:
        assert row["pristine"]["seconds"] > 0 and row["patched"]["seconds"] > 0
    assert len(operators_table(rows)) == 1 + len(CASES)


@pytest.mark.engine
def test_every_product_runs(engine: Engine, pristine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        matmuls, "SHAPES", (Shape("experts", 64, 6, experts=9), Shape("one", 64, 2, copies=2))
    )
    monkeypatch.setattr(matmuls, "K", 256)
    monkeypatch.setattr(operators, "ROUNDS", 1)
    rows = list(measure_matmuls(libraries_of(engine, pristine, None), 1, Silent()))
    assert [(row["weights"], row["shape"]) for row in rows] == list(
        itertools.product(WEIGHTS, ("experts", "one"))
    )
    for row in rows:
        assert row["pristine"]["seconds"] > 0 and row["patched"]["seconds"] > 0
        assert 0 < row["floor"]["share"] < 2 and row["floor"]["bound"] in ("memory", "products")
    assert len(matmuls_table(rows)) == 1 + len(rows)


@pytest.mark.parametrize(
    ("shape", "weights", "n_products", "n_bytes"),
    [
        (Shape("", 1024, 512, experts=32), "Q8_0", 2304 * 1024 * 512 * 8, 32 * 2304 * 1024 * 34 / 32),
        (Shape("", 4096, 4, copies=8), "BF16", 2304 * 4096 * 4, 2304 * 4096 * 2),
    ],
)
def test_what_a_product_has_to_do(shape: Shape, weights: str, n_products: int, n_bytes: float) -> None:
    assert shape.macs == n_products
    assert shape.weight_bytes(weights) == n_bytes


@pytest.mark.engine
def test_what_a_build_does_not_have_is_said(engine: Engine, pristine: Engine) -> None:
    made = operators.programs(libraries_of(engine, pristine, None))
    with pytest.raises(EngineError, match="this build has no ggml_kda_scan"):
        programs.ask(made["pristine"], "scan", *SMALL)
    with pytest.raises(EngineError, match="unknown argument colour=red"):
        programs.ask(made["patched"], "scan", "colour=red")


@pytest.mark.engine
@pytest.mark.parametrize("flags", [(), programs.NATIVE], ids=["any processor", "this processor"])
def test_limits_are_measured_with_and_without_the_processor_s_own_instructions(
    flags: tuple[str, ...],
) -> None:
    told = json.loads(programs.ask(programs.program("peaks", flags), "1", "0.02"))
    assert told["threads"] == 1
    assert told["read"] > 1e8 and told["f32"] > 1e8
    assert all(told[kind] is None or told[kind] > 1e8 for kind in ("int8", "bf16"))


def test_a_program_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = programs.program("peaks")
    monkeypatch.setattr(subprocess, "run", None)
    assert programs.program("peaks") == path


def test_a_compiler_that_fails_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"peaks\.cpp: does not compile"):
        programs.program("peaks", ("-fno-such-flag",))
    assert list((tmp_path / "cache" / "bench" / "programs").iterdir()) == []


def test_other_work_is_noticed_and_our_own_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc/stat and the stat of processes 1 (ours) and 2 as the system would give them, ticks of 1/100 s."""
    ticks = {"all": 1000, "ours": 400}
    monkeypatch.setattr(Watch, "_of", lambda _self, _pid: ticks["ours"])
    monkeypatch.setattr(Path, "read_text", lambda _self: f"cpu {ticks['all']} 0 0 5 0 0 0 0 99\n")
    now = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr("kimi_gguf.bench.load.time.monotonic", lambda: next(now))
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    watch = Watch(())
    ticks["all"], ticks["ours"] = 1400, 800  # 4 processor seconds, all of them ours
    assert watch.others() == 0.0
    ticks["all"] = 1800  # 4 more, not ours, in 4 seconds in all
    assert watch.others() == pytest.approx(1.0)


def test_a_disturbed_sample_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([1.0, 0.5, 0.0, 0.0])
    monkeypatch.setattr(Watch, "others", lambda _self: next(seen))
    taken = iter(range(9))
    now = iter(range(99))
    monkeypatch.setattr("kimi_gguf.bench.load.time.monotonic", lambda: float(next(now)))
    assert undisturbed(lambda: next(taken), os.cpu_count() or 1).answer == 2


def test_other_work_that_has_processors_of_its_own_does_not_disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(Watch, "others", lambda _self: 5.0)
    now = iter(range(99))
    monkeypatch.setattr("kimi_gguf.bench.load.time.monotonic", lambda: float(next(now)))
    taken = iter(range(9))
    assert undisturbed(lambda: next(taken), threads=2).answer == 0
    assert undisturbed(lambda: next(taken), threads=4).answer == PATIENCE


def test_where_it_is_never_calm_the_last_sample_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "others", lambda _self: 2.0)
    now = iter(range(99))
    monkeypatch.setattr("kimi_gguf.bench.load.time.monotonic", lambda: float(next(now)))
    taken = iter(range(9))
    told = undisturbed(lambda: next(taken), os.cpu_count() or 1)
    assert told.answer == PATIENCE - 1
    assert told.disturbance is not None and told.disturbance > 1.0


def test_limits_take_the_best_of_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([json.dumps({"threads": 1, "read": n, "f32": 5, "int8": None, "bf16": 3}) for n in (2, 9, 4)])
    monkeypatch.setattr("kimi_gguf.bench.roofline.ask", lambda *_: next(said))
    found = measure_peaks(1)
    assert (found.read, found.int8, found.bf16) == (9, None, 3)
