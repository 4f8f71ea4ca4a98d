"""The commands start quickly, and end without a traceback: after Ctrl-C, without a reader, for impossible paths."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import tiny_llama

from kimi_gguf.convert.cli import main as convert_kimi
from kimi_gguf.engine.interrupts import INTERRUPTED, NO_READER, interrupt_ends_process
from kimi_gguf.scripts import commands
from kimi_gguf.scripts.kimi_llama import main as kimi_llama
from kimi_gguf.validate.cli import main as validate_kimi

ROOT = Path(__file__).parents[1]
PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# A package whose import is interrupted and makes another error of it, as NumPy's does.
INTERRUPTED_IMPORT = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    raise ImportError("a package is broken") from None
"""


def run(
    code: str,
    *words: str,
    first: Path | None = None,
    output: int = subprocess.PIPE,
    errors: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    """Run Python code; modules are looked up in the folder `first` before all others."""
    path = os.pathsep.join(map(str, filter(None, [first, ROOT / "src"])))
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONPATH": path},
        stdout=output,
        stderr=errors,
        text=True,
        timeout=60,
        check=False,
    )


def start(program: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as its file in bin/ does; options: those of `run`."""
    module, _, function = PROGRAMS[program].partition(":")
    return run(
        f"import sys\nfrom {module} import {function}\nsys.exit({function}())",
        *words,
        **options,
    )


def test_each_entry_point_exists() -> None:
    found = {name: EntryPoint(name, value, "console_scripts").load() for name, value in PROGRAMS.items()}
    assert found == {
        "convert-kimi": commands.convert_kimi,
        "validate-kimi": commands.validate_kimi,
        "kimi-llama": commands.kimi_llama,
    }


def test_only_a_validation_needs_the_packages_of_its_extra() -> None:
    code = """if True:
        import sys
        sys.modules |= dict.fromkeys(("torch", "safetensors", "matplotlib"))  # importing them fails
        from kimi_gguf.validate.cli import main
        for words in (["--version"], ["--help"], ["card", "--help"], ["show", "--help"], ["--wrong"], ["card"]):
            try:
                main(words)
            except SystemExit as ended:
                print("status", ended.code)
        print("status", main(["show", sys.argv[1]]))
    """
    ended = run(code, str(ROOT / "tests/golden/report.json"))
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    statuses = [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("status ")]
    assert statuses == ["0", "0", "0", "0", "2", "2", "0"]


@pytest.mark.parametrize(
    ("program", "package", "words"),
    [
        ("convert-kimi", "numpy", ()),
        ("kimi-llama", "numpy", ()),
        ("validate-kimi", "numpy", ()),
        ("validate-kimi", "torch", ("x.gguf", "--checkpoint", "x")),
    ],
)
def test_an_interrupted_import_ends_quietly(
    program: str, package: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / f"{package}.py").write_text(INTERRUPTED_IMPORT)
    ended = start(program, *words, first=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (INTERRUPTED, "", "")


def test_more_interrupts_end_quietly() -> None:
    """The second comes while the first is handled, the third while Python ends."""
    code = """if True:
        import atexit, os, signal, sys, time
        from kimi_gguf.scripts import commands
        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        def main():
            try:
                interrupt()
            except KeyboardInterrupt:
                print("handled")
                interrupt()
        atexit.register(interrupt)
        sys.exit(commands._run(lambda: main))
    """
    ended = run(code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (INTERRUPTED, "handled\n", "")


@contextmanager
def unread() -> Iterator[int]:
    """A pipe to write to whose reader has ended."""
    end, pipe = os.pipe()
    os.close(end)
    yield pipe
    os.close(pipe)


@pytest.mark.parametrize("unbuffered", ["", "1"])  # with a buffer, all is written while the command ends
@pytest.mark.parametrize(
    "words",
    [
        "convert-kimi inspect demo",
        "kimi-llama doctor",
        "validate-kimi show tests/golden/report.json",
        "convert-kimi --help",
        "kimi-llama run --help",
        "validate-kimi --version",
    ],
)
def test_output_that_nobody_reads_ends_quietly(
    words: str, unbuffered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    monkeypatch.setenv("KIMI_GGUF_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    with unread() as pipe:
        ended = start(*words.split(), output=pipe)
    # argparse of Python 3.11.7 does not say that it could not write, that of 3.11.2 does
    silent = unbuffered and words.split()[-1].startswith("--")
    assert ended.returncode in ({0, NO_READER} if silent else {NO_READER})
    assert ended.stderr == ""


def test_an_error_that_nobody_reads_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    with unread() as pipe:
        ended = start("kimi-llama", "run", "absent.gguf", errors=pipe)
    assert (ended.returncode, ended.stdout) == (NO_READER, "")


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_imports_leave_the_handler_as_it_was(handler: signal._HANDLER) -> None:
    """An ignored Ctrl-C stays ignored during them, as in a job in the background."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with interrupt_ends_process():
            assert (signal.getsignal(signal.SIGINT) is signal.SIG_IGN) == (handler is signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "words",
    [
        "convert-kimi checkpoint -o X",
        "convert-kimi checkpoint -o out.gguf --imatrix X",
        "convert-kimi checkpoint -o out.gguf --chat-template X",
        "convert-kimi inspect X",
        "convert-kimi verify X --checkpoint checkpoint",
        "validate-kimi X --checkpoint checkpoint",
        "validate-kimi model.gguf --checkpoint checkpoint --out X",
        "validate-kimi card X --checkpoint checkpoint",
        "validate-kimi show model.gguf X",
        "kimi-llama run X",
        "kimi-llama chat X",
        "kimi-llama serve model.gguf -md X",
        "kimi-llama quantize X out.gguf Q8_0",
        "kimi-llama bench --records model.gguf X",
        "kimi-llama build --source X",
        "kimi-llama export-patches X",
    ],
)
def test_a_path_that_cannot_exist_is_one_message(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(tiny_llama.NO_TENSORS)
    program, *arguments = words.split()
    main = {"convert-kimi": convert_kimi, "validate-kimi": validate_kimi, "kimi-llama": kimi_llama}[program]
    for name, shown, found in (
        (f"{'x' * 5000}.gguf", f"{'x' * 40}...{'x' * 32}.gguf", os.strerror(errno.ENAMETOOLONG)),
        ("model.gguf/x.gguf", "model.gguf/x.gguf", "model.gguf is a file"),
        ("zero\0byte.gguf", "zero\0byte.gguf", "a zero byte"),
    ):
        status = main([name if word == "X" else word for word in arguments])
        assert status == (2 if program == "validate-kimi" else 1)
        said = f"{shown}: expected a path that the file system accepts, found {found}; name another path"
        assert capsys.readouterr().err == f"{program}: error: {said}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
