"""The JSON record of a run: complete after every cell, and sufficient to write every page.

Input: facts, results. Output: a file that is always a complete record.

A record: schema, command, created (UTC), machine, device (null: the CPU), checkout (this project's commit), engines,
switch (KIMI_OPS of patched), libraries (used instead of patched's, or null), limits (peak rates, by threads or of the
device), models [{name, architecture, bytes, about, cells}], operators, device_operators, products, hybrid,
prompt_cache, equal_requests, speculative. A cell has its options, samples in seconds of one decode, medians and
spreads, and its floor: the least time on the roofline. Records call matmuls "products". Older ones lack device,
checkout, device_operators, products, prompt_cache, equal_requests, speculative. Schemas 1 (a record) and 2 (a machine's
file) differ from 3 and 4 only in the name of upstream, which was "pristine"; they are read, too.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
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

SCHEMA = 3
_PARTS = {"command": str, "created": str, "machine": dict, "engines": dict, "limits": list, "models": list}
_AGAIN = "measure again"
_DAMAGED = IndexError, TypeError, AttributeError  # where a record has something else than expected
MACHINE_SCHEMA = 4  # of a machine's file: {schema, machine, engines: [...], records: [...]}
_RATES_RIGHT = "2026-11-27"  # from this day on, int8 rates are right
_MOST_INT8 = 4.4  # times the float32 rate: a vector has four times as many bytes as floats
_OLD_NAME = "pristine"  # of upstream, in the schemas of earlier versions
_NEWER = {1: SCHEMA, 2: MACHINE_SCHEMA}  # schemas of earlier versions, and what they become


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
        "schema": SCHEMA,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "device": None if device is None else vars(device),
        "checkout": checkout(),
        "engines": {name: engine_facts(build) for name, build in builds.items()},
        "switch": switch,
        "libraries": None if libraries is None else libraries.name,
        "limits": [],
        "models": [],
        "operators": [],
        "device_operators": [],
        "products": [],
        "hybrid": None,
        "prompt_cache": [],
        "equal_requests": [],
        "speculative": None,
    }


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
        "seconds": floor, "bound": bound, "bytes": needs.nbytes, "products": needs.macs,
        "share": floor / result.patched.median, "upstream_share": floor / result.upstream.median,
        "limits": vars(peaks),
    }  # fmt: skip


def save(record: Data, file: Path) -> None:
    """Write the record atomically."""
    text = json.dumps(record, indent=1)
    atomically(file, lambda part: part.write_text(text + "\n"))


def load_all(file: Path) -> list[Data]:
    """The records of a machine's file, or the one of --json. Raises `EngineError`."""
    data = load(file, (SCHEMA, MACHINE_SCHEMA))
    if data["schema"] == SCHEMA:
        return [complete(data, file)]
    try:
        engines, machine = data["engines"], data["machine"]
        for each in data["records"]:
            of_record = Part({name: engines[i] for name, i in each["engines"].items()}, file)
            each |= {"schema": SCHEMA, "machine": machine, "engines": of_record}
    except _DAMAGED as error:
        raise _damaged(file, error) from None
    return [complete(each, file) for each in data["records"]]


def complete(record: Data, file: Path) -> Data:
    """The record, if it has what every record has. Raises `EngineError`."""
    for key, kind in _PARTS.items():
        if not isinstance(record.get(key), kind):
            expected = f"{key}: {kind.__name__}"
            raise EngineError(
                f"{file}: damaged", expected=expected, found=f"{record.get(key)!r:.40}", todo=_AGAIN
            )
    try:
        _leave_out_wrong_rates(record)
    except _DAMAGED as error:
        raise _damaged(file, error) from None
    return record


def _damaged(file: Path, error: Exception) -> EngineError:
    return EngineError(f"{file}: damaged", found=f"{type(error).__name__}: {error}", todo=_AGAIN)


def _leave_out_wrong_rates(record: Data) -> None:
    """Leave out int8 rates if one of them is too high, and the least times that they bound.

    Until 2026-11-26 peaks.cpp, compiled for AVX2, computed one product for all sums: it measured additions. Later, and
    on devices, a high ratio is a float32 rate that was measured too low.
    """
    if record.get("device") or record["created"] >= _RATES_RIGHT:
        return
    cells = [cell for model in record["models"] for cell in model["cells"]]
    all_rates = [*record["limits"], *(cell["floor"]["limits"] for cell in cells if cell["floor"])]
    if all((rates["int8"] or 0) <= _MOST_INT8 * rates["f32"] for rates in all_rates):
        return
    for rates in all_rates:
        rates["int8"] = None
    for each in [*cells, *record.get("products", [])]:
        if each["floor"] and each["floor"]["bound"] == "products":
            each["floor"] = None


def save_all(records: Sequence[Data], file: Path) -> None:
    """Write a machine's file: the facts of the machine and of each build once, then one record per line."""
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
    head = {"schema": MACHINE_SCHEMA, "machine": records[0]["machine"], "engines": engines}
    text = json.dumps(head, separators=(",", ":"))[:-1] + ',"records":[\n' + ",\n".join(lines) + "\n]}\n"
    atomically(file, lambda part: part.write_text(text))


def add(record: Data, file: Path) -> None:
    """Add a record to a machine's file, creating it if needed; it replaces one of the same command, libraries and
    models. Raises `EngineError`."""
    there = load_all(file) if file.exists() else []
    for each in there[:1]:
        check_machine(each, record, file)
    save_all([*(each for each in there if _measured(each) != _measured(record)), record], file)


def _measured(record: Data) -> tuple[Any, ...]:
    """Equal for two records of the same measurement. Commands show neither the folders of files nor what is in them."""
    return record["command"], record["libraries"], [model_key(model) for model in record["models"]]


def machine_of(record: Data) -> str:
    """The machine and the device of a record, for messages; equal for two records of the same."""
    machine, device = record["machine"], record.get("device") or {}
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


def load(file: Path, schemas: Sequence[int] = (SCHEMA,)) -> Data:
    """Read a record. Raises `EngineError` for a file that is not one."""
    what = f"{file}: not a record of the bench"
    part = partial(Part, file=file)
    try:
        text = file.read_text()
        record: Data = json.loads(text, object_hook=part)
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(what, found=reason(error), todo="name a file of --json") from None
    if isinstance(found, int) and found in _NEWER:
        record = json.loads(text.replace(_OLD_NAME, "upstream"), object_hook=part)
        found = record["schema"] = _NEWER[found]
    if found not in schemas:
        expected = f"schema {' or '.join(map(str, schemas))}"
        raise EngineError(what, expected=expected, found=repr(found), todo="measure again with --json")
    return record
