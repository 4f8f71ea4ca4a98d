"""The generated page of measurements, out of one or more records.

Flows in: records. Flows out: a Markdown page and a picture beside it for each group of cells. A cell that several
records have is taken from the one made last.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kimi_gguf.bench.aims import aims_table
from kimi_gguf.bench.cells import UBATCH
from kimi_gguf.bench.files import atomically
from kimi_gguf.bench.hybrid import MILLION, NAMES, extrapolated
from kimi_gguf.bench.plot import draw
from kimi_gguf.bench.products import K
from kimi_gguf.bench.report import (
    Rows,
    cells_table,
    device_limits_table,
    limits_table,
    mark,
    markdown,
    memory_table,
    not_measured_lines,
    verdict,
)
from kimi_gguf.patches.errors import EngineError

Data = dict[str, Any]
PARAMETER = re.compile(r"(\w+)=(\[[^\]]*\]|[^,]*)")  # as test-backend-ops writes them

INTRODUCTION = """\
# Bench

Written by `kimi-llama bench --page`; do not edit. How to measure anew: the commands stand with each part.

{machine}. llama.cpp {commit} of {package}, pristine and patched ({builds}) built from the
same archive with the same options by {compiler}. Measured {when}.

Both builds hold the model in a process of their own and take turns in one run (A B B A); the one not at work is
stopped. Figures are medians, ± the median distance from them. Pristine is at its best over `--repack 0/1` and flash
attention on and off, chosen cell by cell; ours runs as it does by default, with `KIMI_OPS={switch}`. *tg* is decoding
token by token, *ppN* N tokens of a prompt at once with logits of the last, *at D* behind D tokens in the cache (states
saved once and loaded into both). *Of the limit* is the least time at the machine's limit, measured before and after
the cell, against ours: for weights, attention and recurrence, one behind the other, the bytes that a decode must move
over the memory's rate, or its multiply-adds over the processor's, whichever takes longer. What binds most is named.

Generated models have the 48B's layer shapes with fewer layers and random weights (`--layers`, `--experts`); the types
are llama-quantize's mix.
"""

DEVICE_INTRODUCTION = """\
# Bench on {device}

Written by `kimi-llama bench --page`; do not edit. How to measure anew: the commands stand with each part.

{device} ({name}, {memory:.0f} GiB; driver {driver}) in a machine with {machine}. kimi-gguf {checkouts}; llama.cpp
{commit} of {package}, pristine and patched ({builds}) built from the same archive with the same options for
{backend} by {compilers}. Measured {when}.

Both builds hold the model on the device, all layers of it, in a process of their own and take turns in one run
(A B B A); the one not at work is stopped. Figures are medians, ± the median distance from them. Pristine is at its best
over flash attention on and off, chosen cell by cell; ours runs as it does by default (`KIMI_OPS={switch}`), and what
falls back to upstream's graph is said. *tg* is decoding token by token, *ppN* N tokens of a prompt at once with logits
of the last, in parts of 512 unless another number stands there (`--ubatch`); *at D* behind D tokens in the cache
(states saved once and loaded into both). {limits}

Generated models have the 48B's layer shapes with fewer layers and random weights (`--layers`, `--experts`); the types
are llama-quantize's mix.
"""
DEVICE_LIMITS = """\
*Of the limit* is the least time at the rates below against ours: for weights, attention and recurrence, one behind the
other, the bytes that a decode must move over the rate of a copy, or its multiply-adds over that of the fastest large
product, as pristine's ggml computes them on this device, whichever takes longer. What binds most is named."""
NO_DEVICE_LIMITS = "The device's own limit was not measured."


def cell_key(cell: Data) -> tuple[Any, ...]:
    """What makes two cells the same measurement."""
    key = tuple(cell[name] for name in ("cache_type", "sequences", "threads", "depth", "batch"))
    return (*key[:3], cell.get("ubatch", UBATCH), *key[3:])


def group_key(cell: Data) -> tuple[Any, ...]:
    """What the cells of a table share."""
    return cell_key(cell)[:4]


def cache_size(model: Data) -> float:
    """MiB of the largest cache that was made; the model's memory is shown with that one."""
    contexts = model["about"]["contexts"].values()
    return max((sum(memory.get("kv", {}).values()) for memory in contexts), default=0.0)


