"""The simulation of many threads: events are read, assigned to phases and put together again."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from kimi_gguf.bench.cells import Cell
from kimi_gguf.bench.models import generate
from kimi_gguf.bench.runner import Runner, environment_of
from kimi_gguf.bench.shapes import BenchModel
from kimi_gguf.bench.threads import (
    BANDWIDTH,
    BARRIER,
    CHUNK,
    EVENT,
    FINISHED,
    GO_ON,
    GRAPH,
    Events,
    Phase,
    Simulation,
    graphs_of,
    read_events,
    recorder,
    simulated,
)
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.progress import Silent
from kimi_gguf.scripts.simulate_threads import Times, page_text


def events(*rows: tuple[int, int, int]) -> Events:
    return np.array(list(rows), EVENT)


# Two phases: the first one is the main thread's alone; in the second one threads fetch chunks 2 to 4.
MAIN = events(
    (GRAPH, 2, 0), (GO_ON, 0, 10), (FINISHED, 0, 120), (GO_ON, 0, 130),
    (CHUNK, 2, 340), (CHUNK, 4, 450), (FINISHED, 0, 560), (GO_ON, 0, 570),
)  # fmt: skip
OTHER = events(
    (GRAPH, 2, 0), (FINISHED, 0, 10), (GO_ON, 0, 20), (CHUNK, 3, 80), (CHUNK, 5, 490), (FINISHED, 0, 500),
    (GO_ON, 0, 510),
)  # fmt: skip


def nanoseconds(*count: int) -> tuple[float, ...]:
    return tuple(pytest.approx(each * 1e-9) for each in count)


def test_each_thread_s_part_of_each_phase_and_its_chunks() -> None:
    ((first, second),) = graphs_of([MAIN, OTHER])
    assert (first.first, first.chunks) == (nanoseconds(100, 0), ())
    assert second.first == nanoseconds(200, 50)
    assert second.chunks == nanoseconds(100, 400, 100, 0), "chunks 2, 3 and 4, and that there is no fifth"


def test_a_core_that_is_free_takes_the_next_chunk() -> None:
    assert Phase((5.0, 1.0), ()).span == 5
    assert Phase((5.0, 1.0), (4.0, 4.0, 1.0)).span == 9
    assert Phase((3.0,), (4.0, 1.0)).span == 8


def test_each_phase_counts_with_its_median_of_several_decodes() -> None:
    decodes = ((3.0, 1.0), (2.0, 2.0), (9.0, 5.0))  # seconds of both phases
    graphs = [[Phase((a, 1.0), ()), Phase((b, 1.0), ())] for a, b in decodes]
    assert simulated(graphs, 3, 0).seconds == pytest.approx(3 + 2 + 2 * 2 * BARRIER)
    assert simulated(graphs, 1, 0).seconds == pytest.approx(3 + 1 + 2 + 2 + 9 + 5 + 6 * 2 * BARRIER)


def test_nothing_is_read_at_barriers() -> None:
    found = simulated([[Phase((2.0, 1.0), ())]], 1, 2.5 * BANDWIDTH)
    assert found == Simulation(2, 2.5, 2 * BARRIER) and found.is_limited
    assert found.seconds == 2.5 + 2 * BARRIER
    assert not Simulation(2, 1.5, 1).is_limited and Simulation(2, 1.5, 1).seconds == 3


def test_the_page_names_the_machine_the_day_and_an_earlier_build(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"processor": "Z80", "cores": 2, "memory_gib": 0.1}
    monkeypatch.setattr("kimi_gguf.scripts.simulate_threads.machine_facts", lambda: facts)
    monkeypatch.setattr("kimi_gguf.scripts.simulate_threads.THREADS", (1, 2))
    milliseconds = {1: {"upstream": 60, "yesterday's": 30, "patched": 20}}
    milliseconds[2] = {"upstream": 30, "yesterday's": 20, "patched": 4}
    simulated = {
        threads: {name: Simulation(each / 1000, 0.005, 0) for name, each in row.items()}
        for threads, row in milliseconds.items()
    }
    measured = {1: {"upstream": 0.05, "patched": 0.025}, 2: {"upstream": 0.03, "patched": 0.005}}
    times = Times(Cell("f16", 1, 7, 2, 1), simulated, measured)
    page = page_text("model", [times], "yesterday's", datetime(2026, 1, 2))
    assert "\nZ80, 2 cores, 0.1 GiB. Measured 2026-01-02.\n" in page
    assert "\n| 1 token, depth 7 | 60, 20, 3.00 | 30, 5, 6.00 (m) |\n" in page, "memory takes 5 ms"
    assert "\n| 1 token, depth 7 | 60, 30, 2.00 | 30, 20, 1.50 |\n" in page
    assert "\n| 1 token, depth 7 | 50 (+20%), 25 (-20%), 2.00 | 30 (+0%), 5 (+0%), 6.00 |\n" in page
    assert "\nare 1.00 to 1.50 times the measured ones.\n" in page
    assert "yesterday's" not in page_text("model", [times], None, datetime(2026, 1, 2))


@pytest.mark.engine
def test_a_decode_is_recorded(engine: Engine, upstream: Engine, tmp_path: Path) -> None:
    gguf = generate(BenchModel("kimi-linear", 4, 8, "Q4_0", "tiny"), upstream, Silent())
    environment = environment_of(engine) | {"LD_PRELOAD": str(recorder())}
    with Runner("patched", environment) as runner:
        runner.ask("load", gguf=str(gguf), repack=True)
        context = {
            "n_ctx": 256,
            "n_batch": 64,
            "n_ubatch": 64,
            "sequences": 1,
            "cache_type": "f16",
            "threads": 3,
        }
        runner.ask("context", name="only", flash=True, **context)
        phases = {}
        for threads in (1, 3):
            file = tmp_path / f"events-{threads}"
            runner.ask("record_tasks", name="only", batch=32, steps=2, threads=threads, file=str(file))
            recorded = read_events(file)
            assert len(recorded) == threads
            graphs = graphs_of(recorded)
            assert len(graphs) == 2 and len(graphs[0]) == len(graphs[1]) > 50
            assert sum(len(phase.chunks) for phase in graphs[0]) > 20
            phases[threads] = len(graphs[0])
            assert simulated(graphs, 2, 0).seconds > 0
        assert phases[1] == phases[3]
