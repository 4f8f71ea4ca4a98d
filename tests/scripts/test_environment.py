"""scripts/environment installs the project with its extras, once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTRAS = "build,validate,hub"  # as in README.md


def test_the_extras_are_installed_once(tmp_path: Path) -> None:
    """With a stand-in for the environment's Python, which notes its arguments."""
    for name in ("scripts/environment", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> .venv/noted\n')
    python.chmod(0o755)

    def run(extras: str) -> None:
        command = [str(tmp_path / "scripts/environment"), extras]
        subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, check=True)

    run(EXTRAS)
    run(EXTRAS)
    install = "-m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e"
    assert (tmp_path / ".venv/noted").read_text() == f"{install} .[{EXTRAS}]\n"
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    run(EXTRAS)
    run("cuda")
    assert (tmp_path / ".venv/noted").read_text() == f"{install} .[{EXTRAS}]\n" * 2 + f"{install} .[cuda]\n"
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*EXTRAS.split(","), "cuda"} <= set(known)
