"""Reads the manifest of a page of measurements: which commands it shows, and from which records.

Input: a TOML file with `title`, `page`, `records` (paths relative to it), `commands` and perhaps `threads` and
`method`. Output: the records of those commands.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.bench.record import load
from kimi_gguf.engine.errors import EngineError, reason


@dataclass(frozen=True)
class Manifest:
    """The input of a page."""

    title: str
    page: Path
    records: Path
    commands: tuple[str, ...]  # exactly as in the records
    threads: int | None  # cells with other numbers of threads are left out
    method: str | None  # the page that says how cells are measured, if it is not this one

    def selected(self) -> list[dict[str, Any]]:
        """The records of the commands. Raises `EngineError` if a command has none."""
        records = [record for record in load(self.records) if record["command"] in self.commands]
        missing = [
            command for command in self.commands if command not in {record["command"] for record in records}
        ]
        if missing:
            raise EngineError(
                f"{self.records}: no record of {missing[0]}",
                todo=f"measure it with --record {self.records}, or remove it from the manifest",
            )
        for model in (model for record in records for model in record["models"] if self.threads):
            model["cells"] = [cell for cell in model["cells"] if cell["threads"] == self.threads]
        return records


def read_manifest(file: Path) -> Manifest:
    """Read a manifest. Raises `EngineError`."""
    try:
        data = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{file}: the manifest cannot be read",
            expected="a TOML file such as docs/bench.toml",
            found=reason(error),
            todo="name another file, or correct this one",
        ) from None
    match data:
        case {
            "title": str(title),
            "page": str(page),
            "records": str(records),
            "commands": [_, *_] as commands,
        } if all(isinstance(command, str) for command in commands):
            paths = file.parent / page, file.parent / records
            return Manifest(title, *paths, tuple(commands), data.get("threads"), data.get("method"))
    expected = "title, page and records: texts; commands: a list of one text or more"
    keys = ("title", "page", "records", "commands")
    values = ", ".join(f"{key}: {data[key]!r:.40}" for key in keys if key in data)
    raise EngineError(f"{file}: invalid manifest", expected=expected, found=values or "none of them")


def manifests_beside(file: Path) -> list[Manifest]:
    """The manifests of a folder's pages, in the order of their names, without `file`. Raises `EngineError`."""
    return [read_manifest(path) for path in sorted(file.parent.glob("bench*.toml")) if path.name != file.name]
