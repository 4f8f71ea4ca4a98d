"""Draws the cells of a page: how many times as fast as upstream each is.

Input: cells by model. Output: an SVG with text as text; equal cells give an equal file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#1f6fb2", "#e08a2c", "#3a8f4d", "#a33c7d", "#6b6b6b", "#b5432f")
MOST_NAME = 60  # characters
# Panels: title, least number of tokens decoded at once, and the number from which on a cell is in the next one.
PANELS = (
    ("one token at a time", 1, 2),
    ("2 to 256 tokens at once", 2, 257),
    ("more than 256", 257, float("inf")),
)


def draw(models: Mapping[str, Sequence[dict[str, Any]]], file: Path) -> None:
    """Write the SVG: a row for each model, a dot for each cell, coloured by depth."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "kimi-gguf", "svg.fonttype": "none"}
    cells = [(_shown(name), cell) for name, several in models.items() for cell in several]
    depths = sorted({cell["depth"] for _, cell in cells})
    panels = [
        (title, [(name, cell) for name, cell in cells if least <= cell["tokens"] < end])
        for title, least, end in PANELS
    ]
    panels = [(title, inside) for title, inside in panels if inside]
    size = (10, 1.2 + 0.26 * len(models))
    figure, grid = plt.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (title, inside) in zip(grid[0], panels, strict=True):
        axes.scatter(
            [1.0] * len(models), [_shown(name) for name in models], s=0
        )  # a row for each model, in the order of the page
        for depth, colour in zip(depths, COLOURS * len(depths), strict=False):
            points = [(cell["ratio"], name) for name, cell in inside if cell["depth"] == depth]
            ratios, names = [ratio for ratio, _ in points], [name for _, name in points]
            axes.scatter(ratios, names, s=12, color=colour, alpha=0.7, label=f"depth {depth}")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=9)
        axes.set_xlim(left=0)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    grid[0][0].invert_yaxis()
    figure.supxlabel("times as fast as the best variant of upstream", fontsize=9)
    figure.legend(*grid[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)


def _shown(name: str) -> str:
    """A model's name without what matplotlib takes for mathematics or cannot write; long ones are cut."""
    return name[:MOST_NAME].encode("utf-8", "replace").decode().replace("$", r"\$")
