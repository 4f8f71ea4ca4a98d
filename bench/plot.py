"""Draws the cells of a page: how many times as fast as upstream each is.

Input: cells by model. Output: an SVG with text as text; equal cells give an equal file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
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
WIDTH, GAP, ROW, TOP, LETTER = 190, 20, 20, 24, 6.2  # pixels; LETTER: the width of a character of a name
AXIS = "times as fast as the best variant of upstream"


def draw(models: Mapping[str, Sequence[dict[str, Any]]], file: Path) -> None:
    """Write the SVG: a row for each model, a dot for each cell, coloured by depth."""
    cells = [(row, cell) for row, several in enumerate(models.values()) for cell in several]
    depths = sorted({cell["depth"] for _, cell in cells})
    colours = {depth: COLOURS[i % len(COLOURS)] for i, depth in enumerate(depths)}
    names = [name[:MOST_NAME].encode("utf-8", "replace").decode() for name in models]
    left, bottom = 16 + LETTER * max(map(len, names)), TOP + ROW * len(names)
    parts = [_text(left - 8, TOP + ROW * (i + 0.7), name, "end") for i, name in enumerate(names)]
    for title, least, end in PANELS:
        if inside := [(row, cell) for row, cell in cells if least <= cell["tokens"] < end]:
            parts += [
                _text(left + WIDTH / 2, TOP - 8, title, "middle"),
                *_panel(inside, left, bottom, colours),
            ]
            left += WIDTH + GAP
    for i, (depth, colour) in enumerate(colours.items()):
        parts += [
            _dot(left, TOP + ROW * (i + 0.5), colour),
            _text(left + 8, TOP + ROW * (i + 0.7), f"depth {depth}"),
        ]
    width, height = left + 90, max(bottom, TOP + ROW * len(depths)) + 44
    parts.append(_text(width / 2, height - 8, AXIS, "middle"))
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
    content = [
        f'{frame}font-size="11">',
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        *parts,
    ]
    file.write_text("\n".join([*content, "</svg>\n"]))


def _panel(
    cells: Sequence[tuple[int, dict[str, Any]]], left: float, bottom: float, colours: Mapping[int, str]
) -> list[str]:
    """The dots of a panel with its axis, from 0 to beyond the largest ratio. cells: with the number of their row."""
    most = max(1.0, *(cell["ratio"] for _, cell in cells)) * 1.05
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50, 1e9) if most / step <= 6)
    parts = [f'<path d="M{left:g} {TOP}h{WIDTH}V{bottom:g}h-{WIDTH}z" fill="none" stroke="#000000"/>']
    for i in range(int(most / step) + 1):
        x = left + WIDTH * i * step / most
        parts += [_line(x, bottom, "#dddddd"), _text(x, bottom + 14, f"{i * step:g}", "middle")]
    parts.append(_line(left + WIDTH / most, bottom, "#000000"))
    for row, cell in cells:
        x, y = left + WIDTH * cell["ratio"] / most, TOP + ROW * (row + 0.5)
        parts.append(_dot(x, y, colours[cell["depth"]]))
    return parts


def _line(x: float, bottom: float, colour: str) -> str:
    return f'<path d="M{x:.1f} {TOP}V{bottom:g}" stroke="{colour}"/>'


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:g}" r="2.5" fill="{colour}" fill-opacity="0.7"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
