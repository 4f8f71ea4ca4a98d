"""Writes the page of measurements.

Input: records. Output: a Markdown page, and a picture next to it for each group of cells. If several records have the
same cell, the latest counts. Records with different `libraries` have sections of their own.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kimi_gguf.bench import report
from kimi_gguf.bench.aims import aims_table
from kimi_gguf.bench.cells import UBATCH
from kimi_gguf.bench.files import atomically
from kimi_gguf.bench.hybrid import MILLION, NAMES, extrapolated
from kimi_gguf.bench.matmuls import K
from kimi_gguf.bench.merging import by_age, cell_key, measured_by, merged, operator_rows
from kimi_gguf.bench.operators import counted
from kimi_gguf.bench.plot import draw
from kimi_gguf.bench.record import machine_of
from kimi_gguf.bench.report import Data, Rows, mark, markdown, of_roofline, one_line
from kimi_gguf.engine.errors import EngineError

PARAMETER = re.compile(r"(\w+)=(\[[^\]]*\]|[^,]*)")  # as test-backend-ops writes them

MADE_BY = "Written by `kimi-llama bench`; do not edit."

INTRODUCTION = """\
{made_by} Each section lists the commands that measured it, with the
patched build and the day. If several of them measured the same cell, the last one counts.

{machine}. llama.cpp {commit} of {package}, upstream and patched ({builds}) built from the
same archive with the same options by {compiler}, without upstream's AMX matmuls. Measured {when} with
kimi-gguf at {checkouts}. {dirty}Builds of later commits contain later patches.

Each build has its own process with the model loaded. The processes alternate in one run (A B B A); the idle one is
stopped. Figures are medians ± the median absolute deviation. Upstream: the fastest of `--repack 0/1` and flash
attention on/off, for each cell. Patched: the default options with `KIMI_OPS={switch}`. *tg*: decoding one token at a
time. *ppN*: N prompt tokens in one batch, with the logits of the last. *at D*: after D tokens in the cache; both builds
load the same saved state. *% of roofline*: the least possible time divided by the time of patched. The least time is
the sum over weights, attention and recurrence of bytes / memory bandwidth or multiply-adds / peak rate, whichever is
longer; the rates are measured before and after each cell. In parentheses: what bounds most of this time. Above 100 %:
the bandwidth measured around the cell was lower than during it. *Unknown*: the int8 rate was measured wrongly.

Generated models have the layer shapes of published models, random weights, and as many layers and experts as their
name says (`--layers`, `--experts`; Kimi-Linear-48B, in names 48b: 27 and 256). The quantization mix is that of
llama-quantize.
"""

DEVICE_INTRODUCTION = """\
{made_by} Each section lists the commands that measured it, with the
patched build and the day. If several of them measured the same cell, the last one counts.

{device} ({name}, {memory:.0f} GiB; driver {driver}) in a machine with {machine}. kimi-gguf at {checkouts}; llama.cpp
{commit} of {package}, upstream and patched ({builds}) built from the same archive with the same options for
{backend} by {compilers}. {dirty}Measured {when}.

Each build has its own process with all layers on the device. The processes alternate in one run (A B B A); the idle
one is stopped. Figures are medians ± the median absolute deviation. Upstream: the faster of flash attention on/off, for
each cell. Patched: the default options (`KIMI_OPS={switch}`); fallbacks to upstream's graph are listed. *tg*: decoding
one token at a time. *ppN*: N prompt tokens in one batch, with the logits of the last; the ubatch size is 512 unless
the cell names another (`--ubatch`). *at D*: after D tokens in the cache; both builds load the same saved state.
{limits}

