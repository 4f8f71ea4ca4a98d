"""Verify a GGUF file by converting its checkpoint again and comparing all tensor bytes and all keys.

Keys that describe the origin of a file may differ: those of FREE, and any key of ORIGIN that no conversion writes.

Input: the file, and the checkpoint that it was made from. Output: `Verdict`. The tensor types are read from the
file, so that files of any quantization mix can be verified, including files made by llama-quantize.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import numpy as np

from kimi_gguf.convert.adapter.merge import open_merged
from kimi_gguf.convert.conversion import ProgressDisplay, read_template, silent
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.families import load_vocab, outputs
from kimi_gguf.convert.model.generation import read_generation
from kimi_gguf.convert.model.gguf_key import Value
from kimi_gguf.convert.model.metadata import ADAPTER, adapter_keys, metadata
from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.model.vocab import Vocab
from kimi_gguf.convert.output.stream import Pace, encoded, prepared
from kimi_gguf.convert.output.writer import ProgressCallback
from kimi_gguf.convert.plan import Plan, in_file_order
from kimi_gguf.convert.source.checkpoint import Checkpoint
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.imatrix import read_importances
from kimi_gguf.convert.types.mixes import TypeRequest
from kimi_gguf.engine.gguf import GgufModel
from kimi_gguf.engine.gguf_check import has_mtp

# Keys, or the first parts of their names, that describe the origin of a file, not the model; they may differ.
FREE: Final = ("general.name", "general.file_type", "general.quantization_version", "quantize.", "split.")
# Keys with these prefixes may be in a file although the conversion that verifies it does not write them.
ORIGIN: Final = ("general.", "kimi_gguf.", *FREE)
SHOWN: Final = 60  # characters of a value in a message


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison."""

    tensors: int
    nbytes: int
    wrong_keys: tuple[str, ...]  # "key: expected .., found .."
    wrong_tensors: tuple[str, ...]  # "tensor: the first byte that differs"

    @property
    def proved(self) -> bool:
        return not self.wrong_keys and not self.wrong_tensors


def verify(
    path: Path,
    source: Path | str,
    imatrix: Path | None = None,
    max_memory: int | None = None,
    chat_template: Path | None = None,
    display: ProgressDisplay = silent,
    adapters: Sequence[tuple[Path, float]] = (),
) -> Verdict:
    """Compare the file `path` with a conversion of `source` with these adapters. Raises `ConvertError` or `GgufError`
    if any of them cannot be read."""
    with GgufModel(path) as file, open_merged(source, adapters, has_mtp(file)) as checkpoint:
        _check_adapters(file, checkpoint)
        pace = Pace.within(max_memory, elsewhere=checkpoint.own_bytes)
        plan = _plan_of(file, checkpoint, imatrix)
        vocab = load_vocab(checkpoint.folder, checkpoint.config)
        if chat_template is not None:
            vocab = replace(vocab, chat_template=read_template(chat_template, checkpoint.config))
        vocab = read_generation(checkpoint.folder, checkpoint.config, vocab).vocab
        with display(plan) as report:
            wrong_tensors = tuple(_differences(file, checkpoint, plan, pace, report))
        checkpoint.check_unchanged()
        wrong_keys = tuple(_wrong_keys(file, checkpoint, vocab))
        return Verdict(len(plan.tensors), plan.data_bytes, wrong_keys, wrong_tensors)


def _check_adapters(file: GgufModel, checkpoint: Checkpoint) -> None:
    """Raise `ConvertError` if the file names other adapters than those that are given."""
    merged = tuple(_as_stored(key.value) for key in adapter_keys(checkpoint.merged))
    written = tuple(value for name, value in file.keys.items() if name.startswith(ADAPTER))
    if written and written != merged:
        names = [
            str(value) for name, value in file.keys.items() if re.fullmatch(rf"{ADAPTER}\.\d+\.name", name)
        ]
        raise ConvertError(
            f"{file.path}: was made with adapters",
            expected=", ".join(names),
            found=", ".join(adapter.name for adapter in checkpoint.merged) or "none",
            todo="give the same, with the same scales: --adapter FOLDER[:SCALE]",
        )


