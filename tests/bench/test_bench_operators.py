"""The bench's C++ programs: every case runs on its build with small sizes; peak rates are plausible."""

from __future__ import annotations

import itertools
import json
import math
import platform
import subprocess
from pathlib import Path

import pytest

from kimi_gguf.bench import matmuls, operators, programs
from kimi_gguf.bench.load import PATIENCE, TICKS, Watch, undisturbed
from kimi_gguf.bench.matmuls import WEIGHTS, Shape, measure_matmuls
from kimi_gguf.bench.operators import CASES, Case, libraries_of, measure_operators
from kimi_gguf.bench.page import matmuls_table, operators_table
from kimi_gguf.bench.roofline import measure_peaks
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import Silent
from kimi_gguf.engine.toolchain import cpuinfo

SMALL = ("heads=2", "keys=64", "layers=2", "seconds=0.001", "least=1")


@pytest.mark.engine
@pytest.mark.usefixtures("impatient")
def test_every_case_runs(engine: Engine, upstream: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tuple(Case(c.title, c.counted, c.upstream, c.patched, (*c.options, *SMALL)) for c in CASES)
    monkeypatch.setattr(operators, "CASES", small)
    monkeypatch.setattr(operators, "ROUNDS", 1)
    rows = list(measure_operators(libraries_of(engine, upstream, None), 1, Silent()))
    assert [row["title"] for row in rows] == [case.title for case in CASES]
    for row in rows:
        assert row["upstream"]["seconds"] > 0 and row["patched"]["seconds"] > 0
    assert len(operators_table(rows)) == 1 + len(CASES)


@pytest.mark.engine
@pytest.mark.usefixtures("impatient")
def test_every_matmul_runs(engine: Engine, upstream: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        matmuls, "SHAPES", (Shape("experts", 64, 6, experts=9), Shape("one", 64, 2, copies=2))
    )
    monkeypatch.setattr(matmuls, "K", 256)
    monkeypatch.setattr(matmuls, "SECONDS", 0.001)
    monkeypatch.setattr(operators, "ROUNDS", 1)
    peaks = measure_peaks(1, times=1)
    monkeypatch.setattr(matmuls, "measure_peaks", lambda threads: peaks)
    rows = list(measure_matmuls(libraries_of(engine, upstream, None), 1, Silent()))
    assert [(row["weights"], row["shape"]) for row in rows] == list(
        itertools.product(WEIGHTS, ("experts", "one"))
    )
    for row in rows:
        assert row["upstream"]["seconds"] > 0 and row["patched"]["seconds"] > 0
        assert row["floor"]["share"] > 0 and row["floor"]["bound"] in ("memory", "compute")
    assert len(matmuls_table(rows)) == 1 + len(rows)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("product", "weights=q4_K", "k=2300"), "k=2300 is not a multiple of 256, the block of q4_K"),
        (("product-rows", "rows=0"), "rows=0 is not a number from 1 on"),
        (("product-rows", "threads=1x"), "threads=1x is not a number from 1 on"),
        (("products",), "cases: absorbed .*product-rows"),
    ],
)
def test_wrong_arguments(engine: Engine, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        programs.ask(programs.program("operators", programs.ggml_flags(engine.lib)), *words)


def test_a_build_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert operators.main(["upsteam", "product"]) == 2
    assert "BUILD: patched or upstream" in capsys.readouterr().err


@pytest.mark.engine
def test_weights_are_repacked_where_llama_does_so(
    engine: Engine, upstream: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = operators.programs(libraries_of(engine, upstream, None))

    def repacked(build: str, case: str) -> bool:
        words = ("weights=q4_K", "rows=64", "k=256", "seconds=0.001", "least=1")
        return bool(json.loads(programs.ask(made[build], case, *words))["repacked"])

    monkeypatch.delenv("KIMI_REPACK", raising=False)
    assert not repacked("upstream", "product-rows")
    assert not repacked("patched", "product")  # our matmul uses rows of Q4_K as they are
    if platform.machine() == "x86_64":
        assert repacked("upstream", "product")


@pytest.mark.parametrize(
    ("shape", "weights", "n_macs", "n_bytes"),
    [
        (Shape("", 1024, 512, experts=32), "Q8_0", 2304 * 1024 * 512 * 8, 32 * 2304 * 1024 * 34 / 32),
        (Shape("", 4096, 4, copies=8), "BF16", 2304 * 4096 * 4, 2304 * 4096 * 2),
    ],
)
def test_work_of_a_matmul(shape: Shape, weights: str, n_macs: int, n_bytes: float) -> None:
    assert shape.macs == n_macs
    assert shape.weight_bytes(weights) == n_bytes


@pytest.mark.engine
def test_a_missing_operator_is_reported(engine: Engine, upstream: Engine) -> None:
    made = operators.programs(libraries_of(engine, upstream, None))
    with pytest.raises(EngineError, match="this build has no ggml_kda_scan"):
        programs.ask(made["upstream"], "scan", *SMALL)
    with pytest.raises(EngineError, match="unknown argument colour=red"):
        programs.ask(made["patched"], "scan", "colour=red")


@pytest.mark.engine
@pytest.mark.parametrize("flags", [(), programs.NATIVE], ids=["any processor", "this processor"])
def test_peaks_are_measured_with_and_without_the_processor_s_own_instructions(
    flags: tuple[str, ...],
) -> None:
    """The program counts the multiply-adds of a vector at compile time. How fast they are is the processor's matter."""
    rates = json.loads(programs.ask(programs.program("peaks", flags), "1", "0.02"))
    assert rates["threads"] == 1
    assert rates["read"] > 0 and rates["f32"] > 0
    instructions = {"int8": "avx2", "bf16": "avx512_bf16"} if platform.machine() == "x86_64" else {}
    for kind, name in instructions.items():
        has = flags != () and name in cpuinfo("flags").split()
        assert rates[kind] > 0 if has else rates[kind] is None, kind


def test_a_program_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = programs.program("peaks")
    monkeypatch.setattr(subprocess, "run", None)
    assert programs.program("peaks") == path


def test_a_compiler_that_fails_is_reported_and_leaves_nothing(cache: Path) -> None:
    before = set((cache / "bench" / "programs").iterdir())
    with pytest.raises(EngineError, match=r"peaks\.cpp: does not compile"):
        programs.program("peaks", ("-fno-such-flag",))
    assert set((cache / "bench" / "programs").iterdir()) == before


def test_other_work_is_noticed_and_our_own_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up /proc/stat, and the stat of processes 1 (ours) and 2; one tick is 1/100 s."""
    ticks = {"all": 1000, "ours": 400}
    monkeypatch.setattr(Watch, "_of", lambda _self, _pid: ticks["ours"])
    monkeypatch.setattr(Path, "read_text", lambda _self: f"cpu {ticks['all']} 0 0 5 0 0 0 0 99\n")
    now = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr("kimi_gguf.bench.load.time.monotonic", lambda: next(now))
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    watch = Watch(())
    ticks["all"], ticks["ours"] = 1400, 800  # 4 processor seconds, all of them used by our process
    assert watch.others() == 0.0
    ticks["all"] = 1800  # 4 more that are not ours, within 4 seconds
    assert watch.others() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("cores", "threads", "others", "limit", "kept"),
    [
        (4, 4, [1.0, 0.5, 0.0], math.inf, 2),
        (8, 2, [5.0], math.inf, 0),  # other work runs on other cores
        (8, 4, [5.0] * PATIENCE, math.inf, PATIENCE - 1),
        (4, 4, [1.0, 0.5, 0.0], 0.5, 0),
    ],
    ids=["until undisturbed", "enough cores", "the last one", "until the time is over"],
)
def test_a_disturbed_sample_is_repeated(
    cores: int,
    threads: int,
    others: list[float],
    limit: float,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """others: cores that other work uses during each sample of one second."""
    seen, samples, seconds = iter(others), itertools.count(), itertools.count(0.0)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(Watch, "others", lambda _self: next(seen))
    monkeypatch.setattr("kimi_gguf.bench.load.time.monotonic", lambda: next(seconds))
    attempt = undisturbed(lambda: next(samples), threads, seconds=limit)
    assert attempt.answer == kept
    spare = max(0.0, others[kept] - (cores - threads))
    assert attempt.disturbance == pytest.approx(max(0.0, spare * attempt.took - TICKS))


def test_peaks_are_the_best_of_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([json.dumps({"threads": 1, "read": n, "f32": 5, "int8": None, "bf16": 3}) for n in (2, 9, 4)])
    monkeypatch.setattr("kimi_gguf.bench.roofline.ask", lambda *_: next(said))
    found = measure_peaks(1)
    assert (found.read, found.int8, found.bf16) == (9, None, 3)
