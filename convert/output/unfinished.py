"""An output that is written to a hidden folder and renamed when it is complete; an interrupted one can be resumed.

Input: the files' names and sizes, their bytes in order, and the points at which a step is finished. Output: all
files under their names, or a hidden folder `.NAME.unfinished` with the data so far and a journal.

A step is entered in the journal only after its data are on the disk, so that the journal is correct even after a
power failure. When all files are complete, the journal records this and the files' stamps before they are renamed;
if the process ends in between, the next run completes the renaming or removes the files. Of several files the first
one, through which the others are opened, is renamed last, and an old file of this name is removed before. A model
that can be loaded is therefore never a mixture of two runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kimi_gguf.convert.errors import ConvertError, ReadError
from kimi_gguf.convert.output import journal
from kimi_gguf.convert.output.growing import Growing
from kimi_gguf.engine.file_hash import Digest
from kimi_gguf.engine.tensor_types import Bytes

SYNC_SECONDS = 1.0  # minimum time between journal entries
_FORMAT: Final = 2


@dataclass(frozen=True)
class Identity:
    """Hashes of everything that determines an output; --resume requires the same identity."""

    plan: str  # hash of options and layout
    sources: str  # hash of the input files' names, sizes, times and headers


@dataclass(frozen=True)
class Layout:
    """The files of an output; known before it is written."""

    files: tuple[tuple[str, int], ...]  # names and bytes, in order; all in the output's folder
    places: tuple[tuple[int, int], ...]  # by the finished steps: the file (from 0) and offset to continue at


class Unfinished:
    """The growing output; made by `unfinished`."""

    def __init__(self, folder: Path, layout: Layout, done: int) -> None:
        self.done = done  # number of steps that an earlier run finished
        self.noted = done
        self.names = [name for name, _ in layout.files]
        number, end = layout.places[done]
        self.missing = sum(size for _, size in layout.files[number:]) - end  # bytes still to be written
        self._folder = folder
        self._layout = layout
        self._file: Growing | None = None
        self._synced = time.monotonic()

    @property
    def at(self) -> int:
        """Bytes written so far to the current file."""
        return self._growing.at

    def kept(self, number: int) -> Path:
        """Where the file is that an earlier run wrote: still in the folder, or already renamed."""
        hidden = self._folder / self.names[number]
        return hidden if hidden.exists() else self._folder.with_name(hidden.name)

    def begin(self, number: int) -> None:
        """Open a file at its beginning, or after the finished steps. Raises `OSError`."""
        place, end = self._layout.places[self.done]
        self._file = Growing(self._folder / self.names[number], end if number == place else 0)

    def write(self, data: Bytes) -> None:
        """Append to the current file. Raises `OSError`, possibly for an earlier write."""
        self._growing.write(data)

    def finished(self, done: int, digest: Digest | None = None) -> None:
        """Report that `done` steps are written; entered in the journal every SYNC_SECONDS, with the SHA-256 of the
        current file so far if there is a `digest` of it."""
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._growing.settle()
            self._note(done, digest)

    def end(self, done: int, digest: Digest | None = None) -> None:
        """Complete the current file and with it `done` steps."""
        self._growing.complete()
        self.close()
        self._note(done, digest)

    def noted_hash(self, done: int) -> str | None:
        """The SHA-256 that the journal has for the file of step `done` up to its end; None if it has none."""
        found = [entry.get("sha256") for entry in journal.entries(self._folder) if entry.get("done") == done]
        return next((sha256 for sha256 in found if isinstance(sha256, str)), None)

    def add(self, name: str, content: bytes) -> None:
        """Add a small file that is renamed together with the others. Raises `OSError`."""
        with (self._folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.names.append(name)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _growing(self) -> Growing:
        if self._file is None:
            raise AssertionError("no file was begun")
        return self._file

    def _note(self, done: int, digest: Digest | None) -> None:
        journal.append(self._folder, {"done": done} | ({"sha256": digest.hexdigest()} if digest else {}))
        self.noted = done
        self._synced = time.monotonic()


@contextmanager
def unfinished(
    path: Path, layout: Layout, identity: Identity, resume: bool, overwrite: bool
) -> Iterator[Unfinished]:
    """The unfinished output `path`; with `resume` it continues after its last finished step.

    When the block ends without an error, the files are renamed. After an interrupt, or an error of the disk or the
    source, they are kept with their journal if a step is finished, and also if a file with the name of one of them
    was created meanwhile; after any other error they are removed. Raises `ConvertError` if another process writes the
    output, if it was started with another identity, or if data of an earlier run would be discarded and neither
    `resume` nor `overwrite` is set.
    """
    folder = folder_of(path)
    lock = journal.locked(folder, path)
    work: Unfinished | None = None
    keep = True
    try:
        if not resume and not overwrite and (size := sum(map(_size, _left_behind(path)))):
            what = f"keeps {size:,} bytes of an earlier run"
            todo = "--resume continues it (with the same checkpoint and options), --force discards it"
            raise ConvertError(f"{folder}: {what}", todo=todo)
        done = _steps_done(path, layout, identity) if resume else 0
        keep = False
        if done == 0:
            _clear(path)
            os.truncate(folder / journal.JOURNAL, 0)
            journal.append(folder, {"format": _FORMAT, "plan": identity.plan, "sources": identity.sources})
        work = Unfinished(folder, layout, done)
        yield work
        ours = taken(path, resume=True)
        keep = bool(ours)
        for name in work.names:
            if (target := path.with_name(name)).exists() and not overwrite and target not in ours:
                keep = True
                what = "was created by another program during the conversion"
                todo = f"continue with --resume --force, which overwrites it ({folder.name} is kept and complete)"
                raise ConvertError(f"{target}: {what}", todo=todo)
        keep = True
        _take_names(path, work.names)
        keep = False
    except (KeyboardInterrupt, OSError, ReadError) as error:
        keep = keep or (work is not None and work.noted > 0)
        if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):  # nobody reads the progress
            raise
        kept = f"free disk space, then continue with --resume ({folder.name} is kept)"
        todo = kept if keep else "nothing was written"
        raise ConvertError(f"{path}: cannot be written: {error.strerror or error}", todo=todo) from None
    finally:
        if work is not None:
            work.close()
        if not keep:
            _remove(path)
        os.close(lock)


def folder_of(path: Path) -> Path:
    """The folder for the unfinished files of an output."""
    return path.with_name(f".{path.name}.unfinished")


def leftover(path: Path) -> Path | None:
    """The unfinished output of an earlier run, if there is one."""
    folder = folder_of(path)
    return folder if folder.exists() else None


def taken(path: Path, resume: bool) -> set[Path]:
    """The files of an unfinished run that were already renamed.

    If the first file, which is renamed last, is among them, the output is finished and must not be removed; the
    files are then returned only with `resume`.
    """
    noted = {path.with_name(name): mark for name, mark in journal.whole(folder_of(path)).items()}
    found = {target for target, mark in noted.items() if journal.stamp(target) == mark}
    finished = bool(noted) and next(iter(noted)) in found
    return set() if finished and not resume else found


def _take_names(path: Path, names: Sequence[str]) -> None:
    """Rename the files of the folder, except those that were already renamed."""
    folder = folder_of(path)
    moves = [(folder / name, path.with_name(name)) for name in names]
    stamps = {target.name: journal.stamp(hidden) or journal.stamp(target) for hidden, target in moves}
    journal.append(folder, {"whole": stamps})
    (first, found), *others = moves
    if others and first.exists():
        found.unlink(missing_ok=True)
    for hidden, target in others:
        if hidden.exists():
            hidden.replace(target)
    _sync_folder(path.parent)
    if first.exists():
        first.replace(found)
    _sync_folder(path.parent)


def _steps_done(path: Path, layout: Layout, identity: Identity) -> int:
    """Number of finished steps according to the journal; 0 if there is nothing to continue."""
    folder = folder_of(path)
    noted = journal.entries(folder)
    here = {name: _size(folder / name) for name, _ in layout.files}
    ours = {target.name for target in taken(path, resume=True)}
    if not any(here.values()) and not ours:
        return 0
    file = folder / journal.JOURNAL
    remedy = journal.start_again(folder)
    if not noted or noted[0].get("format") != _FORMAT:
        raise ConvertError(f"{file}: not a journal of this version", todo=remedy)
    if noted[0].get("sources") != identity.sources:
        raise ConvertError(f"{file}: is of another checkpoint, or the checkpoint has changed", todo=remedy)
    if noted[0].get("plan") != identity.plan:
        raise ConvertError(f"{file}: was started with other options or another version", todo=remedy)
    marks = [done for entry in noted[1:] if isinstance(done := entry.get("done"), int)]
    if not marks:
        return 0
    if not 0 <= marks[-1] < len(layout.places):
        most = len(layout.places) - 1
        raise ConvertError(file, expected=f"at most {most} steps", found=f"{marks[-1]}", todo=remedy)
    number, end = layout.places[marks[-1]]
    for i, (name, size) in enumerate(layout.files[: number + 1]):
        if name in ours or (here[name] == size if i < number else here[name] >= end):
            continue
        expected = f"{size} bytes" if i < number else f"at least {end} bytes"
        raise ConvertError(f"{folder / name}", expected=expected, found=f"{here[name]}", todo=remedy)
    journal.remove_incomplete_line(folder)
    return marks[-1]


def _remove(path: Path) -> None:
    with suppress(OSError):
        _clear(path)
        (folder_of(path) / journal.JOURNAL).unlink()  # last: the lock is on it
        folder_of(path).rmdir()


def _clear(path: Path) -> None:
    for file in _left_behind(path):
        file.unlink(missing_ok=True)


def _left_behind(path: Path) -> list[Path]:
    """The already renamed files of an unfinished run, and the files of its folder but the journal."""
    here = [file for file in folder_of(path).iterdir() if file.name != journal.JOURNAL]
    return [*taken(path, resume=False), *here]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sync_folder(folder: Path) -> None:
    """Sync the folder, so that renames persist; ignored if folders cannot be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
