"""Runs a program of llama.cpp so that its output appears complete under its name, or not at all.

The program writes to a hidden folder next to the output, from which finished files are moved; its messages name the
output. What a killed run left is removed by the next one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.folder_lock import folder_lock
from kimi_gguf.engine.interrupts import exit_status, shell_status
from kimi_gguf.engine.path_check import check_path


def run_for_output(output: Path, command: Callable[[Path], Sequence[str]], *, inside: bool = False) -> int:
    """Run the command that writes `output`; return its exit status. If it is not 0, files of the output's name are
    as before.

    command: given the hidden path to write to, returns the words of the command. It may write several files, such as
    the splits of a model: all get their names. Copies that a program makes on request while it runs (NAME.at_N) are
    complete, and kept also if it fails. inside: the command runs in the hidden folder and gets a name without a folder.
    """
    with hidden_folder(output) as folder:
        hidden = Path(folder, output.name)
        try:
            status = _run(
                command(Path(output.name) if inside else hidden),
                str(hidden).removesuffix(output.name),
                str(output).removesuffix(output.name),
                Path(folder) if inside else None,
            )
        finally:
            for copy in Path(folder).glob("*.at_*"):
                copy.replace(output.with_name(copy.name))
        if status == 0:
            _take_names(sorted(Path(folder).iterdir()), output.parent)
    return status


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path] = ()) -> None:
    """Raise `EngineError` if the outputs cannot be written, or are among the inputs."""
    for path in outputs:
        check_path(path)
    folder = outputs[0].parent
    if not folder.is_dir():
        raise EngineError(f"{folder}: no such folder", todo="make it, or name another output")
    for path in outputs:
        if path.is_dir():
            raise EngineError(f"{path}: is a folder", todo="name another output")
        if path.exists() and any(model.exists() and path.samefile(model) for model in inputs):
            raise EngineError(f"{path}: is the model itself", todo="name another output")


def _run(command: Sequence[str], hidden: str, shown: str, folder: Path | None) -> int:
    """The exit status of a command, as `exit_status`. Its messages on standard error have `shown` instead of
    `hidden`. folder: where it runs."""
    if sys.stderr is None:  # closed
        return exit_status(command, folder)
    name, other, held = os.fsencode(hidden), os.fsencode(shown), b""
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            while text := os.read(process.stderr.fileno(), 1 << 16):
                text = (held + text).replace(name, other)
                # what may be the beginning of the name waits for the rest; lines are not awaited: they are progress
                begun = next((n for n in range(len(name) - 1, 0, -1) if text.endswith(name[:n])), 0)
                text, held = text[: len(text) - begun], text[len(text) - begun :]
                sys.stderr.buffer.write(text)
                sys.stderr.flush()
            sys.stderr.buffer.write(held)
            sys.stderr.flush()
        except BaseException:
            process.kill()
            process.wait()
            raise
    return shell_status(process.returncode)


@contextmanager
def hidden_folder(output: Path) -> Iterator[str]:
    """A hidden folder next to the output, locked while it exists. Those of processes that were killed are removed."""
    prefix = f".{output.name:.50}.unfinished-"
    for path in output.parent.iterdir():
        if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink():
            with suppress(OSError), folder_lock(path, wait=False) as locked:
                if locked:
                    shutil.rmtree(path, ignore_errors=True)
    try:
        made = tempfile.TemporaryDirectory(dir=output.parent, prefix=prefix)
    except OSError as error:
        raise EngineError(
            f"{output}: cannot be written: {error.strerror}", todo="nothing was written"
        ) from None
    with made as folder, folder_lock(Path(folder), wait=False):
        yield folder


def _take_names(files: Sequence[Path], folder: Path) -> None:
    """Move the splits of a model to a folder. No set is complete there until all are of this run: the first is last."""
    first, rest = files[:1], files[1:]
    if rest:
        (folder / first[0].name).unlink(missing_ok=True)
    for path in (*rest, *first):
        path.replace(folder / path.name)
