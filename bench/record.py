"""The JSON record of a run: complete after every cell, and sufficient to write every page.

Input: facts, results. Output: a file that is always a complete record.

A file: schema, machine, engines (facts of each build), records. A record: command, created (UTC), device (null: the
CPU), checkout (this project's commit), engines, switch (KIMI_OPS of patched), libraries (used instead of patched's, or
null), limits (peak rates, by threads or of the device), models [{name, architecture, bytes, about, cells}], operators,
device_operators, matmuls, hybrid. A cell has its options, samples in seconds of one decode, medians and spreads, and
its floor: the least time on the roofline. A machine's file (--record) has only what pages show.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence, Set
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from kimi_gguf.bench.ab_run import Result, Runners
from kimi_gguf.bench.device import Device
from kimi_gguf.bench.files import atomically
from kimi_gguf.bench.merging import model_key
from kimi_gguf.bench.models import ModelFile
from kimi_gguf.bench.report import Data
from kimi_gguf.bench.roofline import Demand, Peaks
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError, reason
from kimi_gguf.engine.facts import engine_facts, machine_facts

SCHEMA = 1
# Keys that only a run's own record (--json) has, because no page shows them. Pages show the samples of turns.
_NOT_SHOWN = frozenset({"samples", "ruled_out", "steps", "shared", "macs", "upstream_share"})
_PARTS = {"command": str, "created": str, "machine": dict, "engines": dict, "limits": list, "models": list}
_AGAIN = "measure again"


class Part(dict[str, Any]):
    """An object in a file of records. To read a key that it lacks is an `EngineError` that names both."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        super().__init__(values)
        self._file = file

    def __missing__(self, key: str) -> NoReturn:
        raise EngineError(f"{self._file}: damaged", expected=f"the key {key!r}", todo=_AGAIN)


def new_record(
    command: str, builds: Mapping[str, Engine], libraries: Path | None, switch: str, device: Device | None
) -> Data:
    """An empty record of a run on this machine, or on its device. builds: "patched" and "upstream"."""
    return {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "device": None if device is None else vars(device),
        "checkout": checkout(),
        "engines": {name: _facts(build) for name, build in builds.items()},
        "switch": switch,
        "libraries": None if libraries is None else libraries.name,
        "limits": [],
        "models": [],
        "operators": [],
        "device_operators": [],
        "matmuls": [],
        "hybrid": None,
    }


def _facts(build: Engine) -> Data:
    """The facts of a build without the list of its patches, which the hash of its sources stands for."""
    return {name: value for name, value in engine_facts(build).items() if name != "patches"}


def checkout() -> str | None:
    """The commit of this project, marked if files differ from it; None if it is installed without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ended.stdout.strip() or None


def model_data(model: ModelFile, runners: Runners) -> Data:
    """A model of the record; cells are added when they are measured. The runners fill `about` later."""
    return {
        "name": model.name,
        "architecture": model.architecture,
        "bytes": model.nbytes,
        "about": vars(runners.about),
        "cells": [],
    }


def cell_data(result: Result, needs: Demand, peaks: Peaks | None) -> Data:
    """A cell: samples and derived figures. Without peak rates it has no floor."""
    tokens = result.cell.tokens
    return {
        **vars(result.cell),
        "tokens": tokens,
        "steps": result.steps,
        "upstream": {"way": result.rival, "tokens_per_second": tokens / result.upstream.median,
                     "spread": result.upstream.spread},
        "patched": {"tokens_per_second": tokens / result.patched.median, "spread": result.patched.spread},
        "ratio": result.ratio,
        "floor": None if peaks is None else floor_data(result, needs, peaks),
        "others": result.others,
        "samples": result.samples,
        "ruled_out": result.screened,
    }  # fmt: skip


def floor_data(result: Result, needs: Demand, peaks: Peaks) -> Data:
    """The least time of a cell, and its share of each build's time."""
    floor, bound = needs.floor(peaks)
    return {
        "seconds": floor, "bound": bound, "bytes": needs.nbytes, "macs": needs.macs,
        "share": floor / result.patched.median, "upstream_share": floor / result.upstream.median,
        "limits": vars(peaks),
    }  # fmt: skip


