"""scripts/demo installs the wheel in dist/ and runs every step, from any folder. The programs are stand-ins."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from importlib.metadata import version
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
    command = ["scripts/demo"]
    ended = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
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
    last = demo(checkout, environment)[-2:]
    assert last == ["out/report-BF16/report.html", "out/report-Q8_0/report.html"]
    keeps = tuple(map(int, version("pip").split(".")[:2])) >= (23, 2)  # 23.0 installs a local wheel again
    assert (noted.stat().st_mtime_ns == before) is keeps, "the same wheel is not installed again"


# Writes what the next step needs. FAILS names the program and its sub-command that ends differently.
PROGRAM = """#!/usr/bin/env bash
case "${0##*/} $1" in
    "$FAILS") $HOW ;;
esac
while [[ $# -gt 0 ]]; do
    case $1 in
        -o) touch "$2" ;;
        --out) mkdir -p "$2" && touch "$2/report.html" ;;
    esac
    shift
done
"""


@pytest.fixture
def installed(checkout: Path) -> Path:
    """A checkout whose environment has stand-ins."""
    (checkout / ".venv/bin").mkdir(parents=True)
    programs = [f".venv/bin/{name}" for name in ("convert-kimi", "kimi-llama", "validate-kimi")]
    for name, text in (("scripts/environment", "#!/bin/sh\n"), *((name, PROGRAM) for name in programs)):
        (checkout / name).write_text(text)
        (checkout / name).chmod(0o755)
    return checkout


@pytest.mark.parametrize(
    ("words", "place", "shown"),
    [
        ([], "checkout/out", "{tmp}/checkout/out"),
        (["my out"], "elsewhere/my out", "{tmp}/elsewhere/my out"),
        (["{tmp}/a b/c"], "a b/c", "{tmp}/a b/c"),
        (["--compare", "../up"], "up", "{tmp}/elsewhere/../up"),
    ],
)
def test_a_folder_is_that_of_the_caller(
    words: list[str], place: str, shown: str, installed: Path, tmp_path: Path
) -> None:
    before = {path.name for path in installed.iterdir()}
    (tmp_path / "elsewhere").mkdir()
    command = [installed / "scripts/demo", *(word.format(tmp=tmp_path) for word in words)]
    ended = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    reports = [Path(line) for line in ended.stdout.splitlines()[-2:]]
    assert [path.parent.name for path in reports] == ["report-BF16", "report-Q8_0"]
    assert all(str(path.parent.parent) == shown.format(tmp=tmp_path) and path.is_file() for path in reports)
    assert (tmp_path / place / "demo-BF16.gguf").is_file()
    assert {path.name for path in installed.iterdir()} - {"out"} == before - {"out"}
    assert (installed / "out").exists() == (place == "checkout/out")


@pytest.mark.parametrize(
    ("fails", "step", "log"),
    [
        ("convert-kimi demo", "2/5 Convert the checkpoint to GGUF", ""),
        ("kimi-llama run", "3/5 Generate text from both files", "run-BF16.log"),
        ("kimi-llama chat", "4/5 Chat", "chat.log"),
        ("validate-kimi out/demo-BF16.gguf", "5/5 Validate against the torch reference", ""),
    ],
)
def test_a_failed_step_names_a_log_that_it_wrote(fails: str, step: str, log: str, installed: Path) -> None:
    variables = os.environ | {"FAILS": fails, "HOW": "exit 7"}
    ended = subprocess.run(["scripts/demo"], cwd=installed, env=variables, capture_output=True, text=True)
    assert ended.returncode == 7
    where = f"; the output of llama.cpp is in out/{log}" if log else ""
    assert ended.stderr == f'demo: error: "{step}" failed{where}\n'
    assert not log or (installed / "out" / log).is_file()


def test_a_folder_that_cannot_be_made_is_one_message(installed: Path) -> None:
    (installed / "file").touch()
    ended = subprocess.run(["scripts/demo", "file/out"], cwd=installed, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("mkdir: ") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("how", ["exec sleep 60", "handles"])
def test_an_interrupted_demo_is_not_called_a_failure(how: str, installed: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the script and its program, which ends by the signal or, as Python's do, with status 130."""
    handles = tmp_path / "handles"
    handles.write_text("#!/usr/bin/env bash\ntrap 'exit 130' INT\nwhile true; do sleep 0.05; done\n")
    handles.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    variables = os.environ | {"FAILS": "kimi-llama chat", "HOW": how, "PATH": path}
    process = subprocess.Popen(
        ["scripts/demo"], cwd=installed, env=variables, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = installed / "out/chat.log"
    while process.poll() is None and not log.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "demo: interrupted; run it again\n")
