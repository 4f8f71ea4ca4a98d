"""scripts/demo installs the wheel in dist/ and runs every step. The wheel is one of stand-ins for the programs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from stand_in_wheel import make_environment, write_wheel

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What scripts/demo reads of a checkout."""
    folder = tmp_path / "checkout"
    for name in ("scripts/demo", "engine/version.py", "constraints.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def demo(checkout: Path, environment: dict[str, str]) -> list[str]:
    """The lines that scripts/demo prints."""
    ended = subprocess.run([checkout / "scripts/demo"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_new_wheel_of_the_same_version_replaces_the_installed_one(checkout: Path) -> None:
    environment = make_environment(checkout / "out/venv")
    for name in ("first", "second"):
        write_wheel(checkout, name)
        ran = [line for line in demo(checkout, environment) if line.split(" ")[0] in ("first", "second")]
        assert [line.split(" ")[1] for line in ran] == [
            *["convert-kimi"] * 2, *["kimi-llama"] * 3, *["validate-kimi"] * 2
        ]  # fmt: skip
        assert {line.split(" ")[0] for line in ran} == {name}
    noted = next(checkout.glob("out/venv/lib/python*/site-packages/stand_in.py"))
    before = noted.stat().st_mtime_ns
    assert demo(checkout, environment)[-1].endswith(
        "out/report-BF16/report.html out/report-Q8_0/report.html "
    )
    assert noted.stat().st_mtime_ns == before, "the same wheel is not installed again"
