"""Runs llama-quantize so that its output appears complete under its name, or not at all.

Input: the program, the model, the arguments after it. Output: the files, and the program's exit status. It writes to a
hidden folder next to the output, from which the finished files are moved; its messages name the output.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

from kimi_gguf.engine.errors import EngineError, UsageError
from kimi_gguf.engine.folder_lock import folder_lock
from kimi_gguf.engine.interrupts import exit_status, shell_status
from kimi_gguf.engine.path_check import check_path
from kimi_gguf.engine.split_names import place_in_set, split_paths

DRY_RUN, KEEP_SPLIT, IMATRIX = "--dry-run", "--keep-split", "--imatrix"
# llama-quantize's options, and how many words follow each.
OPTIONS: Final = {
    **dict.fromkeys(
        ("--help", "--allow-requantize", "--leave-output-tensor", "--pure", KEEP_SPLIT, DRY_RUN), 0
    ),
    **dict.fromkeys((IMATRIX, "--include-weights", "--exclude-weights", "--output-tensor-type"), 1),
    **dict.fromkeys(("--token-embedding-type", "--tensor-type", "--tensor-type-file", "--prune-layers"), 1),
    **dict.fromkeys(("--override-kv", "--max-buffer-size"), 1),
}
_SUFFIX: Final = ".gguf"


def quantize(program: Path, model: Path, given: Sequence[str]) -> int:
    """Quantize `model`; return the exit status. Raises `EngineError` for arguments that it cannot pass on.

    given: the output, the type, perhaps a number of threads, then options. If it fails or is interrupted, nothing is
    left, and a file that had the output's name before is unchanged. What a killed run left is removed by the next one.
    """
    words, options, output = check_arguments(model, given)
    if output is None:
        return exit_status([str(program), *options, str(model), *words])
    with _own_folder(output) as folder:
        hidden = Path(folder, output.name)
        status = _run(
            [str(program), *options, str(model), str(hidden), *words[1:]],
            str(hidden).removesuffix(output.name),
            str(output).removesuffix(output.name),
        )
        if status == 0:
            _take_names(sorted(Path(folder).iterdir()), output.parent)
    return status


def check_arguments(model: Path, given: Sequence[str]) -> tuple[list[str], list[str], Path | None]:
    """(output, type and threads; options; the output, None for a dry run). Raises `EngineError` for what cannot be
    written, before a program or a build is needed. given: as for `quantize`."""
    words, options = split_arguments(model, given)
    _check_options(model, options)
    for option, value in pairwise(options):
        if option == IMATRIX:
            check_path(Path(value))
    if DRY_RUN in options:
        return words, options, None
    output = Path(words[0]) if len(words) > 1 else None
    if output is None or output.suffix != _SUFFIX:
        raise UsageError(
            "quantize: no output",
            expected="a name that ends in .gguf, and the type after it",
            found=" ".join(words) or "nothing",
            todo=_usage(model),
        )
    inputs = (place_in_set(model) or (1, [model]))[1]
    outputs = split_paths(output, len(inputs)) if KEEP_SPLIT in options else [output]
    _check(inputs, outputs)
    return words, options, output


def _run(command: Sequence[str], hidden: str, shown: str) -> int:
    """The exit status of a command, as `exit_status`. Its messages on standard error have `shown` instead of
    `hidden`."""
    if sys.stderr is None:  # closed
        return exit_status(command)
    name, other, held = os.fsencode(hidden), os.fsencode(shown), b""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            while said := os.read(process.stderr.fileno(), 1 << 16):
                said = (held + said).replace(name, other)
                # what may be the beginning of the name waits for the rest; lines are not awaited: they are progress
                begun = next((n for n in range(len(name) - 1, 0, -1) if said.endswith(name[:n])), 0)
                said, held = said[: len(said) - begun], said[len(said) - begun :]
                sys.stderr.buffer.write(said)
                sys.stderr.flush()
            sys.stderr.buffer.write(held)
            sys.stderr.flush()
        except BaseException:
            process.kill()
            process.wait()
            raise
    return shell_status(process.returncode)


@contextmanager
def _own_folder(output: Path) -> Iterator[str]:
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
            todo=_usage(model),
        )
    return list(given[:first]), list(given[first:])


def _usage(model: Path) -> str:
    return f"write: kimi-llama quantize {model} OUTPUT.gguf TYPE [THREADS] [--OPTION ...]"


def _check_options(model: Path, options: Sequence[str]) -> None:
    """Raise `UsageError` for a word that belongs to no option, and for an option without its value: llama-quantize
    would take one file for another. What follows an option that is not known here is left to llama-quantize."""
    option, missing = "", 0
    for word in (*options, "--"):
        if word.startswith("--"):
            if missing > 0:
                raise UsageError(
                    f"quantize: {option}", expected="a value", found="nothing", todo=_usage(model)
                )
            option, missing = word, OPTIONS.get(word, -1)
        elif missing == 0:
            raise UsageError(
                "quantize: wrong order",
                expected="the output, the type and the number of threads before options",
                found=f"{word} after {option}",
                todo=_usage(model),
            )
        else:
            missing -= 1


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
