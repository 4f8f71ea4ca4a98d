"""Runs llama-quantize so that its output appears complete under its name, or not at all.

Input: the program, the model, the arguments after it. Output: the files, and the program's exit status. It writes to a
hidden folder next to the output, from which the finished files are moved.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

from kimi_gguf.engine.errors import EngineError, UsageError
from kimi_gguf.engine.interrupts import exit_status
from kimi_gguf.engine.path_check import check_path
from kimi_gguf.engine.split_names import place_in_set, split_paths

DRY_RUN, KEEP_SPLIT, IMATRIX = "--dry-run", "--keep-split", "--imatrix"
_SUFFIX: Final = ".gguf"


def quantize(program: Path, model: Path, given: Sequence[str]) -> int:
    """Quantize `model`; return the exit status. Raises `EngineError` for arguments that it cannot pass on.

    given: the output, the type, perhaps a number of threads, then options. If it fails or is interrupted, nothing is
    left, and a file that had the output's name before is unchanged. What a killed run left is removed by the next one.
    """
    words, options = split_arguments(model, given)
    for option, value in pairwise(options):
        if option == IMATRIX:
            check_path(Path(value))
    if DRY_RUN in options:
        return exit_status([str(program), *options, str(model), *words])
    output = Path(words[0]) if len(words) > 1 else None
    if output is None or output.suffix != _SUFFIX:
        raise UsageError(
            "quantize: no output",
            expected="a name that ends in .gguf, and the type after it",
            found=" ".join(words) or "nothing",
            todo=f"write: kimi-llama quantize {model} OUTPUT.gguf TYPE [--OPTION ...]",
        )
    inputs = (place_in_set(model) or (1, [model]))[1]
    outputs = split_paths(output, len(inputs)) if KEEP_SPLIT in options else [output]
    _check(inputs, outputs)
    with _own_folder(output) as folder:
        status = exit_status([str(program), *options, str(model), str(Path(folder, output.name)), *words[1:]])
        if status == 0:
            _take_names(sorted(Path(folder).iterdir()), output.parent)
    return status


@contextmanager
def _own_folder(output: Path) -> Iterator[str]:
    """A hidden folder next to the output, locked while it exists. Those of processes that were killed are removed."""
    prefix = f".{output.name:.50}.unfinished-"
    for path in output.parent.iterdir():
        if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink():
            with suppress(BlockingIOError, FileNotFoundError), _locked(path):
                shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=prefix) as folder, _locked(Path(folder)):
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises `BlockingIOError` if another process has locked the folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


def _take_names(files: Sequence[Path], folder: Path) -> None:
    """Move the splits of a model to a folder. No set is complete there until all are of this run: the first is last."""
    first, others = files[:1], files[1:]
    if others:
        (folder / first[0].name).unlink(missing_ok=True)
    for path in (*others, *first):
        path.replace(folder / path.name)


def split_arguments(model: Path, given: Sequence[str]) -> tuple[list[str], list[str]]:
    """(output, type and threads; options). llama-quantize reads options before its files only."""
    first = next((i for i, word in enumerate(given) if word.startswith("--")), len(given))
    if first == 0 and given:
        raise UsageError(
            "quantize: wrong order",
            expected="the output and the type before options",
            found=given[0],
            todo=f"write: kimi-llama quantize {model} OUTPUT.gguf TYPE [--OPTION ...]",
        )
    return list(given[:first]), list(given[first:])


def _check(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    for path in outputs:
        check_path(path)
    folder = outputs[0].parent
    if not folder.is_dir():
        raise EngineError(f"{folder}: no such folder", todo="make it, or name another output")
    for path in outputs:
        if path.is_dir():
            raise EngineError(f"{path}: is a folder", todo="name another output")
        if path.exists() and any(each.exists() and path.samefile(each) for each in inputs):
            raise EngineError(f"{path}: is the model itself", todo="name another output")
