"""Tables of a record: cells, peak rates, memory.

Input: the data of a record. Output: rows of text, as a Markdown table or as a table on a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from kimi_gguf.bench.cells import UBATCH
from kimi_gguf.bench.load import DISTURBED

Data = dict[str, Any]
Rows = list[tuple[str, ...]]

CELLS = ("cell", "upstream, tokens/s", "patched, tokens/s", "ratio", "% of roofline", "upstream as")
MEGABYTE = 1e6


def describe(cell: Data) -> str:
    """Such as "pp512 at 4096, 2 threads"."""
    kind = "tg" if cell["batch"] == 1 else f"pp{cell['batch']}"
    several = f" × {cell['sequences']} sequences" if cell["sequences"] > 1 else ""
    threads = f", {cell['threads']} thread{'s' if cell['threads'] > 1 else ''}"
    where = "" if cell["device"] else threads
    ubatch = cell["ubatch"]
    parts = "" if ubatch == UBATCH else f", ubatch {ubatch}"
    cache = "" if cell["cache_type"] == "f16" else f", {cell['cache_type']} cache"
    return f"{kind}{several} at {cell['depth']}{where}{parts}{cache}"


def cell_row(cell: Data) -> tuple[str, ...]:
    """A line of the table of cells."""
    speeds = [
        f"{speed_text(build['tokens_per_second'])} ± {100 * build['spread']:.1f} %"
        for build in (cell["upstream"], cell["patched"])
    ]
    share = of_roofline(cell["floor"])
    ratio = f"{cell['ratio']:.2f}" + mark(cell)
    way = cell["upstream"]["way"].removeprefix("upstream").strip()
    return (describe(cell), *speeds, ratio, share, way)


def speed_text(tokens_per_second: float) -> str:
    """Four digits, or whole tokens/s without an exponent."""
    return f"{tokens_per_second:.4g}" if tokens_per_second < 9999.5 else f"{tokens_per_second:.0f}"


def of_roofline(floor: Data | None) -> str:
    """Such as "91 % (memory)"."""
    return "unknown" if floor is None else f"{100 * floor['share']:.0f} % ({floor['bound']})"


def mark(measured: Data) -> str:
    """Marks the ratio of a measurement during which other work was running on the machine."""
    return " *" if (measured["others"] or 0) > DISTURBED else ""


def not_measured_lines(model: Data) -> list[str]:
    """The cells that were not measured and the variants that were not run, each with the reason."""
    about = model["about"]
    lines = [f"Not measured: {describe(cell)}: {cell['reason']}." for cell in about["not_measured"]]
    return lines + [f"Not run: {name}: {reason}." for name, reason in about["left_out"].items()]


def cells_table(cells: Iterable[Data]) -> Rows:
    """The table of cells with its header."""
    return [CELLS, *map(cell_row, cells)]


def slower(cells: Iterable[Data]) -> list[Data]:
    """Cells in which patched is slower than upstream by more than the sum of both spreads."""
    return [
        cell for cell in cells if cell["ratio"] < 1 - cell["upstream"]["spread"] - cell["patched"]["spread"]
    ]


def clearly_faster(cells: Iterable[Data]) -> list[Data]:
    """Cells in which patched is faster than upstream by more than the sum of both spreads."""
    return [
        cell for cell in cells if cell["ratio"] > 1 + cell["upstream"]["spread"] + cell["patched"]["spread"]
    ]


def verdict(cells: Sequence[Data]) -> str:
    """A summary of all cells."""
    losing = slower(cells)
    faster = sum(cell["ratio"] > 1 for cell in cells)
    words = [
        f"{len(cells)} cell{'s' if len(cells) > 1 else ''}; patched is faster than the best upstream variant in "
        f"{faster}, in {len(clearly_faster(cells))} by more than the spread"
    ]
    words.append(
        f"it is slower by more than the spread in {len(losing)}: "
        + "; ".join(f"{describe(cell)} ({cell['ratio']:.2f})" for cell in losing)
        if losing
        else "it is slower by more than the spread in none"
    )
    if any(map(mark, cells)):
        words.append("* other work was running on the machine")
    return "; ".join(words) + "."


def memory_table(model: Data) -> Rows:
    """Memory of each variant in MiB, and the time of loading."""
    rows: Rows = [("build, context", "weights", "KV cache", "recurrent cache", "compute buffers", "loading")]
    for variant, memory in model["about"]["contexts"].items():
        name, _, context = variant.partition(", ")
        process = name.removesuffix(" -fa 0")
        loaded = model["about"]["load"][process]
        sizes = [sum(loaded["memory"].get("weights", {}).values())]
        sizes += [sum(memory.get(part, {}).values()) for part in ("kv", "recurrent", "compute")]
        rows.append((f"{name}, {context}", *(f"{size:.1f}" for size in sizes), f"{loaded['seconds']:.1f} s"))
    return rows


def turns_table(model: Data) -> Rows:
    """Each variant of a model that was measured one process at a time: memory, loading, tokens/s, reads from disk."""
    about, cells = model["about"], model["cells"]
    names = list(dict.fromkeys(name for cell in cells for name in cell["samples"]))
    parts = ("private", "file", "peak")
    columns = [f"{describe(cell)}, tokens/s" for cell in cells]
    reads = bool(about["read"]) and max(about["read"].values()) >= MEGABYTE
    columns += [f"{describe(cell)}, MB from disk per token" for cell in cells if reads]
    rows: Rows = [("variant", "loading", *(f"{part} memory, MiB" for part in parts), *columns)]
    for name in names:
        process = name.removesuffix(" -fa 0")
        resident = about["resident"].get(process, {})
        sizes = (f"{resident[part]:.0f}" if part in resident else "unknown" for part in parts)
        samples = (cell["samples"].get(name) for cell in cells)
        speeds = [
            speed_text(cell["tokens"] / median(found)) if found else "not run"
            for cell, found in zip(cells, samples, strict=True)
        ]
        read = [about["read"].get(f"{name}, {describe(cell)}") for cell in cells if reads]
        disk = ("unknown" if nbytes is None else f"{nbytes / MEGABYTE:.1f}" for nbytes in read)
        rows.append((name, f"{about['load'][process]['seconds']:.1f} s", *sizes, *speeds, *disk))
    return rows


def peaks_table(peaks: Iterable[Data]) -> Rows:
    """Measured peak rates by number of threads: the range of all measurements."""
    kinds = ("f32", "int8", "bf16")
    rows: Rows = [("threads", "reading, GB/s", *(f"{kind}, GMAC/s" for kind in kinds))]
    by_threads: dict[int, list[Data]] = {}
    for peak in peaks:
        by_threads.setdefault(peak["threads"], []).append(peak)
    for threads, several in sorted(by_threads.items()):
        rates = (from_to([peak[kind] for peak in several if peak[kind]], 0) for kind in kinds)
        rows.append((str(threads), from_to([peak["read"] for peak in several], 1), *rates))
    return rows


def from_to(rates: Sequence[float], digits: int) -> str:
    """Such as "41.2 to 57.3", in 1e9 per second."""
    if not rates:
        return "not available"
    ends = [f"{rate / 1e9:.{digits}f}" for rate in (min(rates), max(rates))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def device_peaks_table(peaks: Data) -> Rows:
    """Measured peak rates of the device."""
    kinds = ("f32", "f16", "bf16", "int8")
    rates = ("not available" if peaks[kind] is None else f"{peaks[kind] / 1e9:.0f}" for kind in kinds)
    return [
        ("copying, GB/s", *(f"{kind}, GMAC/s" for kind in kinds)),
        (f"{peaks['read'] / 1e9:.1f}", *rates),
    ]


def one_line(text: str) -> str:
    """The text without line breaks, control characters and spaces at its ends."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def markdown(rows: Rows) -> str:
    """A Markdown table; the first row is the header."""
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    cells = ((one_line(cell).replace("|", r"\|") for cell in line) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def show(title: str, rows: Rows) -> None:
    """Print a table: drawn on a terminal, Markdown elsewhere."""
    if not sys.stdout.isatty():
        print(f"\n{title}\n\n{markdown(rows)}", flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*rows[0], title=Text(title), title_justify="left")  # a name may look like markup
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