def merged(records: Sequence[Data]) -> dict[str, dict[str, Any]]:
    """Models by name, their cells from all records, the latest of equal ones, in order."""
    models: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: str(record["created"])):
        for model in record["models"]:
            into = models.setdefault(
                model["name"],
                {
                    "cells": {},
                    "commands": {},
                    "fallbacks": {},
                    "not_measured": {},
                    "left_out": {},
                    "model": model,
                },
            )
            into["model"] = max(into["model"], model, key=cache_size)
            about = model["about"]
            if model["cells"] or about.get("not_measured"):
                into["commands"][record["command"]] = None
            for lines in about.get("fallbacks", {}).values():
                into["fallbacks"] |= dict.fromkeys(lines)
            into["left_out"] |= about.get("left_out", {})
            into["not_measured"] |= {cell_key(cell): cell for cell in about.get("not_measured", ())}
            into["cells"] |= {cell_key(cell): cell for cell in model["cells"]}
    for each in models.values():
        left = each["not_measured"].keys() - each["cells"].keys()
        each["about"] = {"not_measured": [each["not_measured"][key] for key in sorted(left)],
                         "left_out": each["left_out"]}  # fmt: skip
        each["cells"] = [each["cells"][key] for key in sorted(each["cells"])]
    return models


def operators_table(rows: Iterable[Data]) -> Rows:
    """The operators alone."""
    table: Rows = [("operator, one layer", "counted", "pristine", "here", "ratio")]
    for row in rows:
        theirs, ours = (short_time(row[build]["seconds"]) for build in ("pristine", "patched"))
        plain = ", without flash attention" if row["pristine"]["case"].endswith("plain") else ""
        table.append((row["title"], row["counted"], theirs + plain, ours, f"{row['ratio']:.1f}" + mark(row)))
    return table


def device_operators_tables(rows: Iterable[Data]) -> list[tuple[str, Rows]]:
    """A table for each operator, with a heading that has what all its cases share."""
    tables = []
    for operator, group in itertools.groupby(rows, key=lambda row: str(row["operator"])):
        cases = [(dict(PARAMETER.findall(row["parameters"])), row) for row in group]
        names = dict.fromkeys(name for case, _ in cases for name in case)
        varied = [name for name in names if len({case.get(name) for case, _ in cases}) > 1]
        same = ", ".join(f"{name}={cases[0][0][name]}" for name in names if name not in varied)
        table: Rows = [("case", "pristine", "here", "ratio")]
        for case, row in cases:
            theirs, ours = row["pristine"], row["patched"]
            times = ("not there" if each is None else short_time(each / 1e6) for each in (theirs, ours))
            told = ", ".join(f"{name}={case[name]}" for name in varied if name in case)
            table.append((told or "one case", *times, f"{theirs / ours:.2f}" if theirs and ours else ""))
        tables.append((f"{operator}: {same}" if same else operator, table))
    return tables


def products_table(rows: Iterable[Data]) -> Rows:
    """Products of weights alone."""
    table: Rows = [("weights", "product", "threads", "pristine", "here", "ratio", "of the limit")]
    for row in rows:
        theirs, ours = (short_time(row[build]["seconds"]) for build in ("pristine", "patched"))
        plain = ", --repack 0" if row["pristine"]["case"].endswith("rows") else ""
        share = f"{100 * row['floor']['share']:.0f} % ({row['floor']['bound']})"
        table.append(
            (row["weights"], row["shape"], str(row["threads"]), theirs + plain, ours,
             f"{row['ratio']:.2f}" + mark(row), share)
        )  # fmt: skip
    return table


