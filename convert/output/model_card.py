"""The model card of an output: front matter for Hugging Face, and how the file was made and how to run it.

Input: the plan, the file names, the command. Output: Markdown. All facts come from the plan's keys and tensors.
Strings from the checkpoint are quoted, or stripped of Markdown and YAML syntax.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kimi_gguf.convert.model.families import BY_ARCHITECTURE
from kimi_gguf.convert.model.tensor_table import PlannedTensor, Transform
from kimi_gguf.convert.output.files import PlannedFile
from kimi_gguf.convert.plan import Plan, type_counts
from kimi_gguf.engine.gguf import GgufTensor
from kimi_gguf.engine.version import VERSION

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

_OPTIONS_OF_VERIFY: Final = ("--imatrix", "--chat-template")  # of convert-kimi, which verify needs, too
_TOKENIZER_EOS: Final = {"kimi-linear": "`[EOS]`"}
FILE_TITLES: Final = ("file", "bytes", "tensors", "types")


@dataclass(frozen=True)
class Made:
    """How a file was made: the version of kimi-gguf, and the command."""

    version: str
    command: tuple[str, ...]  # convert-kimi SOURCE -o NAME ...

    @property
    def output(self) -> str:
        return self.command[3]

    def text(self) -> str:
        """As cards show it; `made_in` reads it."""
        return f"Made by kimi-gguf {self.version}:\n\n{code(shlex.join(self.command))}"

    def check(self, name: str) -> str:
        """The command that compares the file `name` (of a split model, the first split) with a new conversion."""
        words = ["convert-kimi", "verify", name, "--checkpoint", self.command[1]]
        for option in _OPTIONS_OF_VERIFY:
            if option in self.command:
                words += [option, self.command[self.command.index(option) + 1]]
        return shlex.join(words)


def made_in(card: str) -> Iterator[Made]:
    """What a card says about how its files were made. The card may be any text."""
    pattern = r"^Made by kimi-gguf ([\w.+]+):\n\n(`{3,})sh\n(.*?)\n\2$"
    for version, _, text in re.findall(pattern, card, re.MULTILINE | re.DOTALL):
        try:
            command = tuple(shlex.split(text))
        except ValueError:  # an open quote
            continue
        if (
            len(command) > 3
            and (command[0], command[2]) == ("convert-kimi", "-o")
            and command[-1] not in _OPTIONS_OF_VERIFY  # their values are missing
        ):
            yield Made(version, command)


def card_text(plan: Plan, paths: Sequence[Path], command: Sequence[str]) -> str:
    """The card of `plan`, written to `paths` by `command`. The command's paths should have no folders."""
    facts = {key.name: key.value for key in plan.keys}
    name = plain(str(facts["general.name"]))
    source = source_of(facts) or command[1]
    made = Made(VERSION, (command[0], source, *command[2:]))
    sections = (
        front_matter(facts),
        f"# {name}, {_type(plan)} for llama.cpp",
        table(("", ""), [(title, text) for title, text in _made_of(plan, facts, source) if text]),
        made.text(),
        "## Files\n\n" + table(FILE_TITLES, _files(paths, plan.files)),
        "## How to run it\n\n" + running(paths[0].name, len(plan.files), plan.notes),
        "## How to check it\n\n"
        "This command converts the checkpoint again and compares all bytes:\n\n"
        + code(made.check(paths[0].name)),
        "## Differences from files made by llama.cpp's converter\n\n" + "\n".join(differences(facts)),
        *(["## Notes\n\n" + "\n".join(f"- {plain(note)}" for note in plan.notes)] if plan.notes else []),
    )
    return "\n\n".join(sections) + "\n"


def base_of(facts: Mapping[str, object]) -> str | None:
    """ORG/NAME of the base model, if it is known."""
    owner, name = (facts.get(f"general.base_model.0.{part}") for part in ("organization", "name"))
    return f"{owner}/{name}" if owner and name else None


def front_matter(facts: Mapping[str, object]) -> str:
    """Keys that Hugging Face reads, from the keys of a GGUF file; unknown ones are left out."""
    texts = (
        ("base_model", base_of(facts)),
        ("base_model_relation", "quantized" if base_of(facts) else None),
        ("license", facts.get("general.license")),
        ("license_name", facts.get("general.license.name")),
        ("license_link", facts.get("general.license.link")),
        ("library_name", "gguf"),
        ("pipeline_tag", "text-generation"),
        ("quantized_by", facts.get("general.quantized_by")),
    )
    lines = [f"{key}: {json.dumps(text)}" for key, text in texts if text]  # a JSON text is a YAML text
    return "\n".join(
        ["---", *lines, "tags:", "- gguf", "- llama.cpp", f"- {facts['general.architecture']}", "---"]
    )


def _made_of(plan: Plan, facts: Mapping[str, object], source: str) -> Iterator[tuple[str, str | None]]:
    """Rows about source, type and converter; None if unknown."""
    base, licence = base_of(facts), facts.get("general.license")
    yield "source", f"`{code_text(source)}`"
    yield "SHA-256 of its `config.json`", f"`{facts.get('kimi_gguf.source.config_sha256')}`"
    yield "SHA-256 over its shards' headers", f"`{facts.get('kimi_gguf.source.headers_sha256')}`"
    yield "base model", f"`{base}`" if base else None
    yield "licence", plain(str(licence)) if licence else None
    yield "parameters, all and active", str(facts["general.size_label"])
    yield "type", _type(plan)
    if plan.importances:
        yield "importance matrix", f"`{code_text(plan.importances.path.name)}`"
        yield "made with", plain(Path(plan.importances.dataset or "").name)


def _files(paths: Sequence[Path], files: Sequence[PlannedFile]) -> Iterator[tuple[str, ...]]:
    for path, file in zip(paths, files, strict=True):
        yield file_row(path.name, file.nbytes, file.tensors)


def file_row(name: str, nbytes: int, tensors: Collection[PlannedTensor | GgufTensor]) -> tuple[str, ...]:
    """The cells of a file, under `FILE_TITLES`."""
    return f"`{code_text(name)}`", f"{nbytes:,}", str(len(tensors)), type_counts(tensors)


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
    for difference in DIFFERENCES:
        yield "- " + difference.format(
            value_length=facts.get(f"{architecture}.attention.value_length"),
            eos=f"`{code_text(str(text))}`",
            tokenizer_eos=_TOKENIZER_EOS.get(architecture, "own end token"),
            ssm_a="exp(A_log)" if _has_positive_gates(architecture) else "-exp(A_log)",
        )


def _has_positive_gates(architecture: str) -> bool:
    """Whether the family stores exp(A_log) as it is."""
    groups = BY_ARCHITECTURE[architecture].table.layers
    return any(row.transform is Transform.EXP for group in groups for row in group.rows)


def _type(plan: Plan) -> str:
    return plan.request.recipe or plan.request.file_type.name


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


def code(text: str) -> str:
    """A code block with a fence longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def code_text(text: str) -> str:
    """Text for a code span: backticks and line breaks become spaces."""
    return "".join(c if c.isprintable() and c != "`" else " " for c in text)


def plain(text: str) -> str:
    """Text without Markdown or HTML syntax."""
    return "".join(c if c.isprintable() and c not in "`|<>[]" else " " for c in text)