def load(file: Path) -> list[Data]:
    """The records of a file. Raises `EngineError` for a file that is damaged or has other contents."""
    other = f"{file}: not a record of the bench"
    try:
        data = json.loads(file.read_text(), object_hook=partial(Part, file=file))
        schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(other, found=reason(error), todo="name a file of --json") from None
    if schema != SCHEMA or isinstance(schema, bool):
        raise EngineError(
            other, expected=f"schema {SCHEMA}", found=repr(schema), todo="measure again with --json"
        )
    try:
        engines, machine, records = data["engines"], data["machine"], data["records"]
        for record in records:
            of_record = Part({name: engines[i] for name, i in record["engines"].items()}, file)
            record |= {"machine": machine, "engines": of_record}
    except (IndexError, TypeError, AttributeError) as error:
        raise EngineError(f"{file}: damaged", found=f"{type(error).__name__}: {error}", todo=_AGAIN) from None
    return [complete(record, file) for record in records]


def complete(record: Data, file: Path) -> Data:
    """The record, if it has what every record has. Raises `EngineError`."""
    for key, kind in _PARTS.items():
        if not isinstance(record.get(key), kind):
            expected = f"{key}: {kind.__name__}"
            raise EngineError(
                f"{file}: damaged", expected=expected, found=f"{record.get(key)!r:.40}", todo=_AGAIN
            )
    return record


def save(records: Sequence[Data], file: Path) -> None:
    """Write the records of a machine atomically: facts of the machine and the builds once, then a record per line."""
    engines: list[Data] = []
    lines = []
    for record in sorted(records, key=lambda record: str(record["created"])):
        numbers = {}
        for name, engine in record["engines"].items():
            if engine not in engines:
                engines.append(engine)
            numbers[name] = engines.index(engine)
        short = {name: value for name, value in record.items() if name != "machine"} | {"engines": numbers}
        lines.append(json.dumps(short, separators=(",", ":")))
    head = {"schema": SCHEMA, "machine": records[0]["machine"], "engines": engines}
    text = json.dumps(head, separators=(",", ":"))[:-1] + ',"records":[\n' + ",\n".join(lines) + "\n]}\n"
    atomically(file, lambda part: part.write_text(text))


def add(record: Data, file: Path) -> None:
    """Add a record to a machine's file, creating it if needed; it replaces one of the same command, libraries and
    models. Raises `EngineError`."""
    there = load(file) if file.exists() else []
    for other in there[:1]:
        check_machine(other, record, file)
    kept = (other for other in there if _measured(other) != _measured(record))
    save([*kept, for_pages(record)], file)


def for_pages(part: Any, left_out: Set[str] = _NOT_SHOWN) -> Any:
    """A record, or a part of it, without the keys that no page shows."""
    if isinstance(part, list):
        return [for_pages(value, left_out) for value in part]
    if not isinstance(part, dict):
        return part
    if part.get("about", {}).get("resident"):
        left_out = left_out - {"samples"}
    return {key: for_pages(value, left_out) for key, value in part.items() if key not in left_out}


def _measured(record: Data) -> tuple[Any, ...]:
    """Equal for two records of the same measurement. Commands show neither the folders of files nor what is in them."""
    return record["command"], record["libraries"], [model_key(model) for model in record["models"]]


def machine_of(record: Data) -> str:
    """The machine and the device of a record, for messages; equal for two records of the same."""
    machine, device = record["machine"], record["device"] or {}
    return f"{machine['processor']}, {machine['cores']} cores, {device.get('description', 'CPU')}"


def check_machine(there: Data, record: Data, file: Path) -> None:
    """Raises `EngineError` if two records are of different machines or devices."""
    if machine_of(there) != machine_of(record):
        raise EngineError(
            f"{file}: records of another machine",
            expected=machine_of(there),
            found=machine_of(record),
            todo="choose another file for this machine: --record FILE",
        )
