"""Strict JSON parser for untrusted files: config, shard index, safetensors header.

Input: text or bytes. Output: the top-level object as a dict, or `ConvertError` naming the file. Unlike `json.loads`
it refuses duplicate keys, NaN and Infinity, nesting that would exhaust the stack, and a top-level value that is not
an object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kimi_gguf.convert.errors import ConvertError

MAX_BYTES = 64 << 20  # a hub index of 20,000 tensors has 2 MB


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`; `where` names its file in errors. Raises `ConvertError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ConvertError(f"{where}: the key {twice!r} stands twice in one object; remove one of them")
        return found

    def no_constant(name: str) -> Any:
        raise ConvertError(f"{where}: {name} is not JSON; expected a finite number")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConvertError(
            f"{where}: not valid JSON ({reason}); the file is damaged or truncated, fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise ConvertError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises `ConvertError`, also when it is absurdly large."""
    try:
        if path.exists() and not path.is_file():
            raise ConvertError(f"{path}: expected a file, found something else")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConvertError(f"{path}: not found; it belongs beside the checkpoint's safetensors") from None
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConvertError(f"{path}: larger than {MAX_BYTES >> 20} MiB; expected a small JSON file")
    return parse_object(data, str(path))