def short_time(seconds: float) -> str:
    """Such as "13.7 ms"."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def hybrid_table(hybrid: Data) -> Rows:
    """Cache and decode rate of the hybrid and of its twin, with what the slopes give at a million tokens."""
    rows: Rows = [("depth", "cache 3:1", "cache all MLA", "less", "tg 3:1", "tg all MLA", "ratio")]
    for row in hybrid["rows"]:
        cache = [row["cache_bytes"][name] + row["state_bytes"][name] for name in NAMES]
        rates = [1 / row["seconds"][name] for name in NAMES]
        rows.append(hybrid_row(str(row["depth"]), cache, rates))
    beyond = extrapolated(hybrid["rows"])
    if beyond is not None:
        last = hybrid["rows"][-1]
        cache = [
            last["cache_bytes"][name] / last["depth"] * MILLION + last["state_bytes"][name] for name in NAMES
        ]
        rows.append(hybrid_row(f"{MILLION} (from the slopes)", cache, [1 / beyond[name] for name in NAMES]))
    return rows


def hybrid_row(depth: str, cache: Sequence[float], rates: Sequence[float]) -> tuple[str, ...]:
    sizes = (f"{size / 2**20:.1f} MiB" for size in cache)
    less = f"{100 * (1 - cache[0] / cache[1]):.0f} %"
    return (depth, *sizes, less, *(f"{rate:.2f}/s" for rate in rates), f"{rates[0] / rates[1]:.2f}")


def write_page(records: Sequence[Data], page: Path) -> None:
    """Write the page and its pictures. Raises `EngineError` from reading, OSError from writing."""
    latest = max(records, key=lambda record: str(record["created"]))
    devices = {(record.get("device") or {}).get("description") for record in records}
    if len(devices) > 1:
        raise EngineError(
            "records of different devices",
            found=", ".join(sorted(name or "the processor" for name in devices)),
            todo="draw a page for each",
        )
    device = latest.get("device")
    parts = [device_introduction(latest, records) if device else introduction(latest, records)]
    if device:
        parts.append("## Aims\n\n" + markdown(aims_table(records)))
    limits = {each["threads"]: each for record in records for each in record["limits"]}
    if device and limits:
        parts.append("## The device's limit\n\n" + markdown(device_limits_table(next(iter(limits.values())))))
    elif limits:
        parts.append(
            "## The machine's limit\n\nMeasured before each run and beside every cell: the memory is shared with other "
            "machines,\nand the limit another one from minute to minute.\n\n"
            + markdown(limits_table(machine_limits(records)))
        )
    for name, model in merged(records).items():
        if model["cells"] or model["about"]["not_measured"]:
            parts.append(model_part(name, model, page))
    operators = [record for record in records if record["operators"]]
    if operators:
        record = max(operators, key=lambda record: str(record["created"]))
        parts.append(
            f"## Operators alone\n\n`{record['command']}`, {record['operators'][0]['threads']} threads; 32 heads, "
            "sizes of the 48B; time of one layer and call, as many layers at once as caches do not hold.\n\n"
            + markdown(operators_table(record["operators"]))
        )
    operators = [record for record in records if record.get("device_operators")]
    if operators:
        parts.append(device_operators_part(max(operators, key=lambda record: str(record["created"]))))
    products = [record for record in records if record.get("products")]
    if products:
        parts.append(products_part(products))
    hybrids = [record for record in records if record["hybrid"]]
    if hybrids:
        record = max(hybrids, key=lambda record: str(record["created"]))
        parts.append(hybrid_part(record))
    atomically(page, lambda part: part.write_text("\n".join(parts)))


def machine_limits(records: Iterable[Data]) -> list[Data]:
    """All that were measured: before runs, and beside cells."""
    before = [limits for record in records for limits in record["limits"]]
    cells = [cell for record in records for model in record["models"] for cell in model["cells"]]
    return before + [cell["floor"]["limits"] for cell in cells if cell["floor"]]


def introduction(record: Data, records: Sequence[Data]) -> str:
    """The page's head."""
    machine, engine = record["machine"], record["engines"]["patched"]
    days = sorted({str(each["created"])[:10] for each in records})
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    return INTRODUCTION.format(
        machine=f"{machine['processor']}, {machine['cores']} cores{memory}, {machine['system'].split()[0]}",
        commit=str(engine["llama_cpp_commit"])[:7],
        package=engine["package"],
        builds=", ".join(sorted({str(each["engines"]["patched"]["commit"]) for each in records})),
        switch=record["switch"],
        compiler=str(engine["compilers"]["C++"]).rpartition(": ")[2],
        when=days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
    )


