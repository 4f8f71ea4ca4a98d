"""Reads a GGUF file as untrusted data: keys, and each tensor's type, shape and offset.

Input: a path. Output: `GgufFile`. Every number of the header is checked before it is used. Tensor data are read in
ranges. Source: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.types.tensor_types import TENSOR_TYPES, Bytes, TensorType

_MAX_HEADER: Final = 1 << 30  # a vocabulary of 160,000 tokens takes 10 MB
_MAX_DIMENSIONS: Final = 4
_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_BY_NUMBER: Final = {kind.number: kind for kind in TENSOR_TYPES.values()}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as its file describes it."""

    name: str
    ne: tuple[int, ...]  # ggml order
    type: TensorType
    offset: int  # absolute, in the file

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(self.ne)


class GgufFile:
    """An open GGUF file; a context manager. Raises `ConvertError` if the file is invalid."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.exists() and not path.is_file():
                raise ConvertError(f"{path}: expected a GGUF file, found something else")
            self._file = path.open("rb")
        except OSError as error:
            raise ConvertError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            cursor = _Cursor(self._file.read(min(self.size, _MAX_HEADER)), path)
            self.keys: Mapping[str, Any] = {}
            self.tensors: Mapping[str, GgufTensor] = {}
            self._header(cursor)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, tensor: GgufTensor, first: int = 0, count: int | None = None) -> Bytes:
        """`count` bytes of a tensor, starting at byte `first`; without a count, all remaining bytes."""
        count = tensor.nbytes - first if count is None else count
        if not 0 <= first <= first + count <= tensor.nbytes:
            raise ValueError(f"{tensor.name}: bytes {first}..{first + count} of {tensor.nbytes}")
        data = os.pread(self._file.fileno(), count, tensor.offset + first)
        if len(data) != count:
            raise ConvertError(f"{self.path}: {tensor.name!r}: the file was truncated while it was read")
        return np.frombuffer(data, np.uint8)

    def _header(self, cursor: _Cursor) -> None:
        if cursor.take(4) != b"GGUF":
            raise ConvertError(f"{self.path}: not a GGUF file: expected 'GGUF' as the first four bytes")
        version, num_tensors, num_keys = cursor.unpack("<IQQ")
        if version != 3:
            raise ConvertError(f"{self.path}: expected GGUF version 3, found {version}")
        keys: dict[str, Any] = {}
        for _ in range(num_keys):
            name = cursor.string()
            if name in keys:
                raise ConvertError(f"{self.path}: duplicate key {name!r:.80}")
            (kind,) = cursor.unpack("<I")
            keys[name] = cursor.value(kind)
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20:
            raise ConvertError(f"{self.path}: general.alignment: expected 8 or more, found {alignment!r:.40}")
        found = [self._tensor(cursor) for _ in range(num_tensors)]
        start = -(-cursor.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, ne, type_, offset in found:
            tensor = GgufTensor(name, ne, type_, start + offset)
            if name in tensors:
                raise ConvertError(f"{self.path}: duplicate tensor {name!r:.80}")
            if ne[0] % type_.block:
                raise ConvertError(
                    f"{self.path}: {name!r:.80}: row size {ne[0]} is not a multiple of {type_.name}'s block size"
                )
            if tensor.offset + tensor.nbytes > self.size:
                raise ConvertError(
                    f"{self.path}: {name!r:.80}: expected {tensor.nbytes} bytes at offset "
                    f"{tensor.offset}, but the file has {self.size} bytes; it is truncated"
                )
            tensors[name] = tensor
        self.keys, self.tensors = keys, tensors

    def _tensor(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], TensorType, int]:
        name = cursor.string()
        (dimensions,) = cursor.unpack("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ConvertError(f"{self.path}: {name!r:.80}: expected 1 to 4 dimensions, found {dimensions}")
        ne = cursor.unpack(f"<{dimensions}Q")
        number, offset = cursor.unpack("<IQ")
        if number not in _BY_NUMBER:
            raise ConvertError(f"{self.path}: {name!r:.80}: unknown tensor type {number}")
        if min(ne) < 1 or math.prod(ne) > 1 << 48:
            raise ConvertError(f"{self.path}: {name!r:.80}: expected sizes of at least 1, found {list(ne)}")
        return name, ne, _BY_NUMBER[number], offset


class _Cursor:
    """A position in the header; reading beyond its end raises `ConvertError`."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ConvertError(f"{self.path}: the header ends early, at byte {len(self.data)}; truncated")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        return self.take(length).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ConvertError(f"{self.path}: unknown type {kind} of a key's value")
            return self.unpack(_SCALARS[kind])[0]
        items, count = self.unpack("<IQ")
        if items == _STRING:
            if count > (len(self.data) - self.at) // 8:
                raise ConvertError(f"{self.path}: an array of {count} strings is longer than the header")
            return [self.string() for _ in range(count)]
        if items not in _SCALARS:
            raise ConvertError(f"{self.path}: unknown type {items} of an array's items")
        layout = np.dtype(_SCALARS[items].replace("?", "?1")) if items == 7 else np.dtype(_SCALARS[items])
        return np.frombuffer(self.take(count * layout.itemsize), layout).tolist()