def _plan_of(file: GgufModel, checkpoint: Checkpoint, imatrix: Path | None) -> Plan:
    """The plan that would produce the file, with the types of the file."""

    def wrong(what: str) -> ConvertError:
        return ConvertError(f"{file.path}: {what}", todo="the file was not made from this checkpoint")

    tensors: list[PlannedTensor] = []
    expected = sorted(outputs(checkpoint.config), key=in_file_order)
    for output in expected:
        found = file.tensors.get(output.name)
        if found is None:
            raise wrong(f"missing tensor {output.name!r}")
        shapes = [(*ne, 1, 1, 1)[:4] for ne in (found.ne, output.ne)]
        if shapes[0] != shapes[1]:
            raise wrong(f"{output.name!r}: expected shape {list(output.ne)}, found {list(found.ne)}")
        tensors.append(PlannedTensor(output, found.type, found.nbytes))
    if strange := set(file.tensors) - {output.name for output in expected}:
        raise wrong(f"unexpected tensor {min(strange)!r}")
    importances = read_importances(imatrix) if imatrix else None
    plan = Plan(TypeRequest(TYPES["F32"]), (), tuple(tensors), importances=importances)
    for tensor in plan.tensors:
        if tensor.type.needs_weights and plan.weights(tensor) is None:
            where = f"{imatrix}: no entry for {tensor.name!r}" if imatrix else f"{file.path}: {tensor.name!r}"
            raise ConvertError(
                f"{where}: {tensor.type.name} requires an importance matrix",
                todo="give --imatrix with the file of the conversion",
            )
    return plan


def _differences(
    file: GgufModel, checkpoint: Checkpoint, plan: Plan, pace: Pace, report: ProgressCallback
) -> Iterator[str]:
    """A message for every tensor that differs; it names the first differing byte."""
    at, before, reported = 0, "", ""
    for tensor, chunk in encoded(checkpoint, plan, plan.tensors, pace, prepared(checkpoint, plan)):
        at = at if tensor.name == before else 0
        before = tensor.name
        found = file.read(file.tensors[tensor.name], at, chunk.nbytes)
        if reported != tensor.name and not np.array_equal(found, chunk):
            reported = tensor.name
            byte = at + int(np.argmax(found != chunk))
            yield f"{tensor.name} ({tensor.type.name}): first difference at byte {byte} of {tensor.nbytes}"
        at += chunk.nbytes
        report(tensor, chunk.nbytes)


def _as_stored(value: Value) -> object:
    """The value as it is read from a file: numbers that are not integers are in float32."""
    if isinstance(value, float):
        return float(np.float32(value))
    if isinstance(value, list):
        return [float(np.float32(item)) if isinstance(item, float) else item for item in value]
    return value


def _wrong_keys(file: GgufModel, checkpoint: Checkpoint, vocab: Vocab) -> Iterator[str]:
    """A message for every key that differs, that is missing, or that no conversion writes."""
    written = {key.name: key.value for key in metadata(checkpoint.config, vocab, TYPES["F32"], "")}
    for name, value in written.items():
        if name.startswith(FREE):
            continue
        if name not in file.keys:
            yield f"{name}: missing, expected {value!r:.{SHOWN}}"
        elif not _same(expected := _as_stored(value), found := file.keys[name]):
            yield f"{name}: {_difference(expected, found)}"
    for name, found in file.keys.items():
        if name not in written and not name.startswith(ORIGIN):
            shown = name if name.isprintable() else f"{name!r:.{SHOWN}}"
            yield f"{shown}: unexpected, found {found!r:.{SHOWN}}"


def _same(one: object, other: object) -> bool:
    """Whether two values are equal and of the same type: for Python 1, 1.0 and True are equal."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


def _difference(expected: object, found: object) -> str:
    """Both values; of long texts and lists, the parts where they begin to differ."""
    long = isinstance(expected, str | list) and len(repr(expected)) > SHOWN
    if not long or type(found) is not type(expected):
        return f"expected {expected!r:.{SHOWN}}, found {found!r:.{SHOWN}}"
    one, other = cast(str, expected), cast(str, found)  # or two lists
    at = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    at = min(at, len(other))
    wanted, seen = (f"{value[at : at + SHOWN]!r:.{SHOWN}}" for value in (one, other))
    return f"expected {wanted}, found {seen}, from {'character' if isinstance(expected, str) else 'item'} {at} on"
