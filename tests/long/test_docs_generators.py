"""The programs that write pages with measurements, with few tokens and small models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kimi_gguf.tools import fault_table, nmse_table

ROOT = Path(__file__).parents[2]


def python(*words: object) -> None:
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.full
@pytest.mark.engine
@pytest.mark.usefixtures("engine", "upstream")
def test_measurements_of_the_demo_are_written(tmp_path: Path) -> None:
    python("tools/figures.py", "--docs", tmp_path, "--tokens", 16)
    page = (tmp_path / "measurements.md").read_text()
    assert [page.count(f"\n| {kind} | ") for kind in ("F32", "F16", "BF16", "Q8_0")] == [6, 4, 4, 4]


@pytest.mark.engine
@pytest.mark.usefixtures("engine")
def test_the_table_of_faults_is_written(
    demo_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fault_table, "TOKENS", 16)
    monkeypatch.setattr(sys, "argv", ["fault_table", str(demo_dir), str(demo_dir / "heldout.txt")])
    assert fault_table.main() == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    documented = (ROOT / "docs/fault-table.md").read_text().splitlines()
    assert [line.split("|")[1] for line in table] == [
        line.split("|")[1] for line in documented if line.startswith("| ")
    ]


@pytest.mark.engine
@pytest.mark.usefixtures("engine", "upstream")
def test_the_table_of_errors_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nmse_table, "NMSE_LIMITS", {"Q4_0": nmse_table.NMSE_LIMITS["Q4_0"]})
    assert nmse_table.main() == 0
    assert "\n| Q4_0 | " in capsys.readouterr().out
