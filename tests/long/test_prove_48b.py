"""tools/prove-48b prints its requirements first; --rehearse runs every step."""

from __future__ import annotations

import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from kimi_gguf.tools.prove_48b import main


@pytest.mark.engine
@pytest.mark.usefixtures("engine", "upstream", "one_core")
def test_the_rehearsal_runs_every_step(
    tmp_path: Path, demo_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_dir.parent)
    assert main(["--rehearse", "--type", "BF16", "--tokens", "64", "--out", str(tmp_path)]) == 0
    output = capfd.readouterr().out
    assert "98.2 to download, 98.3 for the GGUF" in output
    assert "610 tensors" in output
    for step in ("Build", "Convert", "Run", "Validate"):
        assert f"== {step}\n$ " in output
    assert "--text demo/heldout.txt --tokens 64" in output
    assert (tmp_path / "demo-BF16.gguf").stat().st_size > 11_000_000
    assert (tmp_path / "report-BF16" / "report.html").exists()


def test_a_disk_too_small_is_reported_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**11, 10**11))
    assert main(["some-owner/Kimi-Linear", "--type", "Q8_0", "--out", str(tmp_path / "out")]) == 1
    output = capfd.readouterr()
    assert "52.2 for the GGUF" in output.out
    assert (
        "expected 153.5 GB of free disk space, found 100.0 GB; choose another disk with --out" in output.err
    )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("path", ["/nope", "./nope", "~/nope"])
def test_a_path_is_not_taken_as_a_hub_id(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([path]) == 1
    assert capfd.readouterr().err == f"prove-48b: error: {path}: expected a folder, found none\n"


def test_neither_folder_nor_hub_id_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-folder"]) == 1
    assert "no-such-folder: expected a folder or a hub id" in capfd.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--rehearse", "--help"]])
def test_help_does_nothing_else(words: list[str], tmp_path: Path) -> None:
    """In a folder with nothing but the script, which therefore cannot install or import anything."""
    script = tmp_path / "tools/prove-48b"
    script.parent.mkdir()
    shutil.copy(Path(__file__).parents[2] / "tools/prove-48b", script)
    ended = subprocess.run([script, *words], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stderr == ""
    assert ended.stdout.startswith("Take the real Kimi-Linear-48B checkpoint")
    for option in ("--rehearse", "--type TYPE", "--out DIR", "--tokens N"):
        assert f" {option} " in ended.stdout, option
    assert ended.stdout.endswith("(default: 512)\n")
