"""The journal of an unfinished output: what in its folder is finished and safe on disk, one JSON object a line.

The first line says what the output was begun from, `done` how many steps are finished, `whole` that all files are,
with what tells each from any other file. Who writes the output holds a lock on the journal.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kimi_gguf.convert.errors import ConvertError

JOURNAL: Final = "journal"


def locked(folder: Path, path: Path) -> int:
    """The journal in `folder`, both made if need be, opened and locked; the lock goes with the process, however
    it ends. Raises `ConvertError` when another process has it, or the place of `path` cannot be written."""
    while True:
        try:
            folder.mkdir(exist_ok=True)
            fd = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            continue  # the folder was removed in between: try again
        except FileExistsError:
            raise ConvertError(f"{folder}: is no folder; remove it, or choose another name") from None
        except OSError as error:
            raise ConvertError(f"{path}: cannot be written: {error.strerror}; nothing was left") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConvertError(
                f"{path}: another conversion is writing it ({folder.name} is locked); wait for it, or choose "
                "another name"
            ) from None
        except OSError:  # a file system without locks
            return fd
        with suppress(FileNotFoundError):
            if os.path.samestat((folder / JOURNAL).stat(), os.fstat(fd)):
                return fd
        os.close(fd)  # it was finished or removed in between: try again


def append(folder: Path, entry: dict[str, Any]) -> None:
    """Note an entry; it is on the disk when this returns. Raises `OSError`."""
    with (folder / JOURNAL).open("ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def entries(folder: Path) -> list[dict[str, Any]]:
    """What was noted, in order. Raises `ConvertError` for a journal that is none."""
    journal = folder / JOURNAL
    try:
        found = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"{journal}: cannot be read: {error}; leave --resume out to begin anew") from None
    return [entry for entry in found if isinstance(entry, dict)]


def mend(folder: Path) -> None:
    """Cut off a last line that was not written whole. Raises `OSError`."""
    journal = folder / JOURNAL
    os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)


def whole(folder: Path) -> dict[str, str]:
    """The files, each with its `stamp`, of an output that is whole and was about to take its names; empty where
    nothing of the kind was noted. The first is the one that takes its name last."""
    try:
        noted = [entry["whole"] for entry in entries(folder) if "whole" in entry]
    except ConvertError:
        return {}
    last = noted[-1] if noted else None
    if not isinstance(last, dict) or not all(name and Path(name).name == name for name in last):
        return {}
    return last


def stamp(path: Path) -> str:
    """What tells a file from any other, whatever its name; empty where there is none."""
    if not path.is_file():
        return ""
    found = path.stat()
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"
