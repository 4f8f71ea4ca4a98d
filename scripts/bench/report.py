"""What a run of the bench leaves: a table for people, JSON for machines.

Flows in: results, facts on the machine, builds and model. Flows out: text and plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kimi_gguf.scripts.bench.measure import Result, describe

HEADER = ("cell", "pristine, tokens/s", "here, tokens/s", "ratio", "pristine's best way")


def row(result: Result) -> tuple[str, ...]:
    """A line of the table."""
    tokens = result.cell.tokens
    figures = [
        f"{tokens / each.median:.4g} ± {100 * each.spread:.1f} %" for each in (result.pristine, result.ours)
    ]
    return (describe(result.cell), *figures, f"{result.ratio:.2f}", result.rival)


def table(results: Sequence[Result]) -> str:
    """All lines as a Markdown table."""
    lines = [HEADER, ("---",) * len(HEADER), *map(row, results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_data(result: Result) -> dict[str, Any]:
    """A result for JSON: everything measured, and what is derived from it."""
    return {
        **vars(result.cell),
        "tokens": result.cell.tokens,
        "steps": result.steps,
        "pristine_way": result.rival,
        "pristine_tokens_per_second": result.cell.tokens / result.pristine.median,
        "patched_tokens_per_second": result.cell.tokens / result.ours.median,
        "ratio": result.ratio,
        "spread": {"pristine": result.pristine.spread, "patched": result.ours.spread},
        "samples": result.samples,
        "ruled_out": result.screened,
    }
