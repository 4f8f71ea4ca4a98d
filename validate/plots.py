"""The plots of a report: error by position, error by layer, KLD, top-1 agreement.

Input: a `Report`, or any runs. Output: name -> data URI of an SVG, or the contents of an image file, for a white
background.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from kimi_gguf.validate.metrics import Curves
from kimi_gguf.validate.report import Report

OWN, RIVAL, MARK, INK = "#1f5fa8", "#c2762b", "#b3261e", "#3c4650"
SMALLEST = 1e-16  # float64's precision; smaller values are drawn at this value
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "kimi-gguf",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Line:
    """A run to draw: its label, its colour, and what was measured."""

    label: str
    colour: str
    run: Curves

    @property
    def text(self) -> str:
        """The label without what matplotlib takes for mathematics, or for a line to hide ("_" in front)."""
        shown = "".join(c if c.isprintable() else " " for c in self.label).replace("$", r"\$")
        return f" {shown[:40]}"


Plot = Callable[[Axes, Sequence[Line]], None]


def draw(report: Report) -> dict[str, str]:
    """Draw all plots of the report; name -> data URI."""
    key = report.headline.variant.key
    lines = [
        Line(rival.title, RIVAL, run.curves)
        for rival in report.rivals
        for run in rival.runs
        if run.variant.key == key
    ]
    lines.append(Line("this file", OWN, report.headline.curves))  # last, so that it is drawn on top
    return {
        name: "data:image/svg+xml;base64," + base64.b64encode(image).decode()
        for name, image in images(lines, PLOTS, "svg").items()
    }


def images(
    lines: Sequence[Line], plots: Mapping[str, tuple[tuple[float, float], Plot]], form: str
) -> dict[str, bytes]:
    """Draw the lines in each plot; name -> contents of a file of the form ("svg" or "png")."""
    drawn = {}
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[form]
    with mpl.rc_context(STYLE):
        for name, ((width, height), plot) in plots.items():
            height += 0.2 * max(0, len(lines) - 2)  # for the legend
            figure = Figure(figsize=(width, height), layout="constrained")
            plot(figure.subplots(), lines)
            out = io.BytesIO()
            figure.savefig(out, format=form, dpi=130, metadata=metadata)
            drawn[name] = out.getvalue()
    return drawn


def _visible(values: NDArray[Any]) -> NDArray[Any]:
    """Values for a logarithmic axis: zero and NaN become SMALLEST."""
    visible: NDArray[Any] = np.maximum(np.nan_to_num(values, nan=SMALLEST, posinf=1e6), SMALLEST)
    return visible


def by_position(axes: Axes, lines: Sequence[Line]) -> None:
    """NMSE at each position; positions with an expert mismatch of the last line are marked."""
    for line in lines:
        axes.semilogy(_visible(line.run.nmse), color=line.colour, linewidth=0.9, label=line.text, alpha=0.85)
    last = lines[-1].run
    differs = np.flatnonzero(last.differs)
    if len(differs):
        errors = _visible(last.nmse[differs])
        of = f" of{lines[-1].text}" if len(lines) > 1 else ""
        axes.semilogy(differs, errors, "o", markersize=4, color=MARK, label=f"expert mismatch{of}")
    _whole_decades(axes)
    axes.set(xlabel="position", ylabel="NMSE", xlim=(0, max(1, len(last.nmse) - 1)))
    _legend(axes)


def by_layer(axes: Axes, lines: Sequence[Line]) -> None:
    """NMSE of each layer's output; MLA layers are drawn as squares."""
    for line in lines:
        layers = [layer.layer for layer in line.run.layers]
        errors = _visible(np.array([layer.nmse for layer in line.run.layers]))
        axes.semilogy(layers, errors, color=line.colour, linewidth=1.1, label=line.text)
        for kind, marker in (("kda", "o"), ("mla", "s")):
            which = [i for i, layer in enumerate(line.run.layers) if layer.kind == kind]
            axes.semilogy([layers[i] for i in which], errors[which], marker, markersize=5, color=line.colour)
    axes.semilogy([], [], "o", color=INK, label="KDA layer")
    axes.semilogy([], [], "s", color=INK, label="MLA layer")
    _whole_decades(axes)
    axes.set(xlabel="layer", ylabel="NMSE of the output")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def kld_histogram(axes: Axes, lines: Sequence[Line]) -> None:
    """Histogram of the KLD over positions, with a logarithmic axis; the last line is filled."""
    values = [_visible(line.run.kld) for line in lines]
    low, high = (f(np.concatenate(values)) for f in (np.min, np.max))
    bins = [float(edge) for edge in np.geomspace(low * 0.8, high * 1.25, 48)]
    for line, kld in zip(lines, values, strict=True):
        style: Any = {"histtype": "stepfilled", "alpha": 0.75} if line is lines[-1] else {"histtype": "step"}
        axes.hist(kld, bins=bins, label=line.text, color=line.colour, linewidth=1.2, **style)
    axes.set(xscale="log", xlabel="KLD (nats)", ylabel="positions")
    _legend(axes)


def agreement(axes: Axes, lines: Sequence[Line]) -> None:
    """Top-1 agreement in sixteen consecutive sections of the text."""
    for line in lines:
        sections = np.array_split(line.run.top1, min(16, len(line.run.top1)))
        middle = np.cumsum([len(s) for s in sections]) - np.array([len(s) for s in sections]) / 2
        share = [100 * s.mean() for s in sections]
        axes.plot(middle, share, color=line.colour, marker="o", markersize=3.5, label=line.text)
    low = axes.get_ylim()[0]
    axes.set(xlabel="position", ylabel="top-1 agreement (%)", ylim=(min(low, 95.0), 100.4))
    _legend(axes)


def _whole_decades(axes: Axes) -> None:
    """Extend the y axis to powers of ten and label only these."""
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    labels = axes.get_legend_handles_labels()[1]
    columns = max(1, min(5, int(11 * axes.figure.bbox.width / axes.figure.dpi / (max(map(len, labels)) + 6))))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0, handlelength=1.4)


PLOTS: Mapping[str, tuple[tuple[float, float], Plot]] = {
    "by_position": ((10.4, 3.1), by_position),
    "by_layer": ((10.4, 3.1), by_layer),
    "kld": ((5.1, 3.1), kld_histogram),
    "agreement": ((5.1, 3.1), agreement),
}
