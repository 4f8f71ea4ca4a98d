"""scripts/prove-48b prints its requirements first; --rehearse runs every step."""

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
    assert "expected 153.5 GB of free disk space, found 100.0 GB; choose another disk with --out" in told.err
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_neither_folder_nor_hub_id_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-folder"]) == 1
    assert "no-such-folder: not found; expected a folder or a hub id" in capfd.readouterr().err
