"""`kimi-llama quantize`: its output is complete under its name, or it is not there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shell_program import write_program

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.quantize import OPTIONS, quantize

# In place of llama-quantize. Its arguments are added to the file `arguments` next to it.
PROGRAM = """\
printf '%s\\n' "$@" > "${0%/*}/arguments"
while [ "${1#--}" != "$1" ]; do shift; done
"""
WRITES = 'printf half > "$2"; printf whole >> "$2"\n'
FAILS = 'printf half > "$2"; exit 3\n'
WAITS = 'printf half > "$2"; touch "${0%/*}/waiting"; exec sleep 100\n'
SPLITS = 'for i in 1 2; do printf $i > "${2%.gguf}-0000$i-of-00002.gguf"; done\n'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "in.gguf"
    path.write_bytes(b"GGUF")
    return path


def program(folder: Path, does: str) -> Path:
    return write_program(folder / "programs" / "llama-quantize", PROGRAM + does)


def seen_by(path: Path) -> list[str]:
    return path.with_name("arguments").read_text().splitlines()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"programs"}


def test_the_output_is_moved_to_its_name(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert quantize(program(tmp_path, WRITES), model, [str(out), "Q8_0"]) == 0
    assert out.read_text() == "halfwhole"
    assert names(tmp_path) == {"in.gguf", "out.gguf"}


def test_options_precede_the_files(model: Path, tmp_path: Path) -> None:
    """llama-quantize reads options before the input only."""
    run = program(tmp_path, "exit 0\n")
    quantize(run, model, [str(tmp_path / "out.gguf"), "Q8_0", "2", "--imatrix", "i.gguf", "--pure"])
    words = seen_by(run)
    assert words[:4] == ["--imatrix", "i.gguf", "--pure", str(model)]
    assert words[5:] == ["Q8_0", "2"]


@pytest.mark.parametrize("output", ["out.gguf", "folder/out.gguf"])
def test_messages_name_the_output_and_not_the_hidden_folder(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    output: str,
) -> None:
    """Also a name that arrives in two parts, and bytes that are no text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    parts = """printf '%.9s' "$2" >&2; sleep 0.2; printf '%s\\n' "${2#?????????}" >&2; """
    run = program(
        tmp_path, WRITES + f"""echo "from '$1' to '$2'" >&2; {parts}printf 'tail \\377' >&2; echo done\n"""
    )
    assert quantize(run, Path("in.gguf"), [output, "Q8_0"]) == 0
    assert seen_by(run)[1] != output, "it writes elsewhere"
    said = capfdbinary.readouterr()
    assert said.err == f"from 'in.gguf' to '{output}'\n{output}\n".encode() + b"tail \xff"
    assert said.out == b"done\n"


@pytest.mark.engine
def test_the_options_are_those_of_the_real_program(engine: Engine) -> None:
    command = [engine.bin / "llama-quantize", "--help"]
    text = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    listed = re.findall(r"^  (--[a-z-]+)(?: (\S+))?$", text, re.MULTILINE)
    assert {option: int(bool(value)) for option, value in listed} | {"--help": 0} == OPTIONS


def test_a_failure_leaves_the_earlier_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("earlier")
    assert quantize(program(tmp_path, FAILS), model, [str(out), "Q8_0"]) == 3
    assert out.read_text() == "earlier"
    assert names(tmp_path) == {"in.gguf", "out.gguf"}


