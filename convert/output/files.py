"""The files of a plan: one file, or several splits of limited size in llama.cpp's format.

Input: keys, planned tensors and the size. Output: `PlannedFile`s in order, each a GGUF file. The first has all keys.
Each has its number, the number of splits, and the total number of tensors (`split.*`, with the types that
llama-gguf-split uses).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from gguf import GGUFValueType as ValueType

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.gguf_key import Key
from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.output.digest import digest
from kimi_gguf.convert.output.gguf_header import COUNTS, aligned, header_bytes, key_bytes, tensor_bytes
from kimi_gguf.engine.split_names import COUNT, MAX_SPLITS, NUMBER, SET, TENSORS


@dataclass(frozen=True)
class PlannedFile:
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


def split(
    keys: tuple[Key, ...], tensors: tuple[PlannedTensor, ...], max_bytes: int | None
) -> tuple[PlannedFile, ...]:
    """The files, each of at most `max_bytes` unless a single tensor is larger; None: one file. Raises `ConvertError`
    if there would be more than MAX_SPLITS."""
    whole = PlannedFile(keys, tensors)
    if max_bytes is None or whole.nbytes <= max_bytes:
        return (whole,)
    chunks = list(_chunks(keys, tensors, max_bytes))
    if len(chunks) == 1:
        return (whole,)
    if len(chunks) > MAX_SPLITS:
        raise ConvertError(
            "--split-max-size",
            expected=f"at most {MAX_SPLITS} splits (llama.cpp's limit)",
            found=len(chunks),
            todo="choose a larger size",
        )
    name = digest(whole.header)
    every = [_split_keys(number, len(chunks), len(tensors), name) for number in range(len(chunks))]
    every[0] = (*keys, *every[0])
    return tuple(PlannedFile(own, tuple(chunk)) for own, chunk in zip(every, chunks, strict=True))


def _split_keys(number: int, count: int, tensors: int, name: str) -> tuple[Key, ...]:
    return (
        Key(NUMBER, ValueType.UINT16, number),
        Key(COUNT, ValueType.UINT16, count),
        Key(TENSORS, ValueType.INT32, tensors),
        Key(SET, ValueType.STRING, name),
    )


def _chunks(
    keys: Sequence[Key], tensors: Sequence[PlannedTensor], max_bytes: int
) -> Iterator[Sequence[PlannedTensor]]:
    """The tensors in order, grouped into files of limited size; no group is empty."""
    split_head = COUNTS + sum(len(key_bytes(key)) for key in _split_keys(0, 0, 0, digest()))
    head, data = split_head + sum(len(key_bytes(key)) for key in keys), 0
    chunk: list[PlannedTensor] = []
    for tensor in tensors:
        entry, nbytes = len(tensor_bytes(tensor)), aligned(tensor.nbytes)
        if chunk and aligned(head + entry) + data + nbytes > max_bytes:
            yield chunk
            chunk, head, data = [], split_head, 0
        chunk.append(tensor)
        head, data = head + entry, data + nbytes
    yield chunk
