"""The model card of a folder: front matter for Hugging Face, and how its files were made and how to run them.

Input: the models, and what is known about each: keys, files, command, main figures of its report. Output: Markdown.
Strings from the checkpoint, the files and the reports are quoted or escaped: Markdown and YAML read them as text.
`validate-kimi card` writes another card from the same parts, with all figures and plots (validate/card.py).
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Final

import numpy as np

from kimi_gguf.convert.model.families import BY_ARCHITECTURE
from kimi_gguf.convert.model.family import Family
from kimi_gguf.convert.model.metadata import ADAPTER
from kimi_gguf.convert.model.tensor_table import PlannedTensor, Transform
from kimi_gguf.convert.plan import type_counts
from kimi_gguf.convert.source.origin import CARD, LICENCE
from kimi_gguf.engine.gguf import GgufTensor
from kimi_gguf.engine.split_names import place_in_set

# The main differences from files made by llama.cpp's converter; docs/conversion.md has the whole table.
DIFFERENCES: Final = (
    "`attention.value_length` is the width of the latent, {value_length}, so that the cache can be quantized; "
    "llama.cpp's converter writes `head_dim`.",
    "`eos_token_id` is the token that ends the model's answers ({eos}), as in its config, not the tokenizer's "
    "{tokenizer_eos}; `add_bos_token` is false and `eot_token_id` is written.",
    "`ssm_a` = {ssm_a} is computed in double precision and rounded once.",
    "Added tokens that are not special in the tokenizer, such as the tool call markers, are user-defined tokens, "
    "not control tokens: they are shown in the output.",
    "Keys of expert groups are written only if the router excludes groups.",
    "Tensor names, shapes and types are those of llama.cpp, so that upstream builds load the file.",
)

_OPTIONS_OF_VERIFY: Final = (
    "--imatrix",
    "--chat-template",
    "--adapter",
)  # of convert-kimi, which verify needs, too
_FENCE: Final = re.compile("`{3,}sh")
_MADE: Final = re.compile(
    r"<!-- SHA-256: ([0-9a-f]{64}(?: [0-9a-f]{64})*) -->\nMade by kimi-gguf ([\w.+]+):\n"
)
# What Markdown may read as syntax: anywhere, in front of an address, and where a list may begin.
_SYNTAX: Final = re.compile(r"[#$&*<=>@[\\\]^_`{|}~]|:(?=//)|(?i:(?<=www)\.)|^[-+]|^[0-9]+[.)](?= |$)")
# Not by backslashes: cells and formulas are looked for before Markdown is read, mail addresses after it.
_REFERENCES: Final = {"|": "&#124;", "\\": "&#92;", "$": "&#36;", "@": "&#64;\u2060"}  # U+2060 has no width
_WRITTEN: Final = re.compile(r"(&#(?:124|92|36);|&#64;\u2060)|\\([!-/:-@[-`{-~])")
_MOST_COMMAND: Final = 1 << 15  # characters of the longest command that is read; shlex takes quadratic time
FILE_TITLES: Final = ("file", "bytes", "tensors", "types", "SHA-256")
INSTALLING: Final = """\
## How to install kimi-gguf

The wheel contains the patched llama.cpp for all x86-64 CPUs. It needs Linux with glibc 2.34 or later, and Python 3.11
or later:

```sh
python -m pip install kimi_gguf-*.whl
```

