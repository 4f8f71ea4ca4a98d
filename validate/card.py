"""The model card of a folder of GGUF files: every file with its report, in one table and in plots.

Input: the files with their reports and keys. Output: README.md and the plots that it shows. Strings from the files,
their names and their reports are quoted or escaped: Markdown and HTML show them as text.
"""

from __future__ import annotations

import shlex
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes

from kimi_gguf.convert.card.text import (
    INCOMPARABLE,
    INSTALLING,
    RECOMMENDED,
    REPORTS,
    Listed,
    checking,
    code,
    code_text,
    comparable,
    differences,
    front_matter,
    making,
    origin_rows,
    plain,
    running,
    stem_of,
    table,
    target,
)
from kimi_gguf.convert.card.text import recommended as recommended_models
from kimi_gguf.engine.build_spec import CPU_BACKENDS
from kimi_gguf.engine.gguf_check import all_splits
from kimi_gguf.validate.llama import RunOptions
from kimi_gguf.validate.metrics import Summary
from kimi_gguf.validate.plots import PLOTS, Line, images
from kimi_gguf.validate.report import (
    NO_NOISE,
    PRECISIONS,
    bytes_text,
    error_text,
    perplexity_text,
    plain_text,
    share_text,
)
from kimi_gguf.validate.stored import Stored

COLOURS: Final = ("#1f5fa8", "#c2762b", "#1c7a46", "#7b4aa0", "#b3261e", "#3c8f8a", "#8a6d1f", "#5b6875")
SIZE_PLOT: Final = "kld_by_size"
INSTALLING_VALIDATE: Final = """

`validate-kimi` also needs the extra `validate`:

```sh
python -m pip install "$(echo kimi_gguf-*.whl)[validate]"
```"""
CAPTIONS: Final = {
    SIZE_PLOT: "Mean KLD by size of the file",
    "by_position": "NMSE of the logits at each position",
    "by_layer": "NMSE of each layer's output",
    "kld": "Number of positions by KLD",
    "agreement": "Top-1 agreement in consecutive sections of the text",
}


@dataclass(frozen=True, kw_only=True)
class CardFile(Listed):
    """A GGUF model with its report."""

    elements: Mapping[str, int]  # type -> elements
    report: Stored
    source: tuple[str, ...] = ()  # the option that gives the tokens, and its file; empty: the built-in text

    @property
    def kld(self) -> float:
        return self.report.headline.all.kld_mean


def recommended(files: Sequence[CardFile]) -> list[CardFile]:
    """The files that passed, and of which no smaller or equally large file that passed has a KLD as low."""
    best = recommended_models([(file.report.bytes, file.report.figures) for file in files])
    return [file for file, good in zip(files, best, strict=True) if good]


def draw_plots(files: Sequence[CardFile]) -> dict[str, bytes]:
    """The plots of all files; name -> PNG."""
    ordered = sorted(files, key=lambda file: -file.kld)  # the best is last, so that it is drawn on top
    lines = [
        Line(stem_of(file.path), COLOURS[i % len(COLOURS)], file.report.headline.curves)
        for i, file in enumerate(ordered)
    ]

    unit, unit_name = (1e9, "GB") if max(file.report.bytes for file in files) >= 1e8 else (1e6, "MB")

    def by_size(axes: Axes, lines: Sequence[Line]) -> None:
        for file, line in zip(ordered, lines, strict=True):
            size = file.report.bytes / unit
            axes.plot(size, max(file.kld, 1e-16), "o", color=line.colour)
            axes.annotate(line.text, (size, max(file.kld, 1e-16)), xytext=(4, 4), textcoords="offset points")
        axes.set(yscale="log", xlabel=unit_name, ylabel="mean KLD (nats)")
        axes.margins(x=0.25, y=0.15)

    plots = {SIZE_PLOT: ((10.4, 3.1), by_size), **PLOTS} if len(files) > 1 else PLOTS
    return images(lines, plots, "png")


def facts_of(files: Sequence[CardFile]) -> Mapping[str, object]:
    """The keys of all files: of each, the value of the smallest file that has it. None has another licence
    (`card_files.check_licences`)."""
    return ChainMap(*(dict(file.keys) for file in sorted(files, key=lambda file: file.report.bytes)))


def card_text(files: Sequence[CardFile], plots: Sequence[str], notes: Sequence[str]) -> str:
    """The card of the files. `notes`: what a user should know about every file of this model."""
    ordered = sorted(files, key=lambda file: file.report.bytes)
    facts, report = facts_of(ordered), ordered[0].report
    best = recommended(ordered)
    shown = best[0] if best else ordered[0]
    sections = (
        front_matter(facts),
        f"# {plain(str(facts.get('general.name') or report.checkpoint))}, GGUF files for llama.cpp",
        table(
            ("", ""), [*origin_rows(facts, report.checkpoint), ("validated with", _validated_with(ordered))]
        ),
        "## Files\n\n"
        + table(TITLES, [_row(file, best) for file in ordered])
        + "\n\n"
        + _legend(ordered, best),
        "## Plots\n\n" + "\n\n".join(f"![{CAPTIONS[name]}]({REPORTS}/{name}.png)" for name in plots),
        INSTALLING + INSTALLING_VALIDATE,
        "## How to run it\n\n" + running(shown.path.name, len(all_splits(shown.path)), notes),
        "## How it was made\n\n" + making(ordered),
        "## How it was checked\n\n" + _checks(ordered),
        *_differences(ordered),
        *(["## Notes\n\n" + "\n".join(f"- {plain(note)}" for note in notes)] if notes else []),
    )
    return "\n\n".join(sections) + "\n"


