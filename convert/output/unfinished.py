"""An output that grows beside its place: one writer at a time, takes its names when whole, can be gone on with.

Flows in: the files' names and sizes, their bytes in order, and marks where something is finished. Flows out: all
files under their names, or a hidden folder `.NAME.unfinished` with what is there of them and a journal of what in
it is finished and safe on disk.

A mark is noted only after the data before it are on the disk, so that a journal never promises more than is there,
whatever ends the process or the machine. Before the files take their names it notes that all are whole, and what
tells them from others: a run ended in between is finished, or cleared away, by the next one. Of several files the
first, by which all are found, takes its name last, and an old one of that name makes room before: what can be loaded is
never a mixture of two runs.
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
from kimi_gguf.convert.output.growing import Growing
from kimi_gguf.convert.output.journal import JOURNAL, append, entries, locked, mend, stamp, whole
from kimi_gguf.engine.tensor_types import Bytes

SYNC_SECONDS = 1.0  # between marks that are noted
_FORMAT: Final = 2


@dataclass(frozen=True)
class Identity:
    """What the bytes of an output follow from; one begun with another identity is not gone on with."""

    plan: str  # hash of options and layout
    sources: str  # hash of the input files' names, sizes, times and headers


@dataclass(frozen=True)
class Layout:
    """What an output consists of, known before it is written."""

    files: tuple[tuple[str, int], ...]  # names and bytes, in order; all in the output's folder
    places: tuple[tuple[int, int], ...]  # after so many steps: the file (from 0 on) and its byte to go on at


class Unfinished:
    """The growing output; made by `unfinished`."""

    def __init__(self, folder: Path, layout: Layout, done: int) -> None:
        self.done = done  # steps that were finished before: go on there
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
        """Bytes so far of the file at hand."""
        return self._growing.at

    def begin(self, number: int) -> None:
        """Go to a file: from its beginning, or where the finished steps end. Raises `OSError`."""
        place, end = self._layout.places[self.done]
        self._file = Growing(self._folder / self.names[number], end if number == place else 0)

    def write(self, data: Bytes) -> None:
        """Append to the file at hand. Raises `OSError`, perhaps of an earlier piece."""
        self._growing.write(data)

    def finished(self, done: int) -> None:
        """All bytes of `done` steps are written; noted in the journal now and then."""
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._growing.settle()
            self._note(done)

    def end(self, done: int) -> None:
        """The file at hand is complete, and with it `done` steps."""
        self._growing.complete()
        self.close()
        self._note(done)

    def add(self, name: str, content: bytes) -> None:
        """One small file more, which takes its name with the others. Raises `OSError`."""
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

    def _note(self, done: int) -> None:
        append(self._folder, {"done": done})
        self.noted = done
        self._synced = time.monotonic()


@contextmanager
def unfinished(
    path: Path, layout: Layout, identity: Identity, resume: bool, overwrite: bool
) -> Iterator[Unfinished]:
    """The unfinished output `path`, from its last finished step with `resume`, else from the beginning.

    When the block ends well its files take their names. After an interrupt, a failing disk or a failing source
    they stay with their journal if anything in them is finished; after any other error they vanish. Raises
    `ConvertError` when somebody else writes the output, or when it was begun with another identity.
    """
    folder = folder_of(path)
    lock = locked(folder, path)
    work: Unfinished | None = None
    keep = True
    try:
        done = _steps_done(path, layout, identity) if resume else 0
        keep = False
        if done == 0:
            _begin_anew(path)
            append(folder, {"format": _FORMAT, "plan": identity.plan, "sources": identity.sources})
        work = Unfinished(folder, layout, done)
        yield work
        ours = taken(path, resume=True)
        keep = bool(ours)
        for name in work.names:
            if (target := path.with_name(name)).exists() and not overwrite and target not in ours:
                raise ConvertError(f"{target}: was made by someone else meanwhile; choose another name")
        keep = True
        _take_names(path, work.names)
        keep = False
    except (KeyboardInterrupt, OSError, ReadError) as error:
        keep = keep or (work is not None and work.noted > 0)
        if not isinstance(error, OSError):
            raise
        left = (
            f"make room or mend it, then go on with --resume ({folder.name})" if keep else "nothing was left"
        )
        raise ConvertError(f"{path}: cannot be written: {error.strerror or error}; {left}") from None
    finally:
        if work is not None:
            work.close()
        if not keep:
            _remove(path)
        os.close(lock)


def folder_of(path: Path) -> Path:
    """Where the unfinished files of an output lie."""
    return path.with_name(f".{path.name}.unfinished")


def leftover(path: Path) -> Path | None:
    """The unfinished output of an earlier run, if there is one."""
    folder = folder_of(path)
    return folder if folder.exists() else None


def taken(path: Path, resume: bool) -> set[Path]:
    """The files of an unfinished run that have taken their names already. When its first file has, which is the
    last to do so, the output was finished and is nobody's to clear away: it counts with `resume` only."""
    noted = {path.with_name(name): mark for name, mark in whole(folder_of(path)).items()}
    found = {target for target, mark in noted.items() if stamp(target) == mark}
    finished = bool(noted) and next(iter(noted)) in found
    return set() if finished and not resume else found


