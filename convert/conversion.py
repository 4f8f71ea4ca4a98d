"""The conversion as one function: checkpoint -> plan -> encoded chunks -> GGUF file.

Input: paths and options. Output: the file and its plan. This is the Python interface of the converter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_gguf.convert.adapter.merge import open_merged
from kimi_gguf.convert.card.new import Reporting, new_card
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.families import family_of, load_vocab
from kimi_gguf.convert.model.generation import GENERATION
from kimi_gguf.convert.model.vocab import parsed
from kimi_gguf.convert.model.vocab_files import TOKENIZER, read_text
from kimi_gguf.convert.output.digest import digest
from kimi_gguf.convert.output.stream import Pace, Rounding, encoded, prepared
from kimi_gguf.convert.output.unfinished import Identity, taken
from kimi_gguf.convert.output.writer import ProgressCallback, check_outputs, writing
from kimi_gguf.convert.plan import Plan, make_plan
from kimi_gguf.convert.source.checkpoint import Checkpoint
from kimi_gguf.convert.source.origin import CARD, model_name
from kimi_gguf.convert.types.file_types import FileType
from kimi_gguf.convert.types.ggml import Ggml
from kimi_gguf.convert.types.imatrix import read_importances
from kimi_gguf.convert.types.mixes import TypeRequest, as_stored
from kimi_gguf.engine.folder_lock import folder_lock
from kimi_gguf.engine.progress import Reporter, Silent
from kimi_gguf.engine.version import VERSION

ProgressDisplay = Callable[[Plan], AbstractContextManager[ProgressCallback]]


@dataclass(frozen=True)
class Options:
    """Options; only `name`, `imatrix`, `split_max_size`, `quantized_by`, `mtp`, `chat_template` and `adapters` change
    the content of the file."""

    name: str | None = None  # the model's name in the metadata; default: the name of its folder
    imatrix: Path | None = None
    overwrite: bool = False
    resume: bool = False
    max_memory: int | None = None  # bytes
    split_max_size: int | None = None  # maximum bytes of a file; None: a single file
    quantized_by: str | None = None
    mtp: bool = True  # include layers that predict further tokens, if the checkpoint has them
    card: tuple[str, ...] = ()  # the command for the model card, the checkpoint second; empty: no card
    chat_template: Path | None = None  # instead of the checkpoint's
    adapters: tuple[
        tuple[Path, float], ...
    ] = ()  # folders of PEFT adapters that are merged, and their scales


@contextmanager
def silent(plan: Plan) -> Iterator[ProgressCallback]:
    """A `ProgressDisplay` that shows nothing."""
    yield lambda tensor, nbytes: None


def silently() -> AbstractContextManager[Reporter]:
    """A `Reporting` that shows nothing."""
    return nullcontext(Silent())


def plan_only(source: Path | str, wanted: FileType | TypeRequest, options: Options | None = None) -> Plan:
    """The plan for `source`; reads its headers, config and tokenizer, no weights. Raises `ConvertError`."""
    options = options or Options()
    with open_merged(source, options.adapters, options.mtp) as checkpoint:
        return _plan(checkpoint, wanted, options)


def convert(
    source: Path | str,
    output: Path,
    wanted: FileType | TypeRequest,
    options: Options | None = None,
    progress: ProgressDisplay = silent,
    reporting: Reporting = silently,
) -> Plan:
    """Convert the checkpoint `source` to the GGUF file `output`, split if it would exceed `split_max_size`.

    If it raises `ConvertError`, no file was written. `progress` is a context manager that is entered with the plan
    before the first byte is written; before that, `reporting` shows how the folder's other files are hashed for the
    model card.
    """
    options = options or Options()
    with open_merged(source, options.adapters, options.mtp) as checkpoint:
        pace = Pace.within(options.max_memory, elsewhere=checkpoint.own_bytes)
        inputs = [*checkpoint.files, *(checkpoint.folder / name for name in (*TOKENIZER, GENERATION, CARD))]
        inputs += [file for file in (options.imatrix, options.chat_template) if file]
        inputs += [file for folder, _ in options.adapters for file in folder.iterdir()]
        plan = _plan(checkpoint, wanted, options)
        paths = plan.paths(output)
        outputs = [*paths, *([output.with_name(CARD)] if options.card else [])]
        check_outputs(outputs, options.overwrite, inputs, taken(output, options.resume))
        card = new_card(plan, paths, checkpoint.config, options.card, reporting) if options.card else None
        ggml, rounding = prepared(checkpoint, plan), Rounding()
        identity = Identity(_plan_digest(plan, ggml), checkpoint.identity())
        files = writing(
            plan,
            output,
            identity,
            overwrite=options.overwrite,
            resume=options.resume,
            hashed=card is not None,
        )
        with progress(plan) as report, ExitStack() as locks, files as writer:
            writer.read_finished(report)
            for tensor, chunk in encoded(checkpoint, plan, writer.remaining, pace, ggml, rounding):
                complete = writer.append(tensor, chunk)
                report(tensor, chunk.nbytes)
                if complete:
                    checkpoint.check_unchanged(name for name, _ in tensor.output.inputs)
                    writer.finish_tensor()
            checkpoint.check_unchanged()
            if card:
                locks.enter_context(folder_lock(output.parent, wait=True))  # until the files are renamed
                writer.add(CARD, card(writer.hashes).encode())
    return replace(plan, results=(str(rounding),) if rounding.values else ())


def read_template(path: Path, config: ModelConfig) -> str:
    """The chat template in a file. Raises `ConvertError`."""
    if not path.exists():
        origin = family_of(config).template
        todo = f"get it from {origin}" if origin else "name a file, or omit the option"
        raise ConvertError(f"{path}: no such file", expected="a chat template (Jinja)", todo=todo)
    return parsed(read_text(path), str(path))


def _plan(checkpoint: Checkpoint, wanted: FileType | TypeRequest, options: Options) -> Plan:
    vocab = load_vocab(checkpoint.folder, checkpoint.config)
    if options.chat_template is not None:
        vocab = replace(vocab, chat_template=read_template(options.chat_template, checkpoint.config))
    request = wanted if isinstance(wanted, TypeRequest) else TypeRequest(wanted)
    request = as_stored(request) if checkpoint.packed else request
    importances = read_importances(options.imatrix) if options.imatrix else None
    name = options.name or model_name(checkpoint.folder)
    size, author = options.split_max_size, options.quantized_by
    return make_plan(checkpoint, vocab, request, name, importances, size, author)


def _plan_digest(plan: Plan, ggml: Ggml | None) -> str:
    """A hash of everything but the weights that determines the output: layout, keys, importances, versions."""
    sources = [[t.name, *(n for n, _ in t.output.inputs), t.output.transform.value] for t in plan.tensors]
    importances = plan.importances.weights if plan.importances else {}
    return digest(
        VERSION.encode(),
        (ggml.identity if ggml else "").encode(),
        *(file.header for file in plan.files),
        json.dumps(sources).encode(),
        *(part for name in sorted(importances) for part in (name.encode(), importances[name].tobytes())),
    )
