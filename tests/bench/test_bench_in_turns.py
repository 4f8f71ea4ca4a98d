"""Models that do not fit in memory twice: which variants run, and their table."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_gguf.bench import run
from kimi_gguf.bench.ab_run import Loaded, Settings
from kimi_gguf.bench.cells import PATCHED, UPSTREAM, Cell, Variant
from kimi_gguf.bench.in_turns import Turns, measure_in_turns, variants_alone
from kimi_gguf.bench.load import Watch
from kimi_gguf.bench.report import turns_table
from kimi_gguf.bench.roofline import Peaks
from kimi_gguf.engine.progress import Silent

GB = 10**9
MODEL = SimpleNamespace(nbytes=18 * GB, path=Path("model.gguf"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work on this machine disturbs no sample."""
    monkeypatch.setattr(Watch, "others", lambda self: 0.0)


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int | None) -> None:
    monkeypatch.setattr(run, "available_memory", lambda: nbytes)


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (36, UPSTREAM),
        (35, ()),
        (None, UPSTREAM),  # the system does not say
    ],
)
def test_which_variants_of_upstream_run_next_to_patched(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int | None, expected: tuple[object, ...]
) -> None:
    free(monkeypatch, None if gigabytes is None else gigabytes * GB)
    assert run.variants_in_memory(MODEL, Silent()) == expected  # type: ignore[arg-type]


def test_a_copy_that_does_not_fit_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert variants_alone(17 * GB, 20 * GB) == (PATCHED, *UPSTREAM)
    free(monkeypatch, 20 * GB)
    runners = SimpleNamespace(model=MODEL, about=Loaded())
    chosen = run.alone_in_memory(runners)  # type: ignore[arg-type]
    assert chosen == (PATCHED, *(variant for variant in UPSTREAM if not variant.repack))
    reason = "the copy of 18.0 GB of weights does not fit in 20.0 GB of free memory"
    assert runners.about.left_out == dict.fromkeys(("upstream", "upstream -fa 0"), reason)


class Decoder:
    """A process whose first decode of a token takes longer, because its experts are touched for the first time."""

    pid = os.getpid()

    def __init__(self, first: float, later: float) -> None:
        self.first, self.later = first, later
        self.decoded = 0  # tokens at the start of an answer that were decoded before
        self.asked = 0

    def ask(self, do: str, steps: int, warm: int, **_: Any) -> dict[str, list[float]]:
        assert do == "time"
        self.asked += 1
        time.sleep(0.01)
        took = [self.first if i >= self.decoded else self.later for i in range(warm + steps)]
        self.decoded = max(self.decoded, warm + steps)
        return {"seconds": took[warm:]}


@pytest.mark.parametrize(
    ("batch", "first", "in_memory", "repeated", "steps", "seconds"),
    [
        (1, 0.2, True, True, 10, 0.05),  # all decodes of a sample ran before it
        # one of ten ran before: the second decode of the first sample
        (1, 0.2, False, False, 10, (0.05 + 9 * 0.2) / 10),
        (512, 3.0, True, False, 1, 0.05),  # long ones run once before
    ],
)
def test_decodes_of_a_file_in_memory_are_timed_after_they_have_run_once(
    batch: int, first: float, in_memory: bool, repeated: bool, steps: int, seconds: float
) -> None:
    cell, decoder = Cell("f16", 1, 0, 2, batch), Decoder(first, 0.05)
    runners = SimpleNamespace(
        context=lambda *_: (decoder, "context"), go_to=lambda *_: Path("state"), about=Loaded()
    )
    turns = Turns(runners, [cell], Settings(cell_seconds=2.0), in_memory)  # type: ignore[arg-type]
    turns.measure(cell, PATCHED)
    assert turns.collected[cell].samples[PATCHED.name] == pytest.approx([seconds])
    assert turns.collected[cell].steps == steps
    assert (decoder.asked > 3) == repeated and decoder.asked >= 2


def test_a_cell_counts_only_with_all_variants() -> None:
    """--budget ends after patched and one of two variants of upstream: its best is not known."""
    cell, decoder, skipped = Cell("f16", 1, 0, 2, 1), Decoder(0.05, 0.05), list[Cell]()
    settings = SimpleNamespace(cell_seconds=0.02, until=math.inf, rounds=1)
    chosen = (PATCHED, UPSTREAM[0], UPSTREAM[2])

    def context(variant: Variant, *_: object) -> tuple[Decoder, str]:
        if variant == ends_at:
            settings.until = -math.inf
        return decoder, "context"

    runners = SimpleNamespace(
        context=context, go_to=lambda *_: Path("state"), about=Loaded(), reporter=Silent(), running=lambda _: None,
        skip=lambda cells, reason: skipped.extend(cells),
    )  # fmt: skip
    ends_at = UPSTREAM[0]
    assert measure_in_turns(runners, [cell], chosen, settings, True, lambda: None) == []  # type: ignore[arg-type]
    assert skipped == [cell]
    settings.until, ends_at = math.inf, UPSTREAM[2]
    (result,) = measure_in_turns(runners, [cell], chosen, settings, True, lambda: None)  # type: ignore[arg-type]
    assert set(result.samples) == {variant.name for variant in chosen}


