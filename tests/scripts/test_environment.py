"""scripts/environment installs the project with its extras, once; a script's --help and mistakes install nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from shell_program import write_program

ROOT = Path(__file__).parents[2]
EXTRAS = "build,validate,hub"  # as in README.md


def install(folder: Path, extras: str, maker: str = sys.executable) -> None:
    """Run scripts/environment of a folder. maker: the Python that makes environments."""
    for name in ("scripts/environment", "pyproject.toml", "constraints.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        if not (folder / name).exists():
            shutil.copy(ROOT / name, folder / name)
    command = [str(folder / "scripts/environment"), extras]
    subprocess.run(command, env=os.environ | {"PYTHON": maker}, check=True)


def test_the_extras_are_installed_once(tmp_path: Path) -> None:
    """With a stand-in for the environment's Python, which notes its arguments."""
    write_program(tmp_path / ".venv/bin/python", 'echo "$@" >> .venv/noted')
    install(tmp_path, EXTRAS)
    install(tmp_path, EXTRAS)

    def noted() -> list[str]:
        """The installations."""
        return [
            line for line in (tmp_path / ".venv/noted").read_text().splitlines() if line != "-m pip --version"
        ]

    command = "-m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e"
    assert noted() == [f"{command} .[{EXTRAS}]"]
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    install(tmp_path, EXTRAS)
    install(tmp_path, "cuda")
    assert noted() == [f"{command} .[{EXTRAS}]"] * 2 + [f"{command} .[cuda]"]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*EXTRAS.split(","), "cuda"} <= set(known)


def test_an_environment_without_pip_gets_it(tmp_path: Path) -> None:
    """As Ctrl-C leaves it; with a stand-in for the Python that makes environments."""
    write_program(tmp_path / ".venv/bin/python", "exit 1")
    makes = 'printf "#!/bin/sh\\necho \\"\\$@\\" >> .venv/noted\\n" > "$3/bin/python"'
    write_program(tmp_path / "maker", f'[ "$2" = venv ] || exec {sys.executable} "$@"\n{makes}')
    install(tmp_path, EXTRAS, str(tmp_path / "maker"))
    assert f"-e .[{EXTRAS}]" in (tmp_path / ".venv/noted").read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without an environment."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("scripts", "tools", ".venv", ".git", "out", "build"):
            (folder / path.name).symlink_to(path)
    for name in ("scripts", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def ran(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script from another folder. Nothing may be left in the checkout."""
    before = sorted(checkout.rglob("*"))
    command = [checkout / words[0], *words[1:]]
    variables = os.environ | {"PYTHON": sys.executable}
    ended = subprocess.run(command, env=variables, cwd=checkout.parent, capture_output=True, text=True)
    assert sorted(checkout.rglob("*")) == before
    assert "Traceback" not in ended.stderr
    return ended


@pytest.mark.parametrize(
    "script",
    [
        *(f"scripts/{name}" for name in ("demo", "environment", "test")),
        *(f"tools/{path.name}" for path in sorted((ROOT / "tools").iterdir()) if not path.suffix),
    ],
)
def test_help_installs_nothing(script: str, checkout: Path) -> None:
    ended = ran(checkout, script, "--help")
    assert ended.returncode == 0 and not ended.stderr
    assert script in ended.stdout


def test_help_of_lint(checkout: Path) -> None:
    assert ran(checkout, "scripts/lint", "--help").stdout.startswith("Run ruff")
    ended = ran(checkout, "scripts/lint")
    assert ended.returncode == 1 and "run: scripts/environment build,validate,test" in ended.stderr


@pytest.mark.parametrize("extras", ["build,validat", ","])
def test_an_extra_that_does_not_exist_is_an_error(extras: str, checkout: Path) -> None:
    ended = ran(checkout, "scripts/environment", extras)
    assert ended.returncode == 1
    unknown = [repr(extra) for extra in extras.split(",") if extra not in ("build", "validate")]
    assert ended.stderr.startswith("environment: error: expected extras of pyproject.toml (build, validate,")
    assert ended.stderr.endswith(f"found {', '.join(unknown)}\n")
    assert ran(checkout, "scripts/environment", "build", "validate").returncode == 2


@pytest.mark.parametrize("words", [["-k", "router", "--ful"]])
def test_a_mistyped_tier_is_refused_before_anything_is_built(words: list[str], checkout: Path) -> None:
    ended = ran(checkout, "scripts/test", *words)
    assert (ended.returncode, ended.stderr) == (
        2,
        f"scripts/test: error: expected --ci or --full, found {words[-1]}\n",
    )


@pytest.mark.parametrize(
    ("words", "selected"),
    [
        ([], ["default"]),
        (["-k", "a b", "--full-trace"], ["default", "-k", "a b", "--full-trace"]),
        (["--full", "-x"], ["full", "-x"]),
        (["-x", "--ci"], ["ci", "-x"]),
    ],
)
def test_pytest_gets_all_other_arguments(words: list[str], selected: list[str], checkout: Path) -> None:
    """With stand-ins for what comes before; that for Python prints its arguments."""
    for name in ("scripts/environment", "scripts/lint", ".venv/bin/kimi-llama", ".venv/bin/python"):
        text = 'printf "%s\\n" "$@"' if name.endswith("python") else ""
        write_program(checkout / name, text)
    ended = ran(checkout, "scripts/test", *words)
    assert ended.returncode == 0, ended.stderr
    given = ended.stdout.splitlines()
    assert given[given.index("--tier") + 1 :] == selected
