"""The journal of an unfinished output: one JSON object per line, listing what is finished and synced to disk.

The first line identifies the checkpoint and the options. `done` is the number of finished steps; if the files are
hashed, with the SHA-256 of the current file up to there. `whole` says that
all files are complete, and identifies them by `stamp`. The process that writes the output locks the journal.
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
    """Open and lock the journal in `folder`, and create both if necessary; the lock is released when the process
    ends. Raises `ConvertError` if another process has the lock, or if the folder cannot be written."""
    while True:
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise ConvertError(folder, expected="a folder", found="a file", todo="remove it") from None
        except OSError as error:
            raise _not_writable(path, error) from None
        try:
            fd = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileNotFoundError:
            continue  # another process removed the folder in between: try again
        except OSError as error:
            raise _not_writable(path, error) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConvertError(
                f"{path}: another conversion is writing it ({folder.name} is locked)",
                todo="wait until it is done, or choose another name",
            ) from None
        except OSError:  # a file system without locks
            return fd
        with suppress(FileNotFoundError):
            if os.path.samestat((folder / JOURNAL).stat(), os.fstat(fd)):
                return fd
        os.close(fd)  # another process finished or removed it in between: try again


def _not_writable(path: Path, error: OSError) -> ConvertError:
    return ConvertError(f"{path}: cannot be written: {error.strerror}", todo="nothing was written")


def append(folder: Path, entry: dict[str, Any]) -> None:
    """Append an entry and sync it to the disk. Raises `OSError`."""
    with (folder / JOURNAL).open("ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def entries(folder: Path) -> list[dict[str, Any]]:
    """All entries, in order. Raises `ConvertError` for an invalid journal."""
    journal = folder / JOURNAL
    try:
        found = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"{journal}: cannot be read: {error}", todo=f"{start_again(folder)}") from None
    return [entry for entry in found if isinstance(entry, dict)]


def start_again(folder: Path) -> str:
    """What to do about an unfinished output in `folder` that cannot be resumed, for an error message."""
    return f"start again without --resume but with --force, or remove {folder.name}"


def remove_incomplete_line(folder: Path) -> None:
    """Remove the last line if the process ended while writing it. Raises `OSError`."""
    journal = folder / JOURNAL
    os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)


def whole(folder: Path) -> dict[str, str]:
    """File name -> `stamp` of a complete output whose files were about to be renamed; empty if there is none.
    The first file is renamed last."""
    try:
        noted = [entry["whole"] for entry in entries(folder) if "whole" in entry]
    except ConvertError:
        return {}
    last = noted[-1] if noted else None
    if not isinstance(last, dict) or not all(name and Path(name).name == name for name in last):
        return {}
    return last


def stamp(path: Path) -> str:
    """Identifies a file independently of its name; empty if there is no file."""
    if not path.is_file():
        return ""
    found = path.stat()
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"
