"""The report of one validation as JSON, Markdown (for a model card) and HTML.

Input: a `Report`. Output: report.json, report.md and report.html in a folder. The HTML file is self-contained.
The JSON's `schema` has a version number that changes when a field is removed or its meaning changes.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from kimi_gguf.convert.card.folder import PAGES, REPORT
from kimi_gguf.convert.card.text import plain
from kimi_gguf.engine.file_kind import kind_of
from kimi_gguf.engine.folder_lock import folder_lock
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.gates import DIVERGED, LIMITS, GateResult
from kimi_gguf.validate.llama import RunOptions
from kimi_gguf.validate.metrics import LayerError, Summary, first_diverging
from kimi_gguf.validate.sample_text import BUILT_IN
from kimi_gguf.validate.tensors import TensorProof

if TYPE_CHECKING:  # they import torch
    from kimi_gguf.validate.measure import Measured
    from kimi_gguf.validate.provenance import Facts

FILES = (*PAGES, REPORT)  # in the order in which they get their names
SCRATCH = ".report."  # in front of the name of the folder in which they are written
SCHEMA = "kimi-gguf/validation-report/1"
PRECISIONS = ("float32", "float64")  # of the reference, as torch names them; the first is the default
UPSTREAM = "upstream llama.cpp"  # the title of this rival
FACTS = ("gguf", "checkpoint", "ids", "engine", "machine", "reference")  # fields of Report
SUMMARIES = ("all", "judged", "same_experts", "other_experts")  # fields of Measured


@dataclass(frozen=True)
class Rival:
    """Another engine or file whose figures are shown for comparison."""

    title: str
    runs: list[Measured]
    failed: str  # the error if it could not run, else ""


@dataclass(frozen=True)
class Greedy:
    """Greedy agreement: how many of llama.cpp's generated tokens are also the reference's choice."""

    tokens: int
    same: int
    first_other: int | None  # index of the first token that differs
    gap: float | None  # there, in the reference: logit of its choice minus logit of llama.cpp's


@dataclass(frozen=True)
class Worst:
    """A position with a large KLD."""

    position: int
    context: str  # text up to and including the token at this position
    reference: str  # the reference's top-1 next token
    test: str
    kld: float
    nmse: float
    other_experts: bool
    margin: float  # the reference's smallest router margin at this position


@dataclass(frozen=True)
class Report:
    """All results for one GGUF file."""

    version: str  # of kimi-gguf
    created: str
    seconds: float
    gguf: Facts
    checkpoint: Facts
    ids: Facts
    engine: Facts
    machine: Facts
    reference: Facts
    options: RunOptions
    floor_ubatch: int
    runs: list[Measured]
    rivals: list[Rival]
    floor: Summary
    tensors: TensorProof
    greedy: Greedy
    worst: list[Worst]
    gates: list[GateResult]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def unchecked(self) -> list[str]:
        """What the gates do not cover, one sentence each."""
        kind, bounded = self.gguf["lowest_type"], len(self.tensors.bounded)
        said = []
        upstream = next((rival for rival in self.rivals if rival.title == UPSTREAM), None)
        if kind not in LIMITS:
            other = " except the error of upstream" if upstream is not None and upstream.runs else ""
            said.append(f"No limits of the logits exist for {kind}{other}.")
        if bounded:
            said.append(
                f"{bounded} tensors were checked only by their NMSE; `convert-kimi verify` compares the bytes of a "
                "file that convert-kimi made."
            )
        if upstream is not None and upstream.failed:
            said.append("Upstream llama.cpp could not run, so this file was not compared with it.")
        return said

    @property
    def headline(self) -> Measured:
        """The run whose figures are shown first and in the plots."""
        return self.runs[0]

    @property
    def columns(self) -> list[tuple[str, Measured]]:
        """Every run with the name of its file or engine."""
        rivals = [(rival.title, run) for rival in self.rivals for run in rival.runs]
        return [*(("this file", run) for run in self.runs), *rivals]

    @property
    def diverging(self) -> LayerError | None:
        """The first layer whose error is above the limit of the type in DIVERGED; None if there is no limit."""
        return first_diverging(self.headline.layers, DIVERGED.get(self.gguf["lowest_type"], math.inf))


def write(report: Report, folder: Path) -> Path:
    """Write the three files to `folder`, creating it if needed; return the path of the HTML file.

    While a report.json exists, the other two are of the same run, also after the process was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(zip(FILES, (to_markdown(report), to_html(report), to_json(report)), strict=True))
    with folder_lock(folder, wait=True):
        remove_scratch(folder)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
            for name, text in files.items():
                Path(scratch, name).write_text(text, encoding="utf-8")
            (folder / REPORT).unlink(missing_ok=True)  # only when all are written
            for name in files:
                Path(scratch, name).replace(folder / name)
    return folder / "report.html"