def interrupted(tmp_path: Path, model: Path, by: signal.Signals) -> tuple[set[str], str]:
    """(the names while llama-quantize wrote, standard error) of a run that gets a signal."""
    run = program(tmp_path, WAITS)
    code = (
        "import sys; from pathlib import Path; from kimi_gguf.engine.quantize import quantize\n"
        "from kimi_gguf.engine.interrupts import terminable\n"
        "with terminable(): quantize(Path(sys.argv[1]), Path(sys.argv[2]), [sys.argv[3], 'Q8_0'])"
    )
    words = [sys.executable, "-c", code, run, model, tmp_path / "out.gguf"]
    with subprocess.Popen(
        list(map(str, words)), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (waiting := run.with_name("waiting").exists()) and time.monotonic() < deadline:
            time.sleep(0.01)
        meanwhile = names(tmp_path)
        if by == signal.SIGKILL:  # llama-quantize ends, too
            os.killpg(process.pid, by)
        else:
            process.send_signal(by)
        _, said = process.communicate(timeout=60)
    assert waiting
    return meanwhile, said


def test_an_interruption_leaves_nothing(model: Path, tmp_path: Path) -> None:
    meanwhile, said = interrupted(tmp_path, model, signal.SIGTERM)
    assert "out.gguf" not in meanwhile
    assert len(meanwhile) == 2  # the model and a hidden folder
    assert "KeyboardInterrupt" in said
    assert names(tmp_path) == {"in.gguf"}


def test_what_a_killed_run_left_is_removed_by_the_next(model: Path, tmp_path: Path) -> None:
    interrupted(tmp_path, model, signal.SIGKILL)
    (tmp_path / ".other.gguf.unfinished-x").mkdir()
    assert len(names(tmp_path)) == 3
    run = program(tmp_path, WRITES)
    assert quantize(run, model, [str(tmp_path / "out.gguf"), "Q8_0"]) == 0
    assert names(tmp_path) == {"in.gguf", "out.gguf", ".other.gguf.unfinished-x"}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("X Q8_0", "x" * 5000 + ".gguf"),
        ("X Q8_0 --keep-split", "in.gguf/x.gguf"),
        ("out.gguf Q8_0 --imatrix X", "zero\0byte.gguf"),
    ],
)
def test_a_path_that_cannot_exist_is_refused(words: str, name: str, model: Path, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    with pytest.raises(EngineError, match="expected a path that the file system accepts"):
        quantize(program(tmp_path, WRITES), model, [path if word == "X" else word for word in words.split()])
    assert names(tmp_path) == {"in.gguf"}


def test_splits_are_moved_together(tmp_path: Path) -> None:
    first = tmp_path / "in-00001-of-00002.gguf"
    first.write_bytes(b"GGUF")
    given = [str(tmp_path / "out.gguf"), "Q8_0", "--keep-split"]
    assert quantize(program(tmp_path, SPLITS), first, given) == 0
    assert [(tmp_path / f"out-0000{i}-of-00002.gguf").read_text() for i in (1, 2)] == ["1", "2"]


def test_an_interruption_while_splits_are_moved_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "in-00001-of-00002.gguf"
    first.write_bytes(b"GGUF")
    outputs = [tmp_path / f"out-0000{i}-of-00002.gguf" for i in (1, 2)]
    for path in outputs:
        path.write_text("earlier")
    move = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if target == outputs[0]:
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(program(tmp_path, SPLITS), first, [str(tmp_path / "out.gguf"), "Q8_0", "--keep-split"])
    assert outputs[1].read_text() == "2" and not outputs[0].exists()


def test_a_dry_run_needs_no_output(model: Path, tmp_path: Path) -> None:
    run = program(tmp_path, "exit 0\n")
    assert quantize(run, model, ["Q8_0", "--dry-run"]) == 0
    assert seen_by(run) == ["--dry-run", str(model), "Q8_0"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            ["--pure", "out.gguf", "Q8_0"],
            "the output, the type and the number of threads before options, found --pure",
        ),
        (["out.gguf", "Q8_0", "--pure", "2"], "number of threads before options, found 2 after --pure"),
        (["out.gguf", "Q8_0", "--imatrix", "i", "2"], "found 2 after --imatrix"),
        (["out.gguf", "Q8_0", "--imatrix"], "--imatrix: expected a value"),
        (["out.gguf", "Q8_0", "--imatrix", "--pure"], "--imatrix: expected a value"),
        (["Q8_0"], "a name that ends in .gguf, and the type after it, found Q8_0"),
        (["Q8_0", "4"], "a name that ends in .gguf, and the type after it, found Q8_0 4"),
        ([], "found nothing"),
        (["in.gguf", "Q8_0"], "is the model itself"),
        (["absent/out.gguf", "Q8_0"], "no such folder"),
        (["folder.gguf", "Q8_0"], "is a folder"),
        (["/proc/out.gguf", "Q8_0"], r"^/proc/out\.gguf: cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.gguf").mkdir()
    run = program(tmp_path, WRITES)
    with pytest.raises(EngineError, match=reason):
        quantize(run, Path("in.gguf"), given)
    assert not run.with_name("arguments").exists()
    assert model.read_bytes() == b"GGUF"


@pytest.mark.engine
def test_the_real_program_writes_the_same_bytes(
    tmp_path: Path, engine: Engine, demo_gguf: Callable[[str], Path]
) -> None:
    direct, moved, model = tmp_path / "direct.gguf", tmp_path / "moved.gguf", demo_gguf("BF16")
    command = [engine.bin / "llama-quantize", model, direct, "Q8_0"]
    subprocess.run(command, check=True, capture_output=True)
    assert quantize(engine.bin / "llama-quantize", model, [str(moved), "Q8_0"]) == 0
    assert moved.read_bytes() == direct.read_bytes()
