"""The version number: engine/version.py has it, and everything else agrees."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

from kimi_gguf.convert import cli as convert_cli
from kimi_gguf.engine.version import VERSION
from kimi_gguf.scripts import kimi_llama
from kimi_gguf.validate import cli as validate_cli

ROOT = Path(__file__).parents[1]


def test_the_package_has_this_version() -> None:
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert read_configuration(ROOT / "pyproject.toml")["project"]["version"] == VERSION


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    number, date = versions[0]
    assert VERSION.removesuffix(".dev0") == number
    assert date == "not released" if VERSION.endswith(".dev0") else re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in versions[1:])
    numbers = [tuple(map(int, number.split("."))) for number, _ in versions]
    assert numbers == sorted(set(numbers), reverse=True) and all(len(number) == 3 for number in numbers)


@pytest.mark.parametrize("program", [convert_cli, validate_cli, kimi_llama])
def test_each_command_prints_this_version(program: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["--version"])  # type: ignore[attr-defined]
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"kimi-gguf {VERSION}\n"


def test_the_demo_looks_for_a_wheel_of_this_version() -> None:
    (line,) = re.findall(r"^version=.*$", (ROOT / "scripts/demo").read_text(), re.MULTILINE)
    command = ["bash", "-c", f"{line}; echo $version"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == f"{VERSION}\n"


def test_no_other_file_has_a_version_number() -> None:
    """A number in a second place would have to be changed there, too."""
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files", "*.py", "*.toml", "scripts/*", "tools/*"],
                           capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    found = [file for file in files if VERSION in (ROOT / file).read_text(errors="replace")]
    assert found == ["engine/version.py"]