def _take_names(path: Path, names: Sequence[str]) -> None:
    """Give the files of the folder their names, but for those that have them already."""
    folder = folder_of(path)
    moves = [(folder / name, path.with_name(name)) for name in names]
    append(folder, {"whole": {target.name: stamp(hidden) or stamp(target) for hidden, target in moves}})
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
    """How many steps the journal calls finished, 0 where there is nothing to go on from."""
    folder = folder_of(path)
    noted = entries(folder)
    here = {name: _size(folder / name) for name, _ in layout.files}
    ours = {target.name for target in taken(path, resume=True)}
    if not any(here.values()) and not ours:
        return 0
    journal, remedy = folder / JOURNAL, f"remove {folder.name}, or leave --resume out, to begin anew"
    if not noted or noted[0].get("format") != _FORMAT:
        raise ConvertError(f"{journal}: no journal of this version; {remedy}")
    if noted[0].get("sources") != identity.sources:
        raise ConvertError(
            f"{journal}: the unfinished output was begun from another checkpoint, or this one has changed since; "
            f"{remedy}"
        )
    if noted[0].get("plan") != identity.plan:
        raise ConvertError(
            f"{journal}: the unfinished output was begun with other options or versions; {remedy}"
        )
    marks = [done for entry in noted[1:] if isinstance(done := entry.get("done"), int)]
    if not marks:
        return 0
    if not 0 <= marks[-1] < len(layout.places):
        raise ConvertError(f"{journal}: {marks[-1]} steps of {len(layout.places) - 1} are finished; {remedy}")
    number, end = layout.places[marks[-1]]
    for i, (name, size) in enumerate(layout.files[: number + 1]):
        if name in ours or (here[name] == size if i < number else here[name] >= end):
            continue
        raise ConvertError(
            f"{folder / name}: expected {f'{size} bytes' if i < number else f'at least {end} bytes'} that its "
            f"journal calls finished, found {here[name]}; {remedy}"
        )
    mend(folder)
    return marks[-1]


def _begin_anew(path: Path) -> None:
    _clear(path)
    os.truncate(folder_of(path) / JOURNAL, 0)


def _remove(path: Path) -> None:
    with suppress(OSError):
        _clear(path)
        (folder_of(path) / JOURNAL).unlink()  # last: the lock is on it
        folder_of(path).rmdir()


def _clear(path: Path) -> None:
    """Remove the files of the folder, and those of an unfinished set that have taken their names."""
    for target in taken(path, resume=False):
        target.unlink(missing_ok=True)
    for file in folder_of(path).iterdir():
        if file.name != JOURNAL:
            file.unlink()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves last, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