@pytest.mark.parametrize("rounds", [1, 3])
def test_all_turns_are_repeated(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, decoder, order = Cell("f16", 1, 0, 2, 1), Decoder(0.05, 0.05), list[str]()

    def context(variant: Variant, *_: object) -> tuple[Decoder, str]:
        order.append(variant.name)
        return decoder, "context"

    said = list[str]()
    reporter = Silent()
    monkeypatch.setattr(reporter, "phase", said.append)
    runners = SimpleNamespace(
        context=context,
        go_to=lambda *_: Path("state"),
        about=Loaded(),
        reporter=reporter,
        running=lambda _: None,
    )
    settings = Settings(cell_seconds=0.02, rounds=rounds)
    chosen = (PATCHED, UPSTREAM[0], UPSTREAM[2])
    (result,) = measure_in_turns(
        runners,  # type: ignore[arg-type]
        [cell],
        chosen,
        settings,
        in_memory=True,
        after_turn=lambda: order.append("after"),
    )
    names = [variant.name for variant in chosen]
    turns = [*names, *reversed(names)] * rounds
    assert order == [each for name in turns for each in (name, "after")]
    assert said == [
        f"turn {i} of {6 * rounds}: {name}: tg at 0, 2 threads" for i, name in enumerate(turns, 1)
    ]
    assert {name: len(samples) for name, samples in result.samples.items()} == dict.fromkeys(
        names, 2 * rounds
    )


def test_peak_rates_are_those_before_the_first_turn_and_after_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, so four turns."""
    cells = [Cell("f16", 1, 0, threads, 1) for threads in (1, 2)]
    asked = []

    def rates(threads: int, read: float) -> Peaks:
        return Peaks(threads, read, f32=1.0, int8=None, bf16=None)

    def measured(threads: int, **_: object) -> Peaks:
        asked.append(threads)
        return rates(threads, 10.0 * threads * len(asked))

    free(monkeypatch, None)
    monkeypatch.setattr(run, "measure_peaks", measured)
    monkeypatch.setattr(run, "alone_in_memory", lambda _: (PATCHED, UPSTREAM[2]))
    runners = SimpleNamespace(
        context=lambda *_: (Decoder(0.05, 0.05), "context"), go_to=lambda *_: Path("state"), about=Loaded(),
        reporter=Silent(), running=lambda _: None,
    )  # fmt: skip
    mine = run.Run.__new__(run.Run)
    mine.parsed = SimpleNamespace(seconds=0.02)  # type: ignore[assignment]
    latest = {threads: rates(threads, 5.0 * threads) for threads in (1, 2)}
    settings = Settings(cell_seconds=0.02)
    found = list(mine.results_in_turns(runners, cells, settings, latest))  # type: ignore[arg-type]
    assert asked == [1, 2] * 4
    assert [peaks.read for _, peaks in found] == [
        (5 + 10 * (1 + 3 + 5 + 7)) / 5,
        2 * (5 + 10 * (2 + 4 + 6 + 8)) / 5,
    ]
    assert {threads: peaks.read for threads, peaks in latest.items()} == {1: 70.0, 2: 160.0}
    assert [each["read"] for each in runners.about.peaks] == [5, 10, 30, 50, 70, 10, 40, 80, 120, 160]


def test_the_table_of_processes() -> None:
    cell = {"batch": 1, "sequences": 1, "threads": 2, "depth": 0, "cache_type": "f16", "tokens": 1}
    cell |= {"ubatch": 512, "device": None}
    cell["samples"] = {"patched --repack 0": [0.05, 0.05], "upstream -fa 0": [0.1, 0.1]}
    about = {
        "load": {"patched --repack 0": {"seconds": 0.04}, "upstream": {"seconds": 34.0}},
        "resident": {"patched --repack 0": {"private": 500.4, "file": 17000.0, "peak": 17500.4}},
        "read": {"patched --repack 0, tg at 0, 2 threads": 2.5e6, "upstream -fa 0, tg at 0, 2 threads": 0.0},
    }
    assert turns_table({"about": about, "cells": [cell]})[1:] == [
        ("patched --repack 0", "0.0 s", "500", "17000", "17500", "20", "2.5"),
        ("upstream -fa 0", "34.0 s", "unknown", "unknown", "unknown", "10", "0.0"),
    ]