def remove_scratch(folder: Path) -> None:
    """Remove what a run that was killed left in the folder of a report."""
    for left in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)


def check_place(folder: Path) -> None:
    """Raise `ValidateError` if the three files cannot be written to `folder`; nothing is left there."""
    nearest = next(each for each in (folder, *folder.parents) if each.exists() or each == each.parent)
    if not nearest.is_dir():
        raise ValidateError(nearest, expected="a folder for the report", found=kind_of(nearest))
    for name in FILES:
        if (folder / name).is_dir():
            raise ValidateError(f"{folder / name}", expected="a report or nothing", found="a folder")
    try:
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=nearest):
            pass
    except OSError as error:
        raise ValidateError(f"{folder}: the report cannot be written there: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------------ JSON


def to_json(report: Report) -> str:
    """The report as JSON; NaN and infinity become null."""
    data = {
        "schema": SCHEMA,
        "passed": report.passed,
        "created": report.created,
        "version": report.version,
        "seconds": report.seconds,
        "direction": "KLD is KL(reference || test), natural logarithm",
        **{name: getattr(report, name) for name in FACTS},
        "options": asdict(report.options),
        "gates": [asdict(gate) for gate in report.gates],
        "runs": [_run_data(measured) for measured in report.runs],
        "rivals": [
            {"title": rival.title, "failed": rival.failed, "runs": [_run_data(run) for run in rival.runs]}
            for rival in report.rivals
        ],
        "noise_floor": {"n_ubatch": report.floor_ubatch, **asdict(report.floor)},
        "first_diverging_layer": report.diverging.layer if report.diverging else None,
        "unchecked": report.unchecked,
        "tensors": {**asdict(report.tensors), "proved": report.tensors.proved},
        "greedy": asdict(report.greedy),
        "worst": [asdict(worst) for worst in report.worst],
    }
    return json.dumps(_plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _run_data(measured: Measured) -> dict[str, Any]:
    at, choices = measured.at, measured.choices
    return {
        "variant": asdict(measured.variant),
        "system": measured.system,
        **{name: asdict(getattr(measured, name)) for name in SUMMARIES},
        "other_experts_share": measured.other_experts_share,
        "near_ties": int(choices.near_tie.sum()),
        "after_a_fallen_tie": int(choices.fallen.sum()),
        "watched_nmse": measured.watched_nmse,
        "layers": [asdict(layer) for layer in measured.layers],
        "per_position": {"nmse": at.nmse, "kld": at.kld, "top1": at.top1, "other_experts": choices.differs},
    }


def _plain(value: Any) -> Any:
    """Convert numpy values to Python's; NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


# ------------------------------------------------------------------------------------------ Markdown and HTML

# Rows of the tables of figures: (field of Summary, title, format, explanation).
FIGURES = (
    ("nmse", "NMSE", "error", "squared error of the logits / squared norm of the reference's"),
    ("nmse_median", "Median NMSE", "error", ""),
    ("nmse_worst", "Worst NMSE", "error", ""),
    ("kld_mean", "Mean KLD", "error", "KL(reference || test) in nats"),
    ("kld_median", "Median KLD", "error", ""),
    ("kld_p99", "99 % KLD", "error", ""),
    ("kld_p999", "99.9 % KLD", "error", ""),
    ("kld_max", "Maximum KLD", "error", ""),
    ("rms_dp", "RMS Δp", "error", "difference in the probability of the text's next token"),
    ("top1", "Top-1 agreement", "share", "positions with the same most likely token"),
    ("top5", "Top-5 agreement", "share", "overlap of the five most likely tokens"),
    ("ppl_reference", "Perplexity, reference", "plain", ""),
    ("ppl_test", "Perplexity, test", "plain", "often close to the reference's even for a broken model"),
)
# The tables: (field of Measured, title).
SUBSETS = (
    ("all", "All positions"),
    ("same_experts", "Positions without an expert mismatch"),
    ("other_experts", "Positions with an expert mismatch in at least one layer"),
)


NO_NOISE = "The noise floor is 0: with another ubatch size, the logits are exactly the same."


def error_text(value: float | None) -> str:
    """A number with two significant digits: 4.1e-13, 0.013, 0."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def share_text(value: float | None) -> str:
    """A percentage that is 100 % only if the share is exactly 1."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 1:
        return "100 %"
    return f"{min(100 * value, 99.99):.2f} %"


def plain_text(value: float | None) -> str:
    """A number with five significant digits."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.5g}"


FORMATS = {"error": error_text, "share": share_text, "plain": plain_text}


def limit_text(gate: GateResult) -> str:
    """`at most 1e-10`."""
    return f"at {'least' if gate.at_least else 'most'} {number_text(gate.limit)}"


def number_text(value: float) -> str:
    """A count or ratio with four significant digits, a small error with two."""
    return f"{value:.4g}" if value == 0 or abs(value) >= 0.01 else error_text(value)


def bytes_text(count: int) -> str:
    """1234567 -> 1.23 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def perplexity_text(sources: Collection[str]) -> str:
    """What the size of a perplexity means, for tokens from `sources` (names as in reports)."""
    such = ", such as the built-in text for the demo" if BUILT_IN in sources else ""
    return (
        "Perplexity depends on the text as much as on the model: it is high for text of another kind than the model "
        f"was trained on{such}. Only its difference from the reference's matters."
    )


def source_text(ids: Facts) -> str:
    """Where the tokens come from: "book.txt", or "512 of book.txt and 32 generated by llama.cpp"."""
    source, generated = str(ids["source"]), ids["generated"]
    if not generated:
        return source
    return f"{ids['count'] - generated} of {source} and {generated} generated by llama.cpp"


def counted(count: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def to_markdown(report: Report) -> str:
    """The short form, for a model card."""
    return _environment().get_template("report.md.j2").render(_context(report))


def to_html(report: Report) -> str:
    """The full report as one self-contained page."""
    from kimi_gguf.validate import plots  # imported here because matplotlib takes a second to load

    css = resources.files("kimi_gguf.validate").joinpath("report.css").read_text(encoding="utf-8")
    template = _environment().get_template("report.html.j2")
    return template.render(_context(report), css=css, plots=plots.draw(report))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kimi_gguf.validate", ""),
        autoescape=lambda name: name is not None and ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(FORMATS, number=number_text, bytes=bytes_text, text=plain, counted=counted)
    return environment


def _context(report: Report) -> dict[str, Any]:
    return {
        "report": report,
        "headline": report.headline,
        "columns": report.columns,
        "figures": FIGURES,
        "formats": FORMATS,
        "subsets": SUBSETS,
        "perplexity": perplexity_text([report.ids["source"]]),
        "source": source_text(report.ids),
        "no_noise": NO_NOISE if report.floor.nmse == 0 else "",
        "limit_text": limit_text,
        "schema": SCHEMA,
    }
