"""Draws the cells of a model: the speedup over upstream, and tokens/s next to the roofline.

Input: cells of one model. Output: an SVG; equal cells give an equal file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#1f6fb2", "#e08a2c", "#3a8f4d", "#a33c7d", "#6b6b6b", "#b5432f")


def draw(title: str, cells: Sequence[dict[str, Any]], file: Path) -> None:
    """Write the SVG. cells: of one model, cache type, number of sequences and of threads; any batches and depths."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "kimi-gguf"
    figure, (ratios, rates) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    depths = sorted({cell["depth"] for cell in cells})
    for depth, colour in zip(depths, COLOURS, strict=False):
        row = sorted((cell for cell in cells if cell["depth"] == depth), key=lambda cell: cell["batch"])
        batches = [cell["batch"] for cell in row]
        speedups = [cell["ratio"] for cell in row]
        ratios.plot(batches, speedups, "o-", color=colour, markersize=4, label=f"depth {depth}")
        for build, style, size in (("patched", "o-", 4), ("upstream", "o:", 3)):
            speeds = [cell[build]["tokens_per_second"] for cell in row]
            rates.plot(batches, speeds, style, color=colour, markersize=size)
        known = [cell for cell in row if cell["floor"]]
        roofline = [cell["tokens"] / cell["floor"]["seconds"] for cell in known]
        batches = [cell["batch"] for cell in known]
        rates.plot(batches, roofline, "--", color=colour, linewidth=0.8, alpha=0.6)
    ratios.axhline(1.0, color="black", linewidth=0.8)
    for axes in (ratios, rates):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens decoded at once")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
    rates.set_yscale("log")
    rates.yaxis.set_major_formatter("{x:g}")
    rates.yaxis.set_minor_formatter("{x:g}")
    ratios.set_ylabel("speedup over the best upstream variant")
    rates.set_ylabel("tokens/s; upstream dotted, roofline dashed")
    ratios.legend(fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