def device_introduction(record: Data, records: Sequence[Data]) -> str:
    """The head of a page about a device."""
    machine, engine, device = record["machine"], record["engines"]["patched"], record["device"]
    days = sorted({str(each["created"])[:10] for each in records})
    compilers = [str(engine["compilers"][each]).rpartition(": ")[2] for each in sorted(engine["compilers"])]
    return DEVICE_INTRODUCTION.format(
        device=device["description"],
        name=device["name"],
        memory=device["memory"] / 2**30,
        driver=device["driver"] or "not told",
        machine=f"{machine['processor']}, {machine['cores']} cores, {machine['system'].split()[0]}",
        checkouts=", ".join(sorted({str(each["checkout"] or "installed") for each in records})),
        commit=str(engine["llama_cpp_commit"])[:7],
        package=engine["package"],
        builds=", ".join(sorted({str(each["engines"]["patched"]["commit"]) for each in records})),
        backend=device["backend"],
        compilers=", ".join(dict.fromkeys(compilers)),
        when=days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
        switch=record["switch"],
        limits=DEVICE_LIMITS if any(each["limits"] for each in records) else NO_DEVICE_LIMITS,
    )


def device_operators_part(record: Data) -> str:
    """The operators alone, as test-backend-ops times them."""
    parts = [
        f"## Operators alone\n\n`{record['command']}`: llama.cpp's `test-backend-ops perf` of either build, time of "
        "one call. Cases that pristine lacks are of operators or kernels of our own. `GATED_DELTA_NET` is pristine's "
        "recurrence alone, without convolutions, gates and norms, 32 heads of 128.\n"
    ]
    for heading, table in device_operators_tables(record["device_operators"]):
        parts.append(f"{heading}\n\n{markdown(table)}")
    return "\n".join(parts)


def model_part(name: str, model: Data, page: Path) -> str:
    """A model's cells in groups, with pictures, and its memory."""
    parts = [f"## {name}\n\n" + "\n".join(f"- `{command}`" for command in model["commands"]) + "\n"]
    for fallback in model["fallbacks"]:
        parts.append(f"Falls back: {fallback}\n")
    for (cache_type, sequences, threads, ubatch), group in itertools.groupby(model["cells"], key=group_key):
        cells = list(group)
        device = cells[0].get("device")
        where = f"on {device}" if device else f"{threads} threads"
        title = f"{name}, {cache_type} cache, {sequences} sequence{'s' if sequences > 1 else ''}, {where}"
        options = f"{sequences}x{threads}" + ("" if ubatch == UBATCH else f"-{ubatch}")
        picture = page.with_name(f"{page.stem}-{name}-{cache_type}-{options}.svg")
        parts.append(markdown(cells_table(cells)) + "\n" + verdict(cells) + "\n")
        if len(cells) > 3:
            atomically(picture, lambda part, t=title, c=cells: draw(t, c, part))  # type: ignore[misc]
            parts.append(f"![{title}]({picture.name})\n")
    if lines := not_measured_lines(model):
        parts.append("\n".join(f"- {line}" for line in lines) + "\n")
    parts.append(
        "Memory in MiB, and seconds of loading (from the page cache):\n\n"
        + markdown(memory_table(model["model"]))
    )
    return "\n".join(parts)


def products_part(records: Sequence[Data]) -> str:
    """Products of weights alone."""
    rows = [row for record in records for row in record["products"]]
    commands = "\n".join(f"- `{record['command']}`" for record in records)
    return (
        f"## Products alone\n\n{commands}\n\nA product of rows of {K} weights out of memory, rearranged where "
        "llama.cpp would by default; pristine at its best over `--repack 0/1`. *Of the limit*: multiply-adds over the "
        "measured int8, bf16 or (F16) float32 peak, or bytes of weights over the memory's rate, against ours. 512 "
        "tokens on 8 of 32 experts are 128 columns a matrix.\n\n" + markdown(products_table(rows))
    )


def hybrid_part(record: Data) -> str:
    """What the hybrid buys."""
    hybrid = record["hybrid"]
    return (
        f"## What the hybrid buys\n\n`{record['command']}`: {' against '.join(hybrid['models'])}, our build, "
        f"{hybrid['cache_type']} cache, {hybrid['threads']} threads. Caches are filled with the rows of "
        f"{hybrid['seed']} real tokens again and again; recurrent states count as cache. One layer in four attends, "
        "so one sequence can decode four times as fast at most; the 6 × of the model's report (arXiv 2510.26692) come "
        "with the larger batches that the smaller cache leaves room for.\n\n"
        + markdown(hybrid_table(hybrid))
        + "".join(
            f"\nNot measured: depth {depth}: {why}.\n"
            for depth, why in hybrid.get("not_measured", {}).items()
        )
    )