Generated models have the layer shapes of published models, random weights, and as many layers and experts as their
name says (`--layers`, `--experts`; Kimi-Linear-48B, in names 48b: 27 and 256). The quantization mix is that of
llama-quantize.
"""
DEVICE_PEAKS = """\
*% of roofline*: the least possible time divided by the time of patched. The least time is the sum over weights,
attention and recurrence of bytes / copy rate or multiply-adds / rate of the fastest large matmul, whichever is longer,
with the rates of upstream's ggml on this device. In parentheses: what bounds most of this time."""
DIRTY = "`-dirty`: that commit with changes that were not committed. "
NO_DEVICE_PEAKS = "The device's peak rates were not measured."
LIBRARIES = """\
# Libraries in {name}

In these sections *patched* is the build in this folder (`--libraries`).
"""
MOST_NAME = 80  # characters of a model's name in a file's name


def group_key(cell: Data) -> tuple[Any, ...]:
    """Equal for the cells of one table."""
    return cell_key(cell)[:4]


def operators_table(rows: Iterable[Data]) -> Rows:
    """Times of single operators."""
    table: Rows = [("operator, one layer", "what is timed", "upstream", "patched", "ratio")]
    for row in rows:
        upstream, patched = (short_time(row[build]["seconds"]) for build in ("upstream", "patched"))
        plain = ", without flash attention" if row["upstream"]["case"].endswith("plain") else ""
        table.append(
            (row["title"], counted(row), upstream + plain, patched, f"{row['ratio']:.1f}" + mark(row))
        )
    return table


def device_operators_tables(rows: Iterable[Data]) -> list[tuple[str, Rows]]:
    """A table for each operator; the heading has the parameters that all its cases share."""
    tables = []
    for operator, group in itertools.groupby(rows, key=lambda row: str(row["operator"])):
        cases = [(dict(PARAMETER.findall(row["parameters"])), row) for row in group]
        names = dict.fromkeys(name for case, _ in cases for name in case)
        varied = [name for name in names if len({case.get(name) for case, _ in cases}) > 1]
        same = ", ".join(f"{name}={cases[0][0][name]}" for name in names if name not in varied)
        table: Rows = [("case", "upstream", "patched", "ratio")]
        for case, row in cases:
            both = upstream, patched = row["upstream"], row["patched"]
            times = ("not available" if each is None else short_time(each / 1e6) for each in both)
            varying = ", ".join(f"{name}={case[name]}" for name in varied if name in case)
            ratio = f"{upstream / patched:.2f}" if upstream and patched else ""
            table.append((varying or "one case", *times, ratio))
        tables.append((f"{operator}: {same}" if same else operator, table))
    return tables


def matmuls_table(rows: Iterable[Data]) -> Rows:
    """Times of single matmuls."""
    table: Rows = [("weights", "matmul", "threads", "upstream", "patched", "ratio", "% of roofline")]
    for row in rows:
        upstream, patched = (short_time(row[build]["seconds"]) for build in ("upstream", "patched"))
        plain = ", --repack 0" if row["upstream"]["case"].endswith("rows") else ""
        table.append(
            (row["weights"], row["shape"], str(row["threads"]), upstream + plain, patched,
             f"{row['ratio']:.2f}" + mark(row), of_roofline(row["floor"]))
        )  # fmt: skip
    return table


def short_time(seconds: float) -> str:
    """Such as "13.7 ms"."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def hybrid_table(hybrid: Data) -> Rows:
    """Cache and decode rate of the hybrid and the all-MLA model; the last row extrapolates to a million tokens."""
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
        rows.append(hybrid_row(f"{MILLION} (extrapolated)", cache, [1 / beyond[name] for name in NAMES]))
    return rows


def hybrid_row(depth: str, cache: Sequence[float], rates: Sequence[float]) -> tuple[str, ...]:
    sizes = (f"{size / 2**20:.1f} MiB" for size in cache)
    less = f"{100 * (1 - cache[0] / cache[1]):.0f} %"
    return (depth, *sizes, less, *(f"{rate:.2f}/s" for rate in rates), f"{rates[0] / rates[1]:.2f}")


def prompt_cache_table(rows: Sequence[Data]) -> Rows:
    """Prompt tokens that each build evaluated."""
    table: Rows = [("situation", "upstream", "patched", "at most")]
    of = {build: [row for row in rows if row["build"] == build] for build in ("upstream", "patched")}
    for theirs, ours in zip(of["upstream"], of["patched"], strict=False):
        counts = (f"{row['evaluated']} of {row['prompt']}" for row in (theirs, ours))
        table.append((ours["situation"], *counts, str(ours["most"])))
    return table


def equal_requests_table(rows: Sequence[Data]) -> Rows:
    """Answers to equal requests under load."""
    table: Rows = [("type", "build", "different texts", "different log probabilities", "as without load")]
    for row in rows:
        counts = (str(row["texts"]), str(row["different"]), f"{row['as_alone']} of {row['requests']}")
        table.append((row["type"], row["build"], *counts))
    return table


def latest(records: Iterable[Data]) -> Data | None:
    """The record that was made last, if there is one."""
    return max(records, key=lambda record: str(record["created"]), default=None)


def check_place(page: Path) -> None:
    """Raise `EngineError` for a path that has another file than a page, or whose pictures could be another page's."""
    if page.suffix != ".md":
        raise EngineError(
            f"{page}: expected a name that ends with .md", todo=f"name it {page.with_suffix('.md').name}"
        )
    if page.exists() and MADE_BY not in page.read_text(encoding="utf-8", errors="replace"):
        raise EngineError(
            f"{page}: not a page of the bench", expected="a new file, or one with the line: " + MADE_BY,
            todo="name another file",
        )  # fmt: skip


def write_page(
    records: Sequence[Data], page: Path, title: str | None = None, others: Sequence[tuple[str, str]] = ()
) -> None:
    """Write the page and its pictures. others: titles and file names of pages that it names.

    Raises `EngineError` from reading, OSError from writing.
    """
    check_place(page)
    last = latest(records)
    if last is None:
        raise EngineError(f"{page}: no records", todo="name records of the bench")
    device = last.get("device")
    machines = sorted({machine_of(record) for record in records})
    if len(machines) > 1:
        raise EngineError(
            "records of different machines or devices",
            found=" and ".join(machines),
            todo="write one page for each",
        )
    title = title or (f"Bench on {device['description']}" if device else "Bench")
    parts = [f"# {title}\n", introduction(last, records)]
    if others:
        parts.append(f"Other pages: {', '.join(f'[{name}]({file})' for name, file in others)}.\n")
    groups = by_libraries(records)
    if device and None in groups:
        parts.append("## Goals\n\n" + markdown(aims_table(groups[None])))
    limits = {each["threads"]: each for record in records for each in record["limits"]}
    if device and limits:
        table = report.device_peaks_table(next(iter(limits.values())))
        parts.append("## Peak rates of the device\n\n" + markdown(table))
    elif limits:
        parts.append(
            "## Peak rates of the machine\n\nMeasured before each run and around every cell. Other machines share the "
            "memory,\nso its bandwidth changes from minute to minute.\n\n"
            + markdown(report.peaks_table(machine_peaks(records)))
        )
    for libraries, several in groups.items():
        if libraries is None:
            parts += sections(several, page)
        else:
            name = one_line(libraries)
            parts.append(LIBRARIES.format(name=name))
            parts += sections(several, page.with_stem(f"{page.stem}-{file_name(name)}"))
    atomically(page, lambda part: part.write_text("\n".join(parts)))


def by_libraries(records: Sequence[Data]) -> dict[str | None, list[Data]]:
    """The records by what they used instead of patched's libraries; those that used patched's come first."""
    names = sorted({record["libraries"] for record in records}, key=lambda name: name or "")
    return {name: [record for record in records if record["libraries"] == name] for name in names}


def sections(records: Sequence[Data], page: Path) -> list[str]:
    """The sections of records with the same libraries. page: pictures get its folder and the start of its name."""
    parts = []
    models = merged(records)
    if cells := [cell for model in models.values() for cell in model["cells"]]:
        parts.append("## All cells\n\n" + report.verdict(cells) + "\n")
    for title, model in models.items():
        if model["cells"] or model["about"]["not_measured"]:
            parts.append(model_part(one_line(title) or "unnamed", model, page))
    if record := latest(record for record in records if record["operators"]):
        parts.append(operators_part(record))
    if timed := [record for record in records if record.get("device_operators")]:
        parts.append(device_operators_part(timed))
    if matmuls := [record for record in records if record.get("products")]:
        parts.append(matmuls_part(matmuls))
    if record := latest(record for record in records if record["hybrid"]):
        parts.append(hybrid_part(record))
    if record := latest(record for record in records if record.get("prompt_cache")):
        parts.append(prompt_cache_part(record))
    return parts


def file_name(text: str) -> str:
    """The text as part of a file's name: short, without special characters. Different texts stay different."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:MOST_NAME]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def machine_peaks(records: Iterable[Data]) -> list[Data]:
    """All measured peak rates: before runs and around cells."""
    before = [limits for record in records for limits in record["limits"]]
    cells = [cell for record in records for model in record["models"] for cell in model["cells"]]
    return before + [cell["floor"]["limits"] for cell in cells if cell["floor"]]


def introduction(record: Data, records: Sequence[Data]) -> str:
    """The introduction of the page. record: the latest one."""
    machine, engine, device = record["machine"], record["engines"]["patched"], record.get("device")
    days = sorted({str(each["created"])[:10] for each in records})
    checkouts = ", ".join(dict.fromkeys(map(checkout, by_age(records))))
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] and not device else ""
    facts = {
        "machine": f"{machine['processor']}, {machine['cores']} cores{memory}, {machine['system'].split()[0]}",
        "commit": str(engine["llama_cpp_commit"])[:7],
        "package": engine["package"],
        "builds": ", ".join(sorted({str(each["engines"]["patched"]["commit"]) for each in records})),
        "made_by": MADE_BY,
        "switch": record["switch"],
        "checkouts": checkouts,
        "dirty": DIRTY if "-dirty" in checkouts else "",
        "when": days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
    }
    if not device:
        return INTRODUCTION.format(**facts, compiler=version(engine["compilers"]["C++"]))
    compilers = [version(found) for _, found in sorted(engine["compilers"].items())]
    return DEVICE_INTRODUCTION.format(
        **facts,
        device=device["description"],
        name=device["name"],
        memory=device["memory"] / 2**30,
        driver=device["driver"] or "unknown",
        backend=device["backend"],
        compilers=", ".join(dict.fromkeys(compilers)),
        limits=DEVICE_PEAKS if any(each["limits"] for each in records) else NO_DEVICE_PEAKS,
    )


def version(compiler: object) -> str:
    """A compiler and its version, without its path."""
    return str(compiler).rpartition(": ")[2]


def checkout(record: Data) -> str:
    """The commit of kimi-gguf that made a record."""
    return str(record.get("checkout") or "an unrecorded commit")


def operators_part(record: Data) -> str:
    """Single operators on the CPU."""
    return (
        f"## Single operators\n\n{measured_by(record)}, {record['operators'][0]['threads']} threads; 32 heads, "
        "sizes of the 48B; time per layer and call, over more layers than the caches hold. "
        "Each row is a run of its own, in which both builds alternate. The machine's bandwidth changes between rows "
        "(see above), and with it the time of the same operator.\n\n"
        + markdown(operators_table(record["operators"]))
    )


def device_operators_part(records: Sequence[Data]) -> str:
    """Single operators, timed by test-backend-ops; of each operator, the latest rows."""
    rows = operator_rows(records)
    commands = "\n".join(f"- {each}" for each in dict.fromkeys(map(measured_by, by_age(records))))
    parts = [
        f"## Single operators\n\n{commands}\n\nllama.cpp's `test-backend-ops perf` of both builds, time per call. "
        "Upstream lacks the operators that are not available there. `GATED_DELTA_NET` is its recurrence "
        "only, without convolutions, gates and norms, with 32 heads of 128.\n"
    ]
    for heading, table in device_operators_tables(itertools.chain.from_iterable(rows.values())):
        parts.append(f"{heading}\n\n{markdown(table)}")
    return "\n".join(parts)


def model_part(name: str, model: Data, page: Path) -> str:
    """The cells of a model in groups, with pictures, and its memory."""
    parts = [f"## {name}\n\n" + "\n".join(f"- {each}" for each in model["commands"]) + "\n"]
    for fallback in model["fallbacks"]:
        parts.append(f"Falls back: {fallback}\n")
    for (cache_type, sequences, threads, ubatch), group in itertools.groupby(model["cells"], key=group_key):
        cells = list(group)
        device = cells[0].get("device")
        where = f"on {device}" if device else f"{threads} threads"
        title = f"{name}, {cache_type} cache, {sequences} sequence{'s' if sequences > 1 else ''}, {where}"
        options = f"{sequences}x{threads}" + ("" if ubatch == UBATCH else f"-{ubatch}")
        picture = page.with_name(f"{page.stem}-{file_name(name)}-{cache_type}-{options}.svg")
        parts.append(markdown(report.cells_table(cells)) + "\n" + report.verdict(cells) + "\n")
        if len(cells) > 3:
            atomically(picture, lambda part, t=title, c=cells: draw(t, c, part))  # type: ignore[misc]
            parts.append(f"![{title}]({picture.name})\n")
    if lines := report.not_measured_lines(model):
        parts.append("\n".join(f"- {line}" for line in lines) + "\n")
    parts.append(
        "Memory in MiB, and the time of loading. Copies that an earlier build made may have displaced part of the\n"
        "file from the page cache:\n\n" + markdown(report.memory_table(model["model"]))
    )
    about = model["model"]["about"]
    if about.get("resident"):
        rates = "before the first turn and after each" if about.get("peaks") else "after all turns"
        parts.append(
            f"Each process ran alone, in turns A B C C B A; peak rates were measured {rates}. The memory of each: "
            "private (copies of weights, caches, buffers), pages of mapped files, and the peak of both:\n\n"
            + markdown(report.turns_table(model["model"]))
        )
    return "\n".join(parts)


def matmuls_part(records: Sequence[Data]) -> str:
    """Single matmuls."""
    rows = [row for record in records for row in record["products"]]
    commands = "\n".join(f"- {measured_by(record)}" for record in records)
    return (
        f"## Single matmuls\n\n{commands}\n\nRows of {K} weights, read from memory. Upstream: the faster of "
        "`--repack 0/1`. Patched: repacked only where it does so by default. *% of roofline*: the longer of two ideal "
        "times, divided by patched's time: compute (multiply-adds / peak rate of the type: int8, bf16, or float32 for "
        "F16) and memory (bytes of weights / bandwidth). Above 100 %: the bandwidth measured around the row was lower "
        "than during it. "
        "With 512 tokens and 8 of 32 experts each matrix has 128 columns.\n\n" + markdown(matmuls_table(rows))
    )


def prompt_cache_part(record: Data) -> str:
    """Prompt tokens that the server evaluates again."""
    return (
        f"## Prompt cache\n\n{measured_by(record)}: prompt tokens that llama-server evaluated, of all tokens of the "
        "prompt, for the demo as F32 with the chat template of Kimi K2 and random words. *At most*: the goal.\n\n"
        + markdown(prompt_cache_table(record["prompt_cache"]))
    )


def hybrid_part(record: Data) -> str:
    """The hybrid against the all-MLA model."""
    hybrid = record["hybrid"]
    missing = hybrid.get("not_measured", {})
    return (
        f"## Hybrid against all MLA\n\n{measured_by(record)}: {' against '.join(hybrid['models'])}, patched, "
        f"{hybrid['cache_type']} cache, {hybrid['threads']} threads. Caches repeat the rows of "
        f"{hybrid['seed']} real tokens. Recurrent states count as cache. One layer in four has attention, so one "
        "sequence decodes at most four times as fast. The 6 × of the model's report (arXiv 2510.26692) requires larger "
        "batches, which fit because the cache is smaller. "
        "Compare rates only within this table.\n\n"
        + markdown(hybrid_table(hybrid))
        + "".join(f"\nNot measured: depth {depth}: {why}.\n" for depth, why in missing.items())
    )
