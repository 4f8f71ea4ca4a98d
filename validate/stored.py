"""Reads report.json.

Input: the path of a report.json. Output: `Stored`: what is shown of several files together. Raises ValidateError for
a file that is not a report. Its strings may have any content; whoever shows them must quote them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kimi_gguf.convert.card.folder import MOST_KLD, basis_of, passed_of
from kimi_gguf.convert.card.text import Basis, Figures
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.llama import RunOptions
from kimi_gguf.validate.metrics import Curves, LayerError, Summary
from kimi_gguf.validate.report import SCHEMA, UPSTREAM

SHORT = 12  # characters of a hash that tell sources apart
T = TypeVar("T")


@dataclass(frozen=True)
class StoredRun:
    """A run of the file: title of its variant, figures over all positions, figures at each position and layer."""

    title: str
    all: Summary
    curves: Curves


@dataclass(frozen=True)
class Stored:
    """The parts of a report that are compared with other reports."""

    path: Path
    basis: Basis
    created: str
    passed: bool
    gates: list[bool]  # whether each passed
    name: str
    bytes: int
    sha256: str
    type: str
    checkpoint: str
    tokens: int
    generated: int  # the last of the tokens, which llama.cpp generated
    source: str  # of the other tokens
    engine: str  # kimi-gguf and llama.cpp that made the report
    backend: str
    options: RunOptions  # those that a user can set
    upstream: bool  # whether the file was also run on upstream llama.cpp
    floor: Summary
    runs: list[StoredRun]
    unchecked: list[str]

    @property
    def headline(self) -> StoredRun:
        return self.runs[0]

    @property
    def figures(self) -> Figures:
        """What decides whether the file is recommended."""
        return Figures(self.headline.all.kld_mean, self.passed, self.basis)


def printable(text: str) -> str:
    """The text without line breaks and control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def read_report(path: Path) -> Stored:
    """Read a report. Raises `ValidateError`."""
    todo = "give a report.json that validate-kimi wrote"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValidateError(f"{path}: no such file", todo=todo) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValidateError(f"{path}: not a report", found=f"{error!s:.200}", todo=todo) from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        newer = isinstance(schema, str) and schema.startswith(SCHEMA.rpartition("/")[0])
        todo = "read it with the kimi-gguf that wrote it, or a later one" if newer else todo
        raise ValidateError(f"{path}: schema", expected=SCHEMA, found=f"{schema!r:.60}", todo=todo)
    try:
        return _stored(path, data)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        found = f"{type(error).__name__}: {error!s:.100}"
        raise ValidateError(f"{path}: damaged", found=found, todo="make the report again") from None


def _stored(path: Path, data: Mapping[str, Any]) -> Stored:
    gguf, ids, checkpoint = data["gguf"], data["ids"], data["checkpoint"]
    runs = [_run(each) for each in data["runs"]]
    if not runs:
        raise ValueError("runs: expected at least one, found none")
    return Stored(
        path=path,
        basis=basis_of(data),
        created=_as(str, data["created"]),
        passed=passed_of(data),
        gates=[gate["passed"] for gate in data["gates"]],
        name=_as(str, gguf["name"]),
        bytes=_count(gguf["bytes"]),
        sha256=_as(str, gguf["sha256"]),
        type=_as(str, gguf["type"]),
        checkpoint=_as(str, checkpoint["name"]),
        tokens=_count(ids["count"]),
        generated=_count(ids["generated"]),
        source=_as(str, ids["source"]),
        engine=_engine(data),
        backend=_as(str, data["engine"]["backends"][0]),
        options=_options(data["options"]),
        upstream=any(rival["title"] == UPSTREAM and rival["runs"] for rival in data["rivals"]),
        floor=_summary(data["noise_floor"]),
        runs=runs,
        unchecked=[_as(str, each) for each in data["unchecked"]],
    )


def _engine(data: Mapping[str, Any]) -> str:
    """Such as "kimi-gguf 0.2.0, llama.cpp 0c1e570 (patched, source tree 0123456789ab)"."""
    engine, version = data["engine"], _as(str, data["version"])
    tree = engine.get("tree_sha256")
    source = f", source tree {_as(str, tree)[:SHORT]}" if tree is not None else ""
    return f"kimi-gguf {version}, llama.cpp {_as(str, engine['commit'])} ({_as(str, engine['kind'])}{source})"


def _options(data: Mapping[str, Any]) -> RunOptions:
    return RunOptions(
        n_batch=_count(data["n_batch"]),
        n_ubatch=_count(data["n_ubatch"]),
        threads=_count(data["threads"]),
        cache_type=_as(str, data["cache_type"]),
        n_gpu_layers=_count(data["n_gpu_layers"]),
    )


def _run(data: Mapping[str, Any]) -> StoredRun:
    at = data["per_position"]
    nmse, kld = (np.array([_number(name, x) for x in at[name]]) for name in ("nmse", "kld"))
    top1, differs = (np.array([_as(bool, x) for x in at[name]]) for name in ("top1", "other_experts"))
    if len({len(nmse), len(kld), len(top1), len(differs)}) != 1 or not len(nmse):
        raise ValueError("per_position: expected lists of one length")
    layers = [
        LayerError(
            layer=_count(each["layer"]),
            kind=_as(str, each["kind"]),
            nmse=_number("nmse", each["nmse"]),
            nmse_worst=_number("nmse_worst", each["nmse_worst"]),
            positions=_count(each["positions"]),
            other_experts=_count(each["other_experts"]),
        )
        for each in data["layers"]
    ]
    curves = Curves(nmse, kld, top1, differs, layers)
    return StoredRun(_as(str, data["variant"]["title"]), _summary(data["all"]), curves)


def _summary(data: Mapping[str, Any]) -> Summary:
    names = [field.name for field in fields(Summary) if field.name != "positions"]
    return Summary(_count(data["positions"]), **{name: _number(name, data[name]) for name in names})


def _as(kind: type[T], value: object) -> T:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r:.40}")
    return value


def _count(value: object) -> int:
    count = _as(int, value)
    if not 0 <= count < 2**63:
        raise ValueError(f"expected a number from 0 to 2^63 - 1, found {count!r:.40}")
    return count


# Beginning of a figure's name -> the least and the most that can be measured. Rounding makes a KLD of 0 negative.
RANGES: Mapping[str, tuple[float, float]] = {
    "nmse": (0, 1e100),
    "kld": (-1e-6, MOST_KLD),
    "rms_dp": (0, 1),
    "top": (0, 1),
    "ppl": (0, sys.float_info.max),
}


def _number(name: str, value: object) -> float:
    """The figure `name`; null is NaN."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, found {value!r:.40}")
    least, most = next(limits for start, limits in RANGES.items() if name.startswith(start))
    if not least <= value <= most:
        raise ValueError(f"{name}: expected a number from {least:g} to {most:g}, found {value!r:.40}")
    return float(value)
