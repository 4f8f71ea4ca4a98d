"""Says in an error message what stands where a file was expected."""

from __future__ import annotations

from pathlib import Path


def kind_of(path: Path) -> str:
    """What `path` is, with its article: "a folder", "a pipe", "a socket", "a device" or "a file"."""
    if path.is_dir():
        return "a folder"
    if path.is_fifo():
        return "a pipe"
    if path.is_socket():
        return "a socket"
    return "a file" if path.is_file() else "a device"
