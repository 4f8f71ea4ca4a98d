"""The interface through which safetensors files are read, locally or over the network.

Input: a file. Output: its size, ranges of its bytes, and whether it has changed since it was opened.
`LocalFile` is a file on disk; `remote.RemoteFile` is a file that is read over the network.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from typing import Protocol

from kimi_gguf.convert.errors import ConvertError, ReadError
from kimi_gguf.engine.file_kind import kind_of
from kimi_gguf.engine.gguf import READ_AT_ONCE


class Source(Protocol):
    """An open file. Reading is safe from several threads."""

    @property
    def path(self) -> PurePath:
        """The file's name in errors; its last part is its name in the checkpoint."""

    @property
    def size(self) -> int:
        """Bytes at present."""

    @property
    def stamp(self) -> tuple[object, ...]:
        """Identifies the file as it was opened among others with its name."""

    def read_into(self, buffer: memoryview, offset: int, what: str) -> None:
        """Fill `buffer` with the bytes from `offset` on; `what` names them in errors.

        Raises `ReadError` if reading fails, `ConvertError` if the file is too short or has changed."""

    def unchanged(self) -> bool:
        """Whether this is still the file that was opened; does not read it."""

    def close(self) -> None:
        """Release all resources; a second call does nothing."""


class LocalFile:
    """A `Source` on disk. Raises `ConvertError` if it does not exist or is not a regular file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise ConvertError(
                path,
                expected="a safetensors file",
                found=kind_of(path),
                todo="copy the file from the checkpoint",
            )
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise ConvertError(
                f"{path}: not found", todo="the checkpoint is incomplete, download it"
            ) from None
        except OSError as error:
            raise ConvertError(f"{path}: cannot be opened: {error.strerror}") from None
        self.stamp = _stamp(os.fstat(self._fd))

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read_into(self, buffer: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._fd, [buffer[done : done + READ_AT_ONCE]], offset + done)
            except OSError as error:
                raise ReadError(f"{self.path}: {what}: cannot be read: {error.strerror}") from None
            if got == 0:
                raise ConvertError(
                    f"{self.path}: {what}: the file ends at byte {offset + done}",
                    todo="the file is damaged or truncated, download it again",
                )
            done += got

    def unchanged(self) -> bool:
        try:
            return _stamp(self.path.stat()) == _stamp(os.fstat(self._fd)) == self.stamp
        except OSError:
            return False

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _stamp(found: os.stat_result) -> tuple[int, int, int, int]:
    """Changes when a file is written to or replaced: size, time of change, device, inode."""
    return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino
