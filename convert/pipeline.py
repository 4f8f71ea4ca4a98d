"""The whole conversion as one function, and its plan: checkpoint -> plan -> encoded pieces -> GGUF file.

Flows in: paths and choices. Flows out: the file and its plan. For callers in Python; `cli` is its one user
on the command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .checkpoint import Checkpoint, open_checkpoint
from .digest import digest
from .ggml import Ggml
from .imatrix import read_importances
from .mixes import Request
from .origin import model_name
from .plan import Plan, PlannedTensor, make_plan
from .quantise import FileType
from .stream import Pace, encoded, prepared
from .tokenizer import load_vocab
from .unfinished import Identity
from .vocab_files import TOKENIZER
from .writer import check_output, header, write

Report = Callable[[PlannedTensor, int], None]


@dataclass(frozen=True)
class Options:
    """How to convert; none of them but `name` and `imatrix` has a say in the bytes."""

    name: str | None = None  # the model's name in the file; default: its folder's
    imatrix: Path | None = None
    overwrite: bool = False
    resume: bool = False
    max_memory: int | None = None  # bytes


def plan_only(source: Path | str, wanted: FileType | Request, options: Options | None = None) -> Plan:
    """The plan for `source`; reads its headers, config and tokenizer, no weights. Raises `ConvertError`."""
    with open_checkpoint(source) as checkpoint:
        return _plan(checkpoint, wanted, options or Options())


def convert(
    source: Path | str,
    output: Path,
    wanted: FileType | Request,
    options: Options | None = None,
    progress: Callable[[Plan], AbstractContextManager[Report]] | None = None,
) -> Plan:
    """Convert the checkpoint `source` to the GGUF file `output`; raises `ConvertError` and leaves no file there.

    `progress` is entered with the plan before the first byte is written, and gives the function that hears of
    every tensor and number of bytes.
    """
    options = options or Options()
    with open_checkpoint(source) as checkpoint:
        pace = Pace.within(options.max_memory, elsewhere=checkpoint.ahead_bytes)
        beside = (*checkpoint.files, *(checkpoint.folder / n for n in TOKENIZER))
        inputs = (*beside, *([options.imatrix] if options.imatrix else []))
        check_output(output, options.overwrite, inputs)
        plan = _plan(checkpoint, wanted, options)
        ggml = prepared(plan)
        identity = Identity(_plan_digest(plan, ggml), checkpoint.identity())

        def run(report: Report) -> None:
            write(
                plan,
                lambda left: encoded(checkpoint, plan, left, pace, ggml),
                output,
                options.overwrite,
                identity,
                options.resume,
                report,
                lambda tensor: checkpoint.check_unchanged(tensor.output.sources if tensor else None),
            )

        if progress is None:
            run(lambda tensor, nbytes: None)
        else:
            with progress(plan) as report:
                run(report)
    return plan


def _plan(checkpoint: Checkpoint, wanted: FileType | Request, options: Options) -> Plan:
    vocab = load_vocab(checkpoint.folder, checkpoint.config)
    request = wanted if isinstance(wanted, Request) else Request(wanted)
    importances = read_importances(options.imatrix) if options.imatrix else None
    return make_plan(checkpoint, vocab, request, options.name or model_name(checkpoint.folder), importances)


def _plan_digest(plan: Plan, ggml: Ggml | None) -> str:
    """What the bytes follow from beside the weights: layout, keys, importances, the versions at work."""
    sources = [[t.name, *t.output.sources, t.output.transform.value] for t in plan.tensors]
    importances = plan.importances.weights if plan.importances else {}
    return digest(
        version("kimi-gguf").encode(),
        (ggml.identity if ggml else "").encode(),
        header(plan),
        json.dumps(sources).encode(),
        *(part for name in sorted(importances) for part in (name.encode(), importances[name].tobytes())),
    )