`tools/release dist` in a checkout of kimi-gguf makes the wheel in `dist`; `docs/release.md` there describes other
systems."""
MOST_ADAPTERS: Final = 64  # that a card names
REPORTS: Final = "validation"  # the folder of the reports and plots, next to the files
RECOMMENDED: Final = (
    "Recommended: no file here that is as small has a mean KLD as low. Take the largest recommended file that leaves "
    "memory for the context."
)
INCOMPARABLE: Final = (
    "The reports are not of the same tokens, checkpoint, precision, cache type and schema, so their KLDs cannot be "
    "compared."
)


def stem_of(path: Path) -> str:
    """The name of a model without `.gguf` and without the number of the split."""
    place = place_in_set(path)
    return path.name.removesuffix(".gguf").removesuffix(f"-00001-of-{len(place[1]):05d}" if place else "")


@dataclass(frozen=True)
class Made:
    """How a model was made: the version of kimi-gguf, the command, and its notes about this model."""

    version: str
    command: tuple[str, ...]  # convert-kimi SOURCE -o NAME ...
    files: tuple[str, ...]  # SHA-256 of each file that the command made
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """As cards show it; the hashes are in a comment. `made_in` reads it."""
        notes = "\n" + "".join(f"\n- {plain(note)}" for note in self.notes) if self.notes else ""
        head = f"<!-- SHA-256: {' '.join(self.files)} -->\nMade by kimi-gguf {self.version}:"
        return f"{head}\n\n{code(shlex.join(self.command))}{notes}"

    def named(self, output: str) -> Made:
        """The same command with another output, which does not change the bytes."""
        return replace(self, command=(*self.command[:3], output, *self.command[4:]))

    def check(self, name: str) -> str:
        """The command that compares the file `name` (of a split model, the first split) with a new conversion."""
        words = ["convert-kimi", "verify", name, "--checkpoint", self.command[1]]
        for option, value in pairwise(self.command):
            if option in _OPTIONS_OF_VERIFY:
                words += [option, value]
        return shlex.join(words)


@dataclass(frozen=True)
class Basis:
    """What reports have in common if their figures can be compared."""

    schema: str
    ids_sha256: str  # of the tokens
    precision: str  # of the reference
    cache_type: str
    checkpoint_sha256: tuple[str, ...]  # config first, then the weights


@dataclass(frozen=True)
class Figures:
    """The main figures of a report."""

    kld: float  # mean KLD, in nats
    passed: bool  # all gates
    basis: Basis


@dataclass(frozen=True)
class Listed:
    """A model that a card lists."""

    path: Path  # the file; of a split model, the first split
    keys: Mapping[str, object]
    parts: Sequence[tuple[str, ...]] = ()  # of each split, the cells under FILE_TITLES
    made: Made | None = None  # how convert-kimi made it, if that is known
    nbytes: int = 0  # of all splits
    figures: Figures | None = None  # None: not validated


def made_in(card: str) -> Iterator[Made]:
    """What a card says about how its files were made. The card may be any text; each line is read once."""
    lines = card.split("\n")
    numbers = iter(range(len(lines)))
    for start in numbers:
        if not _FENCE.fullmatch(lines[start]):
            continue
        end = next((i for i in numbers if lines[i] == lines[start].removesuffix("sh")), len(lines))
        head = _MADE.fullmatch("\n".join(lines[max(start - 3, 0) : start]))
        command = _command_in("\n".join(lines[start + 1 : end])) if head else None
        if head and command and end < len(lines):
            after = (lines[i] for i in range(end + 2, len(lines)))
            notes = [
                _read_plain(line.removeprefix("- "))
                for line in takewhile(lambda line: line.startswith("- "), after)
            ]
            yield Made(head[2], command, tuple(head[1].split()), tuple(notes))


def _command_in(text: str) -> tuple[str, ...] | None:
    """The words of a command of convert-kimi; None for other texts."""
    try:
        words = tuple(shlex.split(text)) if len(text) <= _MOST_COMMAND else ()
    except ValueError:  # an open quote
        return None
    known = len(words) > 3 and (words[0], words[2]) == ("convert-kimi", "-o")
    return words if known and words[-1] not in _OPTIONS_OF_VERIFY else None  # whose values would be missing


def card_text(new: Listed, others: Sequence[Listed], notes: Sequence[str]) -> str:
    """The card of a new model, and of others that were made from the same checkpoint. `notes`: what a user should know
    about all of them."""
    ordered = sorted([new, *others], key=lambda model: model.nbytes)
    facts, known = new.keys, [(model, model.made) for model in ordered if model.made]
    good = recommended([(model.nbytes, model.figures) for model in ordered])
    best = [model for model, best in zip(ordered, good, strict=True) if best and _same_weights(new, ordered)]
    shown = best[0] if best else new
    sections = (
        front_matter(facts),
        f"# {plain(str(facts['general.name']))}, GGUF files for llama.cpp",
        table(("", ""), origin_rows(facts, new.made.command[1] if new.made else None)),
        "## Files\n\n" + "\n\n".join([*_figures(new, ordered, best), making(ordered)]),
        INSTALLING,
        "## How to run it\n\n" + running(shown.path.name, len(shown.parts), notes),
        "## How to check it\n\n" + checking([made.check(model.path.name) for model, made in known]),
        "## Differences from files made by llama.cpp's converter\n\n" + "\n".join(differences(facts)),
        *(["## Notes\n\n" + "\n".join(f"- {plain(note)}" for note in notes)] if notes else []),
    )
    return "\n\n".join(sections) + "\n"


def recommended(models: Sequence[tuple[int, Figures | None]]) -> list[bool]:
    """Of each model, given as (bytes, figures or None): whether it passed, and no other one that passed and is as small
    has a KLD as low. None is recommended if the figures cannot be compared."""
    points = [
        (nbytes, figures.kld)
        if figures and figures.passed and math.isfinite(figures.kld) and figures.kld >= 0
        else None
        for nbytes, figures in models
    ]
    return [
        comparable([figures for _, figures in models])
        and point is not None
        and not any(
            other is not None and other != point and other[0] <= point[0] and other[1] <= point[1]
            for other in points
        )
        for point in points
    ]


def comparable(figures: Iterable[Figures | None]) -> bool:
    return len({each.basis for each in figures if each}) <= 1


def _same_weights(new: Listed, models: Sequence[Listed]) -> bool:
    """Whether the new model is known to have the weights of those with a report: it has a report, too (and the reports
    can be compared), or the keys of all name one commit. Equal hashes of config and headers do not prove it."""
    commits = {source_of(model.keys) for model in (new, *models) if model is new or model.figures}
    return new.figures is not None or (len(commits) == 1 and "kimi_gguf.source.commit" in new.keys)


def _figures(new: Listed, models: Sequence[Listed], best: Sequence[Listed]) -> Iterator[str]:
    """A table with the figures of the reports, and its legend; nothing if no model has a report."""
    if not any(model.figures for model in models):
        return
    rows = []
    for model in models:
        name, kld, verdict = f"`{code_text(model.path.name)}`", "", "not validated"
        if model.figures:
            link = target(f"{REPORTS}/{stem_of(model.path)}/report.html")
            kld = f"{model.figures.kld:.2g}"
            verdict = f"[{'pass' if model.figures.passed else '**FAIL**'}](<{link}>)"
        rows.append((name, kld, verdict, "yes" if model in best else ""))
    yield table(("model", "mean KLD", "gates", "recommended"), rows)
    legend = "KLD is KL(reference || file) in nats, from the reports of `validate-kimi`."
    if not comparable(model.figures for model in models):
        legend += f" {INCOMPARABLE}"
    elif not _same_weights(new, models):
        legend += (
            f" None is recommended, because nothing proves that `{code_text(new.path.name)}` has the same weights: it "
            "has no report, and the keys of the files do not name one commit."
        )
    yield legend + (f" {RECOMMENDED}" if best else "")


def origin_rows(facts: Mapping[str, object], name: str | None) -> Iterator[tuple[str, str]]:
    """Rows about the source, which is called `name` if it has no id on the hub; what is unknown has no row."""
    base, licence, size = base_of(facts), facts.get(LICENCE), facts.get("general.size_label")
    if source := source_of(facts) or name:
        yield "source", f"`{code_text(source)}`"
    for title, key in (("`config.json`", "config_sha256"), ("shards' headers", "headers_sha256")):
        if value := facts.get(f"kimi_gguf.source.{key}"):
            yield f"SHA-256 of its {title}", f"`{code_text(str(value))}`"
    for adapter, scale, sha256 in merged_adapters(facts):
        yield "merged adapter", f"`{code_text(adapter)}`, scale {scale:g}, SHA-256 `{code_text(sha256)}`"
    if base:
        yield "base model", f"`{code_text(base)}`"
    if licence:
        yield "licence", plain(str(licence))
    if size:
        yield "parameters, all and active", plain(str(size))


def merged_adapters(facts: Mapping[str, object]) -> Iterator[tuple[str, float, str]]:
    """Name, scale in float32, and SHA-256 of each adapter that was merged into a model's weights. Keys of another type
    are left out."""
    for i in range(MOST_ADAPTERS):
        name, sha256, scale = (facts.get(f"{ADAPTER}.{i}.{key}") for key in ("name", "sha256", "scale"))
        if isinstance(name, str) and isinstance(sha256, str) and isinstance(scale, float):
            yield name, float(np.float32(scale)), sha256


def making(models: Sequence[Listed]) -> str:
    """Every file with its bytes, tensors and hash, and the commands that are known."""
    matrices = [_importance_matrix(model.keys) for model in models]
    titles = (*FILE_TITLES, "importance matrix") if any(matrices) else FILE_TITLES
    rows = [
        (*part, matrix)[: len(titles)]
        for model, matrix in zip(models, matrices, strict=True)
        for part in model.parts
    ]
    return "\n\n".join([table(titles, rows), *(model.made.text() for model in models if model.made)])


def _importance_matrix(facts: Mapping[str, object]) -> str:
    """Its file and its data set; empty if the types were chosen without one."""
    name, dataset = (Path(str(facts.get(f"quantize.imatrix.{key}", ""))).name for key in ("file", "dataset"))
    made = f", made with {plain(dataset)}" if dataset else ""
    return f"`{code_text(name)}`{made}" if name else ""


def base_of(facts: Mapping[str, object]) -> str | None:
    """ORG/NAME of the base model, if it is known."""
    owner, name = (facts.get(f"general.base_model.0.{part}") for part in ("organization", "name"))
    return f"{owner}/{name}" if owner and name else None


def front_matter(facts: Mapping[str, object]) -> str:
    """Keys that Hugging Face reads, from the keys of a GGUF file; unknown ones are left out."""
    texts = (
        ("base_model", base_of(facts)),
        ("base_model_relation", "quantized" if base_of(facts) else None),
        ("license", facts.get(LICENCE)),
        ("license_name", facts.get(f"{LICENCE}.name")),
        ("license_link", facts.get(f"{LICENCE}.link")),
        ("library_name", "gguf"),
        ("pipeline_tag", "text-generation"),
        ("quantized_by", facts.get("general.quantized_by")),
    )
    lines = [f"{key}: {yaml_text(str(text))}" for key, text in texts if text]
    return "\n".join(
        ["---", *lines, "tags:", "- gguf", "- llama.cpp", f"- {facts['general.architecture']}", "---"]
    )


def yaml_text(text: str) -> str:
    """A text in double quotes, as YAML has them: JSON's, but only characters that are not printable are escaped
    above U+007F. (JSON would write a character above U+FFFF as two halves.)"""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in quoted)


def licence_note(facts: Mapping[str, object], card: Path, checkpoint: str | Path) -> str:
    """What to add to the card and to that of the checkpoint, a folder or a hub id, if they have no licence; else
    empty."""
    if LICENCE in facts:
        return ""
    origin = Path(checkpoint) / CARD
    return (
        f"{card}: has no `license:`, because {origin} names none; before you publish it, add a line such as "
        f"`license: mit` to the front matter (between the two lines --- at the top) of {card} "
        f"and, for the next cards, of {origin}"
    )


def file_row(
    name: str, nbytes: int, tensors: Collection[PlannedTensor | GgufTensor], sha256: str
) -> tuple[str, ...]:
    """The cells of a file, under `FILE_TITLES`."""
    return f"`{code_text(name)}`", f"{nbytes:,}", str(len(tensors)), type_counts(tensors), f"`{sha256}`"


def checking(commands: Sequence[str]) -> str:
    """What the commands of `Made.check` do."""
    which = "This command converts" if len(commands) == 1 else "These commands convert"
    return f"{which} the checkpoint again and compare{'s' * (len(commands) == 1)} all bytes:\n\n" + code(
        "\n".join(commands)
    )


def running(name: str, splits: int, notes: Iterable[str]) -> str:
    """Commands for patched llama.cpp and, if no note says that it cannot run the model, for upstream llama.cpp."""
    ours = code(shlex.join(["kimi-llama", "chat", name]))
    loads = "llama.cpp loads the other splits automatically.\n\n" if splits > 1 else ""
    refused = [note for note in notes if "upstream llama.cpp" in note]
    if refused:
        return f"{loads}{ours}\n\nUpstream llama.cpp cannot run this file: {plain(refused[0])}."
    theirs = code(shlex.join(["llama-cli", "-m", name]))
    return (
        f"{loads}With the patched llama.cpp of kimi-gguf:\n\n{ours}\n\nWith upstream llama.cpp:\n\n{theirs}"
    )


def differences(facts: Mapping[str, object]) -> Iterator[str]:
    tokens, eos = facts.get("tokenizer.ggml.tokens"), facts.get("tokenizer.ggml.eos_token_id")
    text = tokens[eos] if isinstance(tokens, list) and isinstance(eos, int) else "none"
    architecture = str(facts["general.architecture"])
    family = BY_ARCHITECTURE[architecture]
    for difference in DIFFERENCES:
        yield "- " + difference.format(
            value_length=facts.get(f"{architecture}.attention.value_length"),
            eos=f"`{code_text(str(text))}`",
            tokenizer_eos=family.tokenizer_eos,
            ssm_a="exp(A_log)" if _has_positive_gates(family) else "-exp(A_log)",
        )


def _has_positive_gates(family: Family) -> bool:
    """Whether the family stores exp(A_log) as it is."""
    return any(row.transform is Transform.EXP for group in family.table.layers for row in group.rows)


def source_of(facts: Mapping[str, object]) -> str | None:
    """The checkpoint's id on Hugging Face, with the commit if it is known; None if the id is unknown."""
    repository = facts.get("general.source.huggingface.repository")
    commit = facts.get("kimi_gguf.source.commit")
    return f"{repository}@{commit}" if repository and commit else str(repository) if repository else None


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(map(table_line, [titles, ["---"] * len(titles), *rows]))


def table_line(cells: Iterable[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def target(path: str) -> str:
    """A path for a link in angle brackets: what ends it is percent-encoded."""
    return "".join(c if c.isprintable() and c not in "<>\\%|" else "".join(f"%{b:02X}" for b in c.encode())
                   for c in path)  # fmt: skip


def code(text: str) -> str:
    """A code block with a fence longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def code_text(text: str) -> str:
    """Text for a code span: backticks and line breaks become spaces."""
    return "".join(c if c.isprintable() and c != "`" else " " for c in text)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, without links and formulas. `_read_plain` reads it."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    words = " ".join(printable.split())  # indented text would be code
    return _SYNTAX.sub(lambda found: _REFERENCES.get(found[0], f"{found[0][:-1]}\\{found[0][-1]}"), words)


def _read_plain(written: str) -> str:
    """The text that `plain` wrote. `written` may be any text: what is no escape of `plain` is itself."""
    characters = {reference: character for character, reference in _REFERENCES.items()}
    return _WRITTEN.sub(lambda found: found[2] or characters[found[1]], written)
