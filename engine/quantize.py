"""Runs llama-quantize so that its output appears complete under its name, or not at all.

Input: the program, the model, the arguments after it. Output: the files, and the program's exit status.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from kimi_gguf.engine.argument_form import ArgumentForm
from kimi_gguf.engine.errors import UsageError
from kimi_gguf.engine.hidden_output import check_outputs, run_for_output
from kimi_gguf.engine.interrupts import exit_status
from kimi_gguf.engine.path_check import check_path
from kimi_gguf.engine.split_names import place_in_set, split_paths

DRY_RUN, KEEP_SPLIT, IMATRIX = "--dry-run", "--keep-split", "--imatrix"
# llama-quantize's options, and how many words follow each.
OPTIONS: Final = {
    **dict.fromkeys(
        ("--help", "--allow-requantize", "--leave-output-tensor", "--pure", KEEP_SPLIT, DRY_RUN), 0
    ),
    **dict.fromkeys((IMATRIX, "--include-weights", "--exclude-weights", "--output-tensor-type"), 1),
    **dict.fromkeys(("--token-embedding-type", "--tensor-type", "--tensor-type-file", "--prune-layers"), 1),
    **dict.fromkeys(("--override-kv", "--max-buffer-size"), 1),
}
_SUFFIX: Final = ".gguf"
_FORM: Final = ArgumentForm(
    "quantize", "OUTPUT.gguf TYPE [THREADS]", "the output, the type and the number of threads", OPTIONS
)


def quantize(program: Path, model: Path, given: Sequence[str]) -> int:
    """Quantize `model`; return the exit status. Raises `EngineError` for arguments that it cannot pass on.

    given: the output, the type, perhaps a number of threads, then options. If it fails or is interrupted, nothing is
    left, and a file that had the output's name before is unchanged. What a killed run left is removed by the next one.
    """
    words, options, output = check_arguments(model, given)
    if output is None:
        return exit_status([str(program), *options, str(model), *words])
    return run_for_output(
        output, lambda hidden: [str(program), *options, str(model), str(hidden), *words[1:]]
    )


def check_arguments(model: Path, given: Sequence[str]) -> tuple[list[str], list[str], Path | None]:
    """(output, type and threads; options; the output, None for a dry run). Raises `EngineError` for what cannot be
    written, before a program or a build is needed. given: as for `quantize`."""
    words, options = _FORM.parse(model, given)
    for option, value in pairwise(options):
        if option == IMATRIX:
            check_path(Path(value))
    if DRY_RUN in options:
        return words, options, None
    output = Path(words[0]) if len(words) > 1 else None
    if output is None or output.suffix != _SUFFIX:
        raise UsageError(
            "quantize: no output",
            expected="a name that ends in .gguf, and the type after it",
            found=" ".join(words) or "nothing",
            todo=_FORM.usage(model),
        )
    inputs = (place_in_set(model) or (1, [model]))[1]
    outputs = split_paths(output, len(inputs)) if KEEP_SPLIT in options else [output]
    check_outputs(outputs, inputs)
    return words, options, output
