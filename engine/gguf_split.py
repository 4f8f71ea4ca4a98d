"""Runs llama-gguf-split so that its outputs, splits or a merged file, appear complete under their names, or not at all.

Input: the program, the model, the arguments after it. Output: the files, and the program's exit status.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kimi_gguf.engine.argument_form import ArgumentForm
from kimi_gguf.engine.errors import EngineError, UsageError
from kimi_gguf.engine.hidden_output import check_outputs, run_for_output
from kimi_gguf.engine.interrupts import exit_status
from kimi_gguf.engine.split_names import place_in_set

MERGE, DRY_RUN, DELETE = "--merge", "--dry-run", "--delete-splits"
# llama-gguf-split's options, and how many words follow each.
OPTIONS: Final = {
    **dict.fromkeys(("--split", MERGE, "--no-tensor-first-split", DRY_RUN, DELETE), 0),
    **dict.fromkeys(("--split-max-size", "--split-max-tensors"), 1),
}
_SUFFIX: Final = ".gguf"
_FORM: Final = ArgumentForm("split", "OUTPUT.gguf", "the output", OPTIONS)


def split(program: Path, model: Path, given: Sequence[str]) -> int:
    """Split a model, or merge its splits; return the exit status. Raises `EngineError` for arguments that cannot be
    passed on.

    given: the output, OUTPUT.gguf, then options. The splits are named OUTPUT-00001-of-00003.gguf. If the command fails
    or is interrupted, nothing is left, and files that had these names before are unchanged.
    """
    output, options = check_arguments(model, given)

    def command(path: Path) -> list[str]:
        name = path if MERGE in options else path.with_suffix("")  # it appends the rest to the prefix
        return [str(program), *options, str(model.absolute()), str(name)]

    if DRY_RUN in options:
        return exit_status(command(output))
    return run_for_output(output, command, inside=True)  # because it names the output on standard output


def check_arguments(model: Path, given: Sequence[str]) -> tuple[Path, list[str]]:
    """(output, options). Raises `EngineError` for what cannot be written, before a build is needed."""
    words, options = _FORM.parse(model, given)
    if len(words) != 1 or not words[0].endswith(_SUFFIX):
        raise UsageError(
            "split: the output",
            expected="one name that ends in .gguf",
            found=" ".join(words) or "nothing",
            todo=_FORM.usage(model),
        )
    if DELETE in options:
        raise UsageError(
            f"split: {DELETE}",
            expected="splits that stay until the merged file is complete",
            todo="remove them when the command has succeeded",
        )
    number, inputs = place_in_set(model) or (1, [model])
    if MERGE in options and (len(inputs) == 1 or number != 1):
        raise EngineError(
            f"{model}: cannot be merged",
            expected="the first split of a model, NAME-00001-of-0000N.gguf",
            found=f"split {number} of {len(inputs)}" if len(inputs) > 1 else "a model in one file",
        )
    if MERGE not in options and len(inputs) > 1:
        first = inputs[0]
        raise EngineError(
            f"{model}: is one split of {len(inputs)}",
            expected="a model in one file",
            todo=f"merge it first: kimi-llama split {first} WHOLE.gguf {MERGE}",
        )
    output = Path(words[0])
    check_outputs([output], inputs if MERGE in options else [])  # splits have other names
    return output, options
