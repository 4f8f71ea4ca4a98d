"""Reads small untrusted files, and a strict JSON parser for config, shard index and safetensors header.

Input: a path, text or bytes. Output: the top-level object as a dict, or `ConvertError` naming the file. Unlike
`json.loads` it refuses duplicate keys, NaN, Infinity, nesting that would exhaust the stack, and a top-level value
that is not an object.
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePath
from typing import Any

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.engine.file_kind import kind_of

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_BYTES = 64 << 20  # a tokenizer.json has about 20 MB
MAX_INDEX_BYTES = 256 << 20  # a shard index of half a million tensors has 60 MB


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`; `where` names its file in errors. Raises `ConvertError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ConvertError(
                f"{where}: the key {twice!r} appears twice in one object", todo="remove one of them"
            )
        return found

    def no_constant(name: str) -> Any:
        raise ConvertError(f"{where}: {name} is not JSON", todo="expected a finite number")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")  # editors on Windows begin a file with a byte order mark
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConvertError(
            f"{where}: not valid JSON ({reason})", todo="the file is damaged or truncated, download it again"
        ) from None
    if not isinstance(value, dict):
        raise ConvertError(where, expected="a JSON object", found=f"{type(value).__name__}")
    return value


def read_small_file(path: Path, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises `ConvertError`."""
    try:
        if path.exists() and not path.is_file():
            raise ConvertError(
                path,
                expected="a file",
                found=kind_of(path),
                todo="copy the file from the checkpoint",
            )
        with path.open("rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            data = file.read(min(nbytes, most) + 1)  # read() allocates what it is told
    except FileNotFoundError:
        raise ConvertError(f"{path}: not found", todo="copy it from the original checkpoint") from None
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise ConvertError(path, expected=f"at most {most >> 20} MiB", found="a larger file")
    check_not_pointer(data, path)
    return data


def check_not_pointer(data: bytes, path: PurePath) -> None:
    """Raise `ConvertError` if a file that begins with these bytes is a Git LFS pointer instead of the file."""
    if data.startswith(_LFS_POINTER):
        raise ConvertError(
            f"{path}: is a Git LFS pointer", todo="fetch the file that it stands for: git lfs pull"
        )


def read_object(path: Path, most: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes. Raises `ConvertError`."""
    return parse_object(read_small_file(path, most), str(path))
