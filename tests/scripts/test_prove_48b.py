"""The road for the 48B: its needs are said first, its rehearsal walks every step."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from kimi_gguf.engine.builds import Engine
from kimi_gguf.scripts.prove_48b import main


@pytest.mark.engine
def test_the_rehearsal_walks_every_step(
    tmp_path: Path,
    engine: Engine,
    pristine: Engine,
    demo_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(demo_dir.parent)
    assert main(["--rehearse", "--type", "BF16", "--tokens", "64", "--out", str(tmp_path)]) == 0
    told = capfd.readouterr().out
    assert "98.2 to download, 98.3 for the GGUF" in told
    assert "610 tensors" in told
    for step in ("Build", "Convert", "Run", "Validate"):
        assert f"== {step}\n$ " in told
    assert (tmp_path / "demo-BF16.gguf").stat().st_size > 11_000_000
    assert (tmp_path / "report-BF16" / "report.html").exists()


def test_a_disk_too_small_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**11, 10**11))
    assert main(["some-owner/Kimi-Linear", "--type", "Q8_0", "--out", str(tmp_path / "out")]) == 1
    told = capfd.readouterr()
    assert "52.2 for the GGUF" in told.out
    assert "100.0 GB free, 153.5 GB wanted; name another disk with --out" in told.err
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_neither_folder_nor_hub_id_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-folder"]) == 1
    assert "no-such-folder: no such folder" in capfd.readouterr().err
