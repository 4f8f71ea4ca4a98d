"""Checks that paths can exist, before anything is opened or made: names that are too long, that lead through a file, or
that have a zero byte would otherwise end in the system's own error, or not at all.

Input: paths, or the arguments of a command. Output: none, or `EngineError`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from kimi_gguf.engine.errors import EngineError

_SHOWN: Final = 80  # characters of a path


def check_paths(options: argparse.Namespace) -> None:
    """Raise `EngineError` if an argument of type Path cannot exist."""
    for value in vars(options).values():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                check_path(path)


def check_path(path: Path) -> None:
    """Raise `EngineError` if nothing can have this path; that nothing has it is no error."""
    try:
        path.stat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else "a zero byte"
        if isinstance(error, NotADirectoryError):
            problem = next((f"{parent} is a file" for parent in path.parents if parent.is_file()), problem)
        raise EngineError(
            shortened(path),
            expected="a path that the file system accepts",
            found=problem,
            todo="name another path",
        ) from None


def shortened(path: object) -> str:
    """The path, or the beginning and end of one that is too long for a message."""
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[3 - _SHOWN // 2 :]}"
