"""What measure_conversion and measure_k3 share: a record in a JSON file, and the page that is drawn from it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from kimi_gguf.bench.files import atomically
from kimi_gguf.bench.report import Data, mark
from kimi_gguf.engine.errors import EngineError, reason


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The options --json, --page and --draw."""
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--page", type=Path, help="write the page to this file")
    parser.add_argument(
        "--draw", type=Path, metavar="RECORD", help="measure nothing: write the page of this record"
    )


def machine_text(machine: Data) -> str:
    """The machine of a record, for a page."""
    return f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"


def with_note(text: str, rows: Iterable[Data]) -> str:
    """The page, with what the mark of disturbed rows means if there is one."""
    return text + "\n\\* Other work was running on the machine.\n" if any(map(mark, rows)) else text


def page_of(file: Path, page: Callable[[Data], str], program: str) -> str:
    """The page of a record that `program --json` wrote. Raises `EngineError` if the file is not such a record."""
    try:
        return page(json.loads(file.read_text()))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EngineError(f"{file} is not a record of {program}", found=reason(error)) from error


def write(file: Path | None, text: str) -> None:
    """Replace the file atomically. Does nothing if `file` is None."""
    if file is not None:
        atomically(file, lambda part: part.write_text(text))