TITLES: Final = (
    "file", "size", "weights", "mean KLD", "99 % KLD", "top-1", "NMSE", "perplexity", "gates", "recommended"
)  # fmt: skip


def _row(file: CardFile, best: Sequence[CardFile]) -> tuple[str, ...]:
    report, figures = file.report, file.report.headline.all
    link = target(f"{REPORTS}/{stem_of(file.path)}/report.html")
    verdict = f"{'pass' if report.passed else '**FAIL**'}, {sum(report.gates)} of {len(report.gates)}"
    return (
        f"`{code_text(file.path.name)}`",
        bytes_text(report.bytes),
        _weights(file),
        error_text(figures.kld_mean),
        error_text(figures.kld_p99),
        share_text(figures.top1),
        error_text(figures.nmse),
        plain_text(figures.ppl_test),
        f"[{verdict}](<{link}>)",
        "yes" if file in best else "",
    )


def _weights(file: CardFile) -> str:
    """Such as "Q4_K 81 %, Q8_0 19 %", and the bits per weight."""
    total = sum(file.elements.values())
    shares = sorted(file.elements.items(), key=lambda item: -item[1])
    named = ", ".join(
        f"{kind} {100 * count / total:.0f} %" for kind, count in shares if count >= 0.005 * total
    )
    return f"{named}; {8 * file.report.bytes / total:.2f} bits per weight"


def _legend(files: Sequence[CardFile], best: Sequence[CardFile]) -> str:
    report = files[0].report
    text = (
        f"KLD is KL(reference || file) in nats, over {report.tokens} tokens ({plain(report.source)}). "
        f"{_noise([file.report.floor for file in files])} The reference has perplexity "
        f"{plain_text(report.headline.all.ppl_reference)}; perplexity hides many faults. "
        f"{perplexity_text([report.source])}"
    )
    if not comparable(file.report.figures for file in files):
        text += f" {INCOMPARABLE}"
    if best:
        text += f" {RECOMMENDED}"
    return text


def _noise(floors: Sequence[Summary]) -> str:
    """What rounding alone causes. A mean KLD that is itself only rounding, around 0, is not shown."""
    nmse, kld = (max(getattr(floor, name) for floor in floors) for name in ("nmse", "kld_mean"))
    if nmse == 0:
        return NO_NOISE
    figures = [f"an NMSE of at most {error_text(nmse)}"]
    figures += [f"a mean KLD of at most {error_text(kld)}"] if kld > 0 else []
    return f"Rounding alone causes {' and '.join(figures)} (the same file with another ubatch size)."


def _validated_with(files: Sequence[CardFile]) -> str:
    """What made the reports; if they are of several builds, with the files of each."""
    names: dict[str, list[str]] = {}
    for file in files:
        names.setdefault(plain(file.report.engine), []).append(f"`{code_text(file.path.name)}`")
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{', '.join(of)}: {engine}" for engine, of in names.items())


def _differences(files: Sequence[CardFile]) -> Iterator[str]:
    """The section about the files of convert-kimi; names them if there are others."""
    ours = [file for file in files if "kimi_gguf.source.config_sha256" in file.keys]
    if not ours:
        return
    lines = ["## Differences from files made by llama.cpp's converter\n"]
    if len(ours) < len(files):
        lines.append(f"Of {', '.join(f'`{code_text(file.path.name)}`' for file in ours)}:\n")
    yield "\n".join((*lines, *differences(ours[0].keys)))


def _checks(files: Sequence[CardFile]) -> str:
    basis = files[0].report.basis
    lines = [
        "`validate-kimi` compared all tensors with the checkpoint, and llama.cpp's logits with a "
        f"{plain(basis.precision)} PyTorch reference at every position (cache {plain(basis.cache_type)}). The gates "
        "are limits for the type of the file. Each report has the limits, the figures, and the hashes of all inputs."
    ]
    unchecked = [
        f"- `{code_text(file.path.name)}`: {' '.join(plain(' '.join(file.report.unchecked)).split())}"
        for file in files
        if file.report.unchecked
    ]
    lines += ["What the gates do not cover:", "\n".join(unchecked)] if unchecked else []
    sources = "".join(
        f", and `{code_text(source[1])}` the file with the {'text' if source[0] == '--text' else 'token ids'}"
        for source in dict.fromkeys(file.source for file in files)
        if source
    )
    lines.append(
        f"These commands measure the figures of the table again; CHECKPOINT is the checkpoint's folder{sources}:"
    )
    lines.append(code("\n".join(shlex.join(_again(file)) for file in files)))
    if again := [file.made.check(file.path.name) for file in files if file.made]:
        lines.append(checking(again))
    return "\n\n".join(lines)


def _again(file: CardFile) -> Iterator[str]:
    """The words of the command that measures the file's figures again: its options are those of the report."""
    report, usual = file.report, RunOptions()
    yield from ("validate-kimi", file.path.name, "--checkpoint", "CHECKPOINT", *file.source)
    if "--ids" not in file.source:
        yield from ("--tokens", str(report.tokens - report.generated))
    yield from ("--generate", str(report.generated))
    if report.backend not in CPU_BACKENDS:
        yield from ("--build", report.backend, "--gpu-layers", str(report.options.n_gpu_layers))
    for option, found, default in (
        ("--batch", report.options.n_batch, usual.n_batch),
        ("--ubatch", report.options.n_ubatch, usual.n_ubatch),
        ("--cache-type", report.options.cache_type, usual.cache_type),
        ("--precision", report.basis.precision, PRECISIONS[0]),
    ):
        if found != default:
            yield from (option, str(found))
    if report.upstream:
        yield "--upstream"
    yield from ("--out", f"report-{stem_of(file.path)}")
