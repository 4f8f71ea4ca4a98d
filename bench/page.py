"""Writes the page of measurements.

Input: records. Output: a Markdown page, and a picture of all cells next to it. If several records have the same cell,
the latest counts. Records with different `libraries` have sections of their own.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from kimi_gguf.bench import report
from kimi_gguf.bench.files import atomically
from kimi_gguf.bench.hybrid import MILLION, NAMES, extrapolated
from kimi_gguf.bench.matmuls import K
from kimi_gguf.bench.merging import by_age, measured_by, merged, operator_rows
from kimi_gguf.bench.operators import counted
from kimi_gguf.bench.plot import draw
from kimi_gguf.bench.record import machine_of
from kimi_gguf.bench.report import Data, Rows, mark, markdown, of_roofline, one_line
from kimi_gguf.engine.errors import EngineError

PARAMETER = re.compile(r"(\w+)=(\[[^\]]*\]|[^,]*)")  # as test-backend-ops writes them

MADE_BY = "Written by `kimi-llama bench`; do not edit."

INTRODUCTION = """\
{made_by} {machine}. llama.cpp {commit} of {package}, upstream and patched built from
the same archive with the same options by {compilers}. Measured {when} ({source}).
"""
METHOD = """\
Both builds alternate in one run (A B B A). Figures are medians ± the median absolute deviation. Upstream: the fastest
of {variants}, for each cell. Patched: the default options{switch}. *tg*:
decoding one token at a time. *ppN*: N prompt tokens in one batch. *at D*: after D tokens in the cache. {roofline}

Generated models have the layer shapes of published models, random weights, and as many layers and experts as their
name says (Kimi-Linear-48B, in names 48b, has 27 and 256). The quantization mix is that of llama-quantize.
"""
ROOFLINE = """\
*% of
roofline*: the least possible time, by the {rates} rates measured around the cell, divided by patched's time; in
parentheses, what bounds it; above 100 % if the bandwidth was lower around the cell than during it."""
NO_DEVICE_PEAKS = "The device's peak rates were not measured."
LIBRARIES = """\
# Libraries in {name}

In these sections *patched* is the build in this folder (`--libraries`).
"""
MOST_NAME = 80  # characters of a model's name in a file's name


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
            times = ("not available" if time is None else short_time(time / 1e6) for time in both)
            varying = ", ".join(f"{name}={case[name]}" for name in varied if name in case)
            ratio = f"{upstream / patched:.2f}" if upstream and patched else ""
            table.append((varying or "one case", *times, ratio))
        tables.append((f"{operator}: {same}" if same else operator, table))
    return tables


def matmuls_table(rows: Iterable[Data]) -> Rows:
    """Times of single matmuls."""
    table: Rows = [("weights", "matmul", "upstream", "patched", "ratio", "% of roofline")]
    for row in rows:
        upstream, patched = (short_time(row[build]["seconds"]) for build in ("upstream", "patched"))
        plain = ", --repack 0" if row["upstream"]["case"].endswith("rows") else ""
        table.append(
            (row["weights"], row["shape"], upstream + plain, patched,
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
    records: Sequence[Data],
    page: Path,
    title: str | None = None,
    manifest: str | None = None,
    method: str | None = None,
) -> None:
    """Write the page and its picture. manifest: name of the file that lists the commands; without, the page does.
    method: name of the page that says how cells are measured; without, this page does.

    Raises `EngineError` from reading, OSError from writing.
    """
    check_place(page)
    last = latest(records)
    if last is None:
        raise EngineError(f"{page}: no records", todo="name records of the bench")
    device = last["device"]
    machines = sorted({machine_of(record) for record in records})
    if len(machines) > 1:
        raise EngineError(
            "records of different machines or devices",
            found=" and ".join(machines),
            todo="write one page for each",
        )
    title = title or (f"Bench on {device['description']}" if device else "Bench")
    parts = [f"# {title}\n", introduction(last, records, manifest, method)]
    groups = by_libraries(records)
    limits = {peaks["threads"]: peaks for record in records for peaks in record["limits"]}
    if device and limits:
        table = report.device_peaks_table(next(iter(limits.values())))
        parts.append("## Peak rates of the device\n\n" + markdown(table))
    elif limits:
        parts.append(
            "## Peak rates of the machine\n\nMeasured before each run and around every cell. Other machines share the "
            "memory,\nso its bandwidth changes from minute to minute.\n\n"
            + markdown(report.peaks_table(machine_peaks(records)))
        )
    pictures: dict[Path, dict[str, list[Data]]] = {}
    for libraries, several in groups.items():
        picture = page.with_suffix(".svg")
        if libraries is not None:
            name = one_line(libraries)
            parts.append(LIBRARIES.format(name=name))
            picture = picture.with_stem(f"{page.stem}-{file_name(name)}")
        models = {one_line(title) or "unnamed": model for title, model in merged(several).items()}
        if cells := {title: model["cells"] for title, model in models.items() if model["cells"]}:
            pictures[picture] = cells
            every = list(itertools.chain.from_iterable(cells.values()))
            alt = f"Ratio of patched to upstream for each of {len(every)} cells, by model and tokens decoded at once"
            parts.append(f"## All cells\n\n{report.verdict(every)}\n\n![{alt}]({picture.name})\n")
        parts += sections(several, models)
    if manifest is None:
        commands = dict.fromkeys(map(measured_by, by_age(records)))
        parts.append("## Commands\n\n" + "".join(f"- {command}\n" for command in commands))
    for picture, cells in pictures.items():
        atomically(picture, lambda part, cells=cells: draw(cells, part))  # type: ignore[misc]
    atomically(page, lambda part: part.write_text("\n".join(parts)))


def by_libraries(records: Sequence[Data]) -> dict[str | None, list[Data]]:
    """The records by what they used instead of patched's libraries; those that used patched's come first."""
    names = sorted({record["libraries"] for record in records}, key=lambda name: name or "")
    return {name: [record for record in records if record["libraries"] == name] for name in names}


def sections(records: Sequence[Data], models: dict[str, Data]) -> list[str]:
    """The sections of records with the same libraries. models: of these records, merged."""
    parts = []
    for title, model in models.items():
        if model["cells"] or model["about"]["not_measured"]:
            parts.append(model_part(title, model))
    if record := latest(record for record in records if record["operators"]):
        parts.append(operators_part(record))
    if timed := [record for record in records if record["device_operators"]]:
        parts.append(device_operators_part(timed))
    if matmuls := [record for record in records if record["matmuls"]]:
        parts.append(matmuls_part(matmuls))
    if record := latest(record for record in records if record["hybrid"]):
        parts.append(hybrid_part(record))
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


def introduction(record: Data, records: Sequence[Data], manifest: str | None, method: str | None) -> str:
    """The introduction of the page. record: the latest one. manifest, method: see `write_page`."""
    machine, engine, device = record["machine"], record["engines"]["patched"], record["device"]
    days = sorted({str(one["created"])[:10] for one in records})
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] and not device else ""
    where = f"{machine['processor']}, {machine['cores']} cores{memory}, {machine['system'].split()[0]}"
    compilers = sorted(engine["compilers"].items()) if device else [("C++", engine["compilers"]["C++"])]
    variants, roofline = (
        "`--repack 0/1` and flash attention on/off",
        ROOFLINE.format(rates="memory and compute"),
    )
    if device:
        where = (
            f"{device['description']} ({device['name']}, {device['memory'] / 2**30:.0f} GiB, driver "
            f"{device['driver'] or 'unknown'}, {device['backend']}) in a machine with {where}"
        )
        variants, roofline = "flash attention on/off", ROOFLINE.format(rates="copy and matmul")
        if not any(one["limits"] for one in records):
            roofline = NO_DEVICE_PEAKS
    text = INTRODUCTION.format(
        made_by=MADE_BY,
        machine=where,
        commit=str(engine["llama_cpp_commit"])[:7],
        package=engine["package"],
        compilers=", ".join(dict.fromkeys(version(compiler) for _, compiler in compilers)),
        when=days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
        source=f"commands: [{manifest}]({manifest})" if manifest else "commands: at the end",
    )
    if method is not None:
        return f"{text}\n[How cells are measured]({method}).\n"
    return f"{text}\n" + METHOD.format(
        variants=variants,
        switch=f" with `KIMI_OPS={record['switch']}`" if record["switch"] else "",
        roofline=roofline,
    )


def version(compiler: object) -> str:
    """A compiler and its version, without its path."""
    return str(compiler).rpartition(": ")[2]


def operators_part(record: Data) -> str:
    """Single operators on the CPU."""
    return (
        f"## Single operators\n\n{record['operators'][0]['threads']} threads; 32 heads, "
        "sizes of the 48B; time per layer and call, over more layers than the caches hold. "
        "Each row is a run of its own, in which both builds alternate. The machine's bandwidth changes between rows "
        "(see above), and with it the time of the same operator.\n\n"
        + markdown(operators_table(record["operators"]))
    )


def device_operators_part(records: Sequence[Data]) -> str:
    """Single operators, timed by test-backend-ops; of each operator, the latest rows."""
    rows = operator_rows(records)
    parts = [
        "## Single operators\n\nllama.cpp's `test-backend-ops perf` of both builds, time per call. "
        "Upstream lacks the operators that are not available there. `GATED_DELTA_NET` is its recurrence "
        "only, without convolutions, gates and norms, with 32 heads of 128.\n"
    ]
    for heading, table in device_operators_tables(itertools.chain.from_iterable(rows.values())):
        parts.append(f"{heading}\n\n{markdown(table)}")
    return "\n".join(parts)


def model_part(name: str, model: Data) -> str:
    """The cells of a model, and its memory."""
    parts = [f"## {name}\n"]
    for fallback in model["fallbacks"]:
        parts.append(f"Falls back: {fallback}\n")
    parts.append(markdown(report.cells_table(model["cells"])))
    if lines := report.not_measured_lines(model):
        parts.append("\n".join(f"- {line}" for line in lines) + "\n")
    parts.append(
        "Memory in MiB with flash attention, and the time of loading:\n\n"
        + markdown([row for row in report.memory_table(model["model"]) if " -fa 0" not in row[0]])
    )
    about = model["model"]["about"]
    if about["resident"]:
        parts.append(
            "Each process ran alone, in turns A B C C B A; peak rates were measured before the first and after each. "
            "The memory of each: private (copies of weights, caches, buffers), pages of mapped files, and the peak of "
            "both:\n\n" + markdown(report.turns_table(model["model"]))
        )
    return "\n".join(parts)


def matmuls_part(records: Sequence[Data]) -> str:
    """Single matmuls."""
    rows = [row for record in records for row in record["matmuls"]]
    threads = dict.fromkeys(str(row["threads"]) for row in rows)
    return (
        f"## Single matmuls\n\n{', '.join(threads)} threads. Rows of {K} weights, read from memory. Upstream: the "
        "faster of `--repack 0/1`. Patched: repacked only where it does so by default. *% of roofline*: the longer of "
        "two ideal times, divided by patched's time: compute (multiply-adds / peak rate of the type: int8, bf16, or "
        "float32 for "
        "F16) and memory (bytes of weights / bandwidth). Above 100 %: the bandwidth measured around the row was lower "
        "than during it. "
        "With 512 tokens and 8 of 32 experts each matrix has 128 columns.\n\n" + markdown(matmuls_table(rows))
    )


def hybrid_part(record: Data) -> str:
    """The hybrid against the all-MLA model."""
    hybrid = record["hybrid"]
    missing = hybrid["not_measured"]
    return (
        f"## Hybrid against all MLA\n\n{' against '.join(hybrid['models'])}, patched, "
        f"{hybrid['cache_type']} cache, {hybrid['threads']} threads. Caches repeat the rows of "
        f"{hybrid['seed']} real tokens. Recurrent states count as cache. One layer in four has attention, so one "
        "sequence decodes at most four times as fast. The 6 × of the model's report (arXiv 2510.26692) requires larger "
        "batches, which fit because the cache is smaller. "
        "Compare rates only within this table.\n\n"
        + markdown(hybrid_table(hybrid))
        + "".join(f"\nNot measured: depth {depth}: {why}.\n" for depth, why in missing.items())
    )
