"""`tools/run drafts`: the tables of both modes from end to end on small models."""

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


@pytest.mark.parametrize("words", ["", "mtp", "mtp a --threads 0", "server --type Q9", "server --all"])
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
