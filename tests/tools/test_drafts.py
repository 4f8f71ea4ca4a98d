"""`tools/run drafts`: the break-even rate, and the tables of all modes from end to end on small models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mtp_models import Circle, write_circle
from random_checkpoint import Spec
from synthetic_case import make_gguf

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import Silent
from kimi_gguf.tools import drafts
from kimi_gguf.tools.server import running


@pytest.mark.parametrize(
    ("length", "cost", "rate"),
    [(1, 1.5, 0.5), (3, 1.875, 0.5), (8, 9 - 1e-9, 1.0), (2, 1.0, 0.0), (2, 3.0, None), (1, 7.0, None)],
)
def test_break_even(length: int, cost: float, rate: float | None) -> None:
    """At a rate of 1/2 a draft of 3 tokens gives 1 + 1/2 + 1/4 + 1/8 tokens a round."""
    found = drafts.break_even(length, cost)
    assert found == (None if rate is None else pytest.approx(rate, abs=1e-6))


def test_costs_are_in_decodes_of_one_token() -> None:
    """Three tokens drafted in 3 x 1 s and checked by the draft model in 2 s; verified in 5 s; a decode takes 4 s."""
    seconds = {
        ("patched", 0, 1): 4.0,
        ("patched", 3, 4): 5.0,
        ("upstream", 0, 1): 8.0,
        ("upstream", 3, 4): 24.0,
    }
    row = drafts.cost_row(3, 1, seconds | {("draft", 3, 1): 1.0, ("draft", 3, 4): 2.0})
    assert (row["verify"], row["upstream_verify"], row["draft"]) == (1.25, 3.0, 1.25)
    assert (
        row["break_even_draft"] == drafts.break_even(3, 2.5) > row["break_even"] == drafts.break_even(3, 1.25)
    )
    assert drafts.cost_table([row])[1][:5] == ("1", "3", "1.25", "3.00", "1.25")


@pytest.mark.engine
def test_the_cost_of_a_draft(engine: Engine, upstream: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--shapes", "tiny", "--layers", "4", "--experts", "8", "--threads", "1")
    assert drafts.main(["cost", *sizes]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][
        2:
    ]
    assert [(int(row[0]), int(row[1])) for row in rows] == [
        (slots, length) for slots in drafts.SLOTS for length in drafts.LENGTHS
    ]
    assert all(float(cost) > 0 for row in rows for cost in row[2:5])


@pytest.mark.engine
def test_drafts_on_the_server(
    engine: Engine, upstream: Engine, demo_gguf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "SLOTS", (2,))
    monkeypatch.setattr(drafts, "COUNT", 32)
    few = ("none", "model, up to 3 tokens", "ngram-simple, 4 then 8")
    monkeypatch.setattr(drafts, "DRAFTS", {name: drafts.DRAFTS[name] for name in few})
    target, builds = demo_gguf("F32"), {"patched": engine, "upstream": upstream}
    rows = list(drafts.measure_server(target, target, builds, 1, Silent()))
    assert [row["draft"] for row in rows] == list(few)
    for row in rows:
        for build in builds:
            assert row[build]["tokens"] == 32 * len(drafts.PROMPTS)
            assert row[build]["accepted"] <= row[build]["drafted"]
            assert (row[build]["drafted"] > 0) == (row["draft"] != "none")
    # the target drafts for itself
    assert rows[1]["patched"]["accepted"] > 0.9 * rows[1]["patched"]["drafted"]
    head, *table = drafts.server_table(rows)
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
    monkeypatch.setattr(drafts, "SLOTS", (1,))
    monkeypatch.setattr(drafts, "MTP_LENGTHS", (2,))
    monkeypatch.setattr(drafts, "MTP_RATES", (0.0, 0.9))
    vocabulary = make_gguf(tmp_path, Spec(layers="K", heads=1, kda_head_dim=32))
    model = write_circle(tmp_path / "circle.gguf", Circle(), vocabulary)
    assert drafts.main(["mtp", str(model), "--threads", "1", "--all"]) == 0
    head, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    rows = [dict(zip(head, line, strict=False)) for line in lines]
    assert [row["draft"] for row in rows] == list(drafts.mtp_drafts(every=True))
    plain, own, never, mostly = rows
    assert plain["drafted"] == "0"
    assert 0 < int(own["accepted"].removesuffix(" %")) < 100
    assert never["accepted"] == "0 %"
    # of 2 drafted tokens 0.9 and 0.81 are accepted, and none that would end the answer (1 to 2 %)
    assert abs(int(mostly["accepted"].removesuffix(" %")) - 85.5) < 5


def test_few_drafts_are_some_of_all() -> None:
    few, every = drafts.mtp_drafts(), drafts.mtp_drafts(every=True)
    assert "none" in few and len(few) == 5
    assert few.items() <= every.items()
    assert all("simulated" in name for name in few if name != "none")


@pytest.mark.parametrize("words", ["", "mtp", "mtp a --threads 0", "cost --type Q9", "server --all"])
def test_wrong_arguments(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        drafts.main(words.split())
    assert left.value.code == 2
    assert "usage: tools/run drafts" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_one_message(tmp_path: Path) -> None:
    program = "print('loading'); print('out of memory')"
    with (
        pytest.raises(EngineError, match=r"did not start: found loading \| out of memory; ") as caught,
        running(tmp_path / "server.log", sys.executable, "-c", program),
    ):
        pass
    assert "\n" not in str(caught.value)
