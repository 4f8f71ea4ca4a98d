"""Compares the goals for the kernels on a GPU with the records.

Input: records of one device. Output: a table; goals without a measurement are "not measured".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kimi_gguf.bench.cells import UBATCH
from kimi_gguf.bench.merging import cell_key, merged, operator_rows
from kimi_gguf.bench.report import Data, Rows, describe

KDA_TOKENS = 8192
KDA_MOST = 1000.0  # µs, for 32 heads of 128 on an H200
LONG = 65536  # tokens; from here a Q8_0 cache must not be slower than an F16 cache
# Apple GPUs, M1 Max to M4 Max: depth -> patched / upstream
DECODE = {0: 1.25, 16384: 1.5}
PREFILL = {0: 1.0, 16384: 1.3}


def aims_table(records: Sequence[Data]) -> Rows:
    """Each goal of the device's backend, and the worst measurement that is not superseded."""
    models = merged(records).values()
    cells = [cell for model in models for cell in model["cells"]]
    ratios = [(float(cell["ratio"]), cell) for cell in cells]
    alone = [(ratio, cell) for ratio, cell in ratios if cell["sequences"] == 1]
    decoding = [(ratio, cell) for ratio, cell in alone if cell["batch"] == 1]
    large = [(ratio, cell) for ratio, cell in alone if cell["batch"] >= UBATCH]
    header = ("goal", "required", "worst measured", "reached")
    everywhere = _least("all cells, patched / upstream", 1.0, ratios)
    if {record["device"]["backend"] for record in records} == {"metal"}:
        goals = [
            _least(f"{what} at depth {depth}, patched / upstream", least, at_depth(several, depth))
            for what, several, leasts in (("decoding", decoding, DECODE), ("prefill", large, PREFILL))
            for depth, least in leasts.items()
        ]
        return [header, *goals, everywhere]
    prefill = [(ratio, cell) for ratio, cell in large if KDA_TOKENS in (cell["batch"], cell["depth"])]
    quantized = [each for model in models for each in _quantized(model["cells"])]
    return [
        header,
        _kda(operator_rows(records).get("KDA_SCAN", ())),
        _least("prefill at 8192 tokens, patched / upstream", 3.0, prefill),
        _least("decoding of one sequence, patched / upstream", 1.5, decoding),
        everywhere,
        _least(f"Q8_0 cache from {LONG} tokens, Q8_0 / F16", 1.0, quantized),
    ]


def at_depth(cells: Iterable[tuple[float, Data]], depth: int) -> list[tuple[float, Data]]:
    """The cells of one depth, with their ratios."""
    return [(ratio, cell) for ratio, cell in cells if cell["depth"] == depth]


def _least(aim: str, wanted: float, cells: Sequence[tuple[float, Data]]) -> tuple[str, ...]:
    """The goal that all ratios are at least `wanted`. cells: with their ratios."""
    if not cells:
        return (aim, f"{wanted:g} ×", "not measured", "open")
    found, worst = min(cells, key=lambda cell: cell[0])
    return (aim, f"{wanted:g} ×", f"{found:.2f} × ({describe(worst)})", "yes" if found >= wanted else "no")


def _kda(rows: Iterable[Data]) -> tuple[str, ...]:
    """The forward pass of a layer's recurrence."""
    aim, wanted = f"KDA forward, 32 heads of 128, {KDA_TOKENS} tokens", f"{KDA_MOST / 1000:g} ms"
    shape = f"head_size=128,head_count=32,n_seq_tokens={KDA_TOKENS},n_seqs=1,"
    found = [row["patched"] for row in rows if row["parameters"].startswith(shape)]
    if not found or found[-1] is None:
        return (aim, wanted, "not measured", "open")
    return (aim, wanted, f"{found[-1] / 1000:.2f} ms", "yes" if found[-1] <= KDA_MOST else "no")


def _quantized(cells: Sequence[Data]) -> list[tuple[float, Data]]:
    """Deep cells with a Q8_0 cache that were also measured with F16, with the ratio of their speeds. cells: of one
    model."""

    def speed(cell: Data) -> float:
        return float(cell["patched"]["tokens_per_second"])

    speeds = {cell_key(cell): speed(cell) for cell in cells}
    deep = [cell for cell in cells if cell["cache_type"] == "q8_0" and cell["depth"] >= LONG]
    pairs = [(cell, cell_key(cell | {"cache_type": "f16"})) for cell in deep]
    return [(speed(cell) / speeds[other], cell) for cell, other in pairs if other in speeds]
