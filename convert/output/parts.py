"""The files of a plan: one file, or several splits of limited size in llama.cpp's format.

Input: a `Plan`. Output: its `Part`s in order, each a GGUF file. The first has all keys. Each has its number, the
number of splits, and the total number of tensors (`split.*`, with the types that llama-gguf-split uses).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Final

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.metadata import Key, ValueType
from kimi_gguf.convert.output.digest import digest
from kimi_gguf.convert.output.gguf_header import COUNTS, header_bytes, key_bytes, tensor_bytes
from kimi_gguf.convert.output.part_names import MAX_PARTS, part_paths, place_in_set
from kimi_gguf.convert.output.unfinished import Layout
from kimi_gguf.convert.plan import Plan, PlannedTensor, aligned

# A hash of the header; the same in all splits of one model, and different for every other model.
SET: Final = "kimi_gguf.split.set"
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class Part:
    """One GGUF file before it is written."""

    keys: tuple[Key, ...]
    tensors: tuple[PlannedTensor, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Offset of each tensor from the start of the data, followed by the size of the data."""
        return tuple(accumulate((aligned(t.nbytes) for t in self.tensors), initial=0))

    @cached_property
    def header(self) -> bytes:
        """The header including padding."""
        return header_bytes(self.keys, self.tensors, self.offsets[:-1])

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + self.offsets[-1]


def parts_of(plan: Plan) -> tuple[Part, ...]:
    """The files of the plan. Raises `ConvertError` if there would be more than MAX_PARTS."""
    chunks = list(_chunks(plan))
    if len(chunks) == 1:
        return (Part(plan.keys, plan.tensors),)
    if len(chunks) > MAX_PARTS:
        raise ConvertError(
            f"--split-max-size: expected at most {MAX_PARTS} splits (llama.cpp's limit), found {len(chunks)}; "
            "choose a larger size"
        )
    name = digest(Part(plan.keys, plan.tensors).header)
    return tuple(
        Part(
            (*(plan.keys if number == 0 else ()), *_split_keys(number, len(chunks), len(plan.tensors), name)),
            tuple(chunk),
        )
        for number, chunk in enumerate(chunks)
    )


def output_paths(plan: Plan, path: Path) -> list[Path]:
    """The file names of the plan's splits for the output `path`. Raises `ConvertError`."""
    if plan.max_part is not None and place_in_set(path) is not None:
        raise ConvertError(f"{path}: is the name of a split; give the name without -NNNNN-of-NNNNN")
    return part_paths(path, len(parts_of(plan)))


def layout_of(parts: Sequence[Part], paths: Sequence[Path]) -> Layout:
    """Names and sizes of the splits, and the file and offset at which each tensor (with its header) begins."""
    places = [
        (number, len(part.header) + offset if offset else 0)
        for number, part in enumerate(parts)
        for offset in part.offsets[:-1]
    ]
    files = [(path.name, part.nbytes) for path, part in zip(paths, parts, strict=True)]
    return Layout(tuple(files), (*places, (len(parts), 0)))


def total_size(plan: Plan) -> int:
    """Total size of all files of the plan, in bytes."""
    return sum(part.nbytes for part in parts_of(plan))


def size_notes(plan: Plan) -> Iterator[str]:
    """Notes about splits that are larger than the requested size."""
    for part in parts_of(plan):
        if plan.max_part is not None and part.nbytes > plan.max_part:
            yield (
                f"{part.tensors[0].name} is larger than --split-max-size: its split has {part.nbytes:,} bytes"
            )


def _split_keys(number: int, count: int, tensors: int, name: str) -> tuple[Key, ...]:
    return (
        Key(NUMBER, ValueType.UINT16, number),
        Key(COUNT, ValueType.UINT16, count),
        Key(TENSORS, ValueType.INT32, tensors),
        Key(SET, ValueType.STRING, name),
    )


def _chunks(plan: Plan) -> Iterator[Sequence[PlannedTensor]]:
    """The plan's tensors in order, grouped into files of limited size; no group is empty."""
    if plan.max_part is None or Part(plan.keys, plan.tensors).nbytes <= plan.max_part:
        yield plan.tensors
        return
    split = COUNTS + sum(len(key_bytes(key)) for key in _split_keys(0, 0, 0, digest()))
    head, data = split + sum(len(key_bytes(key)) for key in plan.keys), 0
    chunk: list[PlannedTensor] = []
    for tensor in plan.tensors:
        entry, nbytes = len(tensor_bytes(tensor)), aligned(tensor.nbytes)
        if chunk and aligned(head + entry) + data + nbytes > plan.max_part:
            yield chunk
            chunk, head, data = [], split, 0
        chunk.append(tensor)
        head, data = head + entry, data + nbytes
    yield chunk
