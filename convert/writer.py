"""A GGUF v3 file, written as a stream beside its place; it takes its name when it is whole.

Flows in: a `Plan` and its encoded pieces in order. Flows out: the file, or an unfinished one that can be gone on
with (see `unfinished`). Source: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from .errors import ConvertError
from .metadata import Key, Value, ValueType
from .plan import Plan, PlannedTensor, aligned
from .quantise import Bytes
from .unfinished import Identity, Unfinished, unfinished

MAGIC: Final = b"GGUF"
VERSION: Final = 3
_SCALARS: Final = {
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<?",
}


def header(plan: Plan) -> bytes:
    """Everything in front of the data, padding included."""
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(plan.tensors), len(plan.keys)))
    for key in plan.keys:
        out += _key(key)
    for tensor in plan.tensors:
        ne = tensor.output.ne
        out += _string(tensor.name)
        out += struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, tensor.type.number, tensor.offset)
    out += bytes(aligned(len(out)) - len(out))
    return bytes(out)


def file_size(plan: Plan) -> int:
    """Bytes of the whole file."""
    return len(header(plan)) + plan.data_bytes


def write(
    plan: Plan,
    pieces: Callable[[Sequence[PlannedTensor]], Iterator[tuple[PlannedTensor, Bytes]]],
    path: Path,
    overwrite: bool,
    identity: Identity,
    resume: bool,
    report: Callable[[PlannedTensor, int], None],
    check: Callable[[PlannedTensor | None], None],
) -> None:
    """Write the file. `pieces` gives the bytes of the tensors it is asked for, in order; `report` hears of every
    tensor and number of its bytes written, `check` of every tensor finished and, with None, of the last.
    Raises `ConvertError` when the disk is too small or fails, or when `check` does."""
    head = header(plan)
    with unfinished(path, identity, resume, overwrite) as file:
        _check_space(path, len(head) + plan.data_bytes - file.at)
        if file.at == 0:
            file.write(np.frombuffer(head, np.uint8))
        left = plan.tensors[file.mark.done :]
        for tensor in plan.tensors[: file.mark.done]:
            report(tensor, tensor.nbytes)
        _write_tensors(file, left, pieces, len(head), file.mark.done, report, check)
        check(None)


def _write_tensors(
    file: Unfinished,
    left: Sequence[PlannedTensor],
    pieces: Callable[[Sequence[PlannedTensor]], Iterator[tuple[PlannedTensor, Bytes]]],
    start: int,
    done: int,
    report: Callable[[PlannedTensor, int], None],
    check: Callable[[PlannedTensor | None], None],
) -> None:
    for tensor, piece in pieces(left):
        file.write(piece)
        report(tensor, piece.nbytes)
        written = file.at - start - tensor.offset
        if written == tensor.nbytes:
            file.write(np.zeros(aligned(written) - written, np.uint8))
            check(tensor)
            done += 1
            file.finished(done)
        elif not 0 < written < tensor.nbytes:
            raise AssertionError(f"{tensor.name}: planned {tensor.nbytes} bytes, got {written}")


def check_output(path: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """Refuse a place that cannot or must not be written, before any work is done. Raises `ConvertError`."""
    if not path.parent.is_dir():
        raise ConvertError(f"{path}: its folder does not exist; make it first")
    if not path.exists():
        return
    if not path.is_file():
        raise ConvertError(f"{path}: is no ordinary file; expected the name of a file to write")
    for source in sources:
        if source.exists() and path.samefile(source):
            raise ConvertError(f"{path}: is a file of the checkpoint; choose another name for the output")
    if not overwrite:
        raise ConvertError(f"{path}: exists already; remove it, choose another name, or use --force")


def _key(key: Key) -> bytes:
    out = _string(key.name) + struct.pack("<I", key.type)
    if key.type is not ValueType.ARRAY:
        return out + _value(key.type, key.value)
    if key.items is None or not isinstance(key.value, list):
        raise AssertionError(f"{key.name}: an array needs a list and the type of its items")
    items = key.items
    out += struct.pack("<IQ", items, len(key.value))
    return out + b"".join(_value(items, value) for value in key.value)


def _value(kind: ValueType, value: Value) -> bytes:
    if isinstance(value, str):
        return _string(value)
    return struct.pack(_SCALARS[kind], value)


def _string(text: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConvertError(
            f"{text!r:.80}: expected text, found half a character (a lone surrogate)"
        ) from None
    return struct.pack("<Q", len(data)) + data


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ConvertError(
            f"{path}: needs {size:,} bytes, but its disk has {free:,} free; "
            "make room, choose another disk or a smaller --type"
        )
