"""`kimi-llama bench --speculative`: the break-even rate, and both tables from end to end on small models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench_case import TINY, bench
from mtp_models import Circle, write_circle
from random_checkpoint import Spec
from synthetic_case import make_gguf

from kimi_gguf.bench import speculative
from kimi_gguf.bench.record import load
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.progress import Silent


@pytest.mark.parametrize(
    ("length", "cost", "rate"),
    [(1, 1.5, 0.5), (3, 1.875, 0.5), (8, 9 - 1e-9, 1.0), (2, 1.0, 0.0), (2, 3.0, None), (1, 7.0, None)],
)
def test_break_even(length: int, cost: float, rate: float | None) -> None:
    """At a rate of 1/2 a draft of 3 tokens gives 1 + 1/2 + 1/4 + 1/8 tokens a round."""
    found = speculative.break_even(length, cost)
    assert found == (None if rate is None else pytest.approx(rate, abs=1e-6))


@pytest.mark.engine
def test_the_cost_of_a_draft(tmp_path: Path, engine: Engine, upstream: Engine) -> None:
    record = tmp_path / "record.json"
    ended = bench(*TINY, "--speculative", "--json", str(record))
    rows = load(record)[0]["speculative"]["cost"]
    assert [(row["sequences"], row["length"]) for row in rows] == [
        (slots, length) for slots in speculative.SLOTS for length in speculative.LENGTHS
    ]
    for row in rows:
        took, n = row["samples"], row["length"]
        single = took["patched 0 1"]
        assert row["verify"] == pytest.approx(took[f"patched {n} {n + 1}"] / single)
        assert row["draft"] == pytest.approx((n * took[f"draft {n} 1"] + took[f"draft {n} {n + 1}"]) / single)
        assert row["draft"] > 0 and row["upstream_verify"] > 0
    assert "| slots | drafted tokens |" in ended.stdout


@pytest.mark.engine
def test_drafts_on_the_server(
    engine: Engine, upstream: Engine, demo_gguf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculative, "SLOTS", (2,))
    monkeypatch.setattr(speculative, "COUNT", 32)
    few = ("none", "model, up to 3 tokens", "ngram-simple, 4 then 8")
    monkeypatch.setattr(speculative, "DRAFTS", {name: speculative.DRAFTS[name] for name in few})
    target, builds = demo_gguf("F32"), {"patched": engine, "upstream": upstream}
    rows = list(speculative.measure_server(target, target, builds, 1, Silent()))
    assert [row["draft"] for row in rows] == list(few)
    for row in rows:
        for build in builds:
            assert row[build]["tokens"] == 32 * len(speculative.PROMPTS)
            assert row[build]["accepted"] <= row[build]["drafted"]
            assert (row[build]["drafted"] > 0) == (row["draft"] != "none")
    # the target drafts for itself
    assert rows[1]["patched"]["accepted"] > 0.9 * rows[1]["patched"]["drafted"]
    head, *table = speculative.server_table(rows)
    for row, line in zip(rows, table, strict=True):
        cells = dict(zip(head, line, strict=False))
        assert cells["drafted"] == str(row["patched"]["drafted"])
        assert cells["upstream: drafted"] == str(row["upstream"]["drafted"])


@pytest.mark.engine
def test_drafts_of_an_mtp_layer(
    tmp_path: Path,
    engine: Engine,
    upstream: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The simulated rates are those of the table, up to chance. Every run draws the same numbers."""
    monkeypatch.setattr(speculative, "SLOTS", (1,))
    monkeypatch.setattr(speculative, "MTP_LENGTHS", (2,))
    monkeypatch.setattr(speculative, "MTP_RATES", (0.0, 0.9))
    vocabulary = make_gguf(tmp_path, Spec(layers="K", heads=1, kda_head_dim=32))
    model = write_circle(tmp_path / "circle.gguf", Circle(), vocabulary)
    assert speculative.main([str(model), "1", "--all"]) == 0
    head, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    rows = [dict(zip(head, line, strict=False)) for line in lines]
    assert [row["draft"] for row in rows] == list(speculative.mtp_drafts(every=True))
    plain, own, never, mostly = rows
    assert plain["drafted"] == "0"
    assert 0 < int(own["accepted"].removesuffix(" %")) < 100
    assert never["accepted"] == "0 %"
    # of 2 drafted tokens 0.9 and 0.81 are accepted, and none that would end the answer (1 to 2 %)
    assert abs(int(mostly["accepted"].removesuffix(" %")) - 85.5) < 5


def test_few_drafts_are_some_of_all() -> None:
    few, every = speculative.mtp_drafts(), speculative.mtp_drafts(every=True)
    assert "none" in few and len(few) == 5
    assert few.items() <= every.items()
    assert all("simulated" in name for name in few if name != "none")


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "0"], ["a", "1", "2"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        speculative.main(arguments)
    assert left.value.code == 2
    assert "FILE [THREADS]" in capsys.readouterr().err
