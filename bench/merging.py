"""Merges the records of a page: if several have the same measurement, the latest counts.

Input: records. Output: models with their cells, rows of device operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from kimi_gguf.bench.report import Data, one_line


def by_age(records: Iterable[Data]) -> list[Data]:
    """The records, the latest last."""
    return sorted(records, key=lambda record: str(record["created"]))


def model_key(model: Data) -> tuple[str, int | None]:
    """Equal for the same file: its name, which has its type, and its bytes. Bytes are None if unknown."""
    return str(model["name"]), model["bytes"]


def cell_key(cell: Data) -> tuple[Any, ...]:
    """Equal for two cells that measure the same."""
    key = tuple(cell[name] for name in ("cache_type", "sequences", "threads", "depth", "batch"))
    return (*key[:3], cell["ubatch"], *key[3:])


def cache_size(model: Data) -> float:
    """MiB of the largest KV cache. The memory table is of the record with the largest one; of several, the latest."""
    contexts = model["about"]["contexts"].values()
    return max((sum(memory.get("kv", {}).values()) for memory in contexts), default=0.0)


def merged(records: Sequence[Data]) -> dict[str, Data]:
    """Models with the cells of all records, by a title: the name, and the bytes if several files have this name."""
    models: dict[tuple[str, int | None], Data] = {}
    for record in by_age(records):
        for model in record["models"]:
            kinds = ("cells", "commands", "fallbacks", "not_measured", "left_out")
            into = models.setdefault(model_key(model), {"model": model} | {kind: {} for kind in kinds})
            into["model"] = max(model, into["model"], key=cache_size)  # the later one if both are equal
            about = model["about"]
            if model["cells"] or about["not_measured"]:
                into["commands"][measured_by(record)] = None
            for lines in about["fallbacks"].values():
                into["fallbacks"] |= dict.fromkeys(lines)
            into["left_out"] |= about["left_out"]
            into["not_measured"] |= {cell_key(cell): cell for cell in about["not_measured"]}
            into["cells"] |= {cell_key(cell): cell for cell in model["cells"]}
    for model in models.values():
        left = model["not_measured"].keys() - model["cells"].keys()
        missing = [model["not_measured"][key] for key in sorted(left)]
        model["about"] = {"not_measured": missing, "left_out": model["left_out"]}
        model["cells"] = [model["cells"][key] for key in sorted(model["cells"])]
    files = Counter(name for name, _ in models)
    return {
        name if files[name] == 1 else f"{name}, {nbytes or 'unknown'} bytes": model
        for (name, nbytes), model in models.items()
    }


def measured_by(record: Data) -> str:
    """The command of a record, its patched build, this project's commit and the day."""
    commits = (
        f"{record['engines']['patched']['commit']}, kimi-gguf {record['checkout'] or 'of an unknown commit'}"
    )
    return f"`{one_line(record['command'])}` ({commits}, {str(record['created'])[:10]})"


def operator_rows(records: Iterable[Data]) -> dict[str, list[Data]]:
    """The rows of each operator on a device, from its latest record."""
    rows: dict[str, list[Data]] = {}
    for record in by_age(records):
        operators = record["device_operators"]
        for name in dict.fromkeys(row["operator"] for row in operators):
            rows[name] = [row for row in operators if row["operator"] == name]
    return rows
