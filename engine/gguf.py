"""Reads GGUF as untrusted data: a single file, or a model in splits, opened through the first one.

Input: a path. Output: `GgufFile` (keys, and each tensor's type, shape and offset) or `GgufModel` (the keys of the
first split and the tensors of all). Every number in a header is checked before it is used, and the `split.*` keys
are checked for consistency. Tensor data are read in ranges. Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import numpy as np

from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.file_kind import kind_of
from kimi_gguf.engine.split_names import COUNT, NUMBER, SET, TENSORS, place_in_set
from kimi_gguf.engine.tensor_types import TENSOR_TYPES, Bytes, TensorType

READ_AT_ONCE: Final = 1 << 30  # Linux reads at most 2 GiB at once; macOS refuses more
_MAX_HEADER: Final = 1 << 30  # a vocabulary of 160,000 tokens takes 10 MB
_MAX_DIMENSIONS: Final = 4
_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MOST_NUMBER: Final = (1 << 16) - 1  # of versions and types; larger ones are damage
_BY_NUMBER: Final = {kind.number: kind for kind in TENSOR_TYPES.values()}


class GgufError(EngineError):
    """A file that is missing, damaged, not GGUF, or part of another model; the message names it."""


class UnknownGgufError(GgufError):
    """A file with another version of GGUF, or a type of tensor that is not known here; llama.cpp may know it."""


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

    @property
    def elements(self) -> int:
        return math.prod(self.ne)


class GgufFile:
    """An open GGUF file; a context manager. Raises `GgufError` if the file is invalid."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.exists() and not path.is_file():
                raise GgufError(path, expected="a GGUF file", found=kind_of(path))
            self._file = path.open("rb")
        except OSError as error:
            raise GgufError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            cursor = _Cursor(self._file, min(self.size, _MAX_HEADER), path)
            self.keys: Mapping[str, Any] = {}
            self.tensors: Mapping[str, GgufTensor] = {}
            self._header(cursor)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, tensor: GgufTensor, first: int = 0, count: int | None = None) -> Bytes:
        """`count` bytes of a tensor, starting at byte `first`; without a count, all remaining bytes."""
        count = tensor.nbytes - first if count is None else count
        if not 0 <= first <= first + count <= tensor.nbytes:
            raise ValueError(f"{tensor.name}: bytes {first}..{first + count} of {tensor.nbytes}")
        data = np.empty(count, np.uint8)
        done = 0
        while done < count:
            piece = data[done : done + READ_AT_ONCE].data
            read = os.preadv(self._file.fileno(), [piece], tensor.offset + first + done)
            if read == 0:
                raise GgufError(f"{self.path}: {tensor.name!r}: the file was truncated while it was read")
            done += read
        return data

    def _header(self, cursor: _Cursor) -> None:
        num_tensors, num_keys = cursor.counts()
        keys: dict[str, Any] = {}
        for _ in range(num_keys):
            name = cursor.string()
            if name in keys:
                raise GgufError(f"{self.path}: duplicate key {name!r:.80}")
            (kind,) = cursor.unpack("<I")
            keys[name] = cursor.value(kind)
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20:
            raise GgufError(
                f"{self.path}: general.alignment", expected="8 or more", found=f"{alignment!r:.40}"
            )
        headers = [self._tensor(cursor) for _ in range(num_tensors)]
        start = -(-cursor.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, ne, type_, offset in headers:
            tensor = GgufTensor(name, ne, type_, start + offset)
            if name in tensors:
                raise GgufError(f"{self.path}: duplicate tensor {name!r:.80}")
            if ne[0] % type_.block:
                raise GgufError(
                    f"{self.path}: {name!r:.80}: row size {ne[0]} is not a multiple of {type_.name}'s block size"
                )
            if tensor.offset + tensor.nbytes > self.size:
                raise GgufError(
                    f"{self.path}: {name!r:.80}",
                    expected=(
                        f"{tensor.nbytes} bytes at offset {tensor.offset}, but the file has {self.size} bytes"
                    ),
                    todo="it is truncated",
                )
            tensors[name] = tensor
        self.keys, self.tensors = keys, tensors

    def _tensor(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], TensorType, int]:
        name = cursor.string()
        (dimensions,) = cursor.unpack("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise GgufError(f"{self.path}: {name!r:.80}", expected="1 to 4 dimensions", found=dimensions)
        ne = cursor.unpack(f"<{dimensions}Q")
        number, offset = cursor.unpack("<IQ")
        if number not in _BY_NUMBER:
            kind = UnknownGgufError if number <= _MOST_NUMBER else GgufError
            raise kind(f"{self.path}: {name!r:.80}: unknown tensor type {number}")
        if min(ne) < 1 or math.prod(ne) > 1 << 48:
            raise GgufError(f"{self.path}: {name!r:.80}", expected="sizes of at least 1", found=list(ne))
        return name, ne, _BY_NUMBER[number], offset


def key_of(path: Path, key: str) -> Any:
    """The value of one key, or None. Other values are skipped, and what follows the key is not read. Raises `GgufError`
    for a file that is damaged up to there."""
    with path.open("rb") as file:
        cursor = _Cursor(file, min(os.fstat(file.fileno()).st_size, _MAX_HEADER), path)
        _, num_keys = cursor.counts()
        for _ in range(num_keys):
            name = cursor.string()
            (kind,) = cursor.unpack("<I")
            if name == key:
                return cursor.value(kind)
            cursor.skip(kind)
        return None


class GgufModel:
    """An open model; a context manager. Raises `GgufError` for a split that is missing, damaged, or belongs to
    another model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as stack:
            first = stack.enter_context(GgufFile(path))
            files = [first]
            for number, split in enumerate(_other_splits(first), 1):
                files.append(stack.enter_context(GgufFile(split)))
                _check_split(files[-1], number, first)
            self.keys: Mapping[str, Any] = first.keys
            self.files = tuple(files)
            self._file_of = _file_of(files)
            self.tensors: Mapping[str, GgufTensor] = {
                name: file.tensors[name] for name, file in self._file_of.items()
            }
            expected = first.keys.get(TENSORS) if len(files) > 1 else len(self.tensors)
            if len(self.tensors) != expected:
                raise GgufError(
                    f"{path}: {TENSORS}",
                    expected=f"{expected!r:.40} tensors in all splits",
                    found=len(self.tensors),
                    todo="the splits do not belong together",
                )
            self._stack = stack.pop_all()

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def read(self, tensor: GgufTensor, first: int = 0, count: int | None = None) -> Bytes:
        """`count` bytes of a tensor, starting at byte `first`; without a count, all remaining bytes."""
        return self._file_of[tensor.name].read(tensor, first, count)


def _other_splits(first: GgufFile) -> list[Path]:
    """The files that belong to the first one, by its keys and its name."""
    count, number = first.keys.get(COUNT, 0), first.keys.get(NUMBER, 0)
    if not isinstance(count, int) or count <= 1:
        return []
    position, splits = place_in_set(first.path) or (0, [])
    if len(splits) != count:
        raise GgufError(
            f"{first.path}: split of {count}",
            expected=f"a name like NAME-00001-of-{count:05d}.gguf",
            todo="restore its original name",
        )
    if number != 0 or position != 1:
        raise GgufError(
            f"{first.path}: is split {position} of {count}",
            todo=f"give the first one, {splits[0].name}",
        )
    for path in splits:
        if not path.exists():
            raise GgufError(
                f"{path}: not found, but the model has {count} splits", todo="put all of them into one folder"
            )
    return splits[1:]


def _check_split(split: GgufFile, number: int, first: GgufFile) -> None:
    """Compare a split's `split.*` keys with those of the first. llama-gguf-split does not copy SET, a key of this
    project, to the other splits."""
    of_first = {NUMBER: number, **{key: first.keys.get(key) for key in (COUNT, TENSORS)}}
    if SET in split.keys:
        of_first[SET] = first.keys.get(SET)
    for key, expected in of_first.items():
        if (value := split.keys.get(key)) != expected:
            raise GgufError(
                f"{split.path}: {key}",
                expected=f"{expected!r:.80} as in {first.path.name}",
                found=f"{value!r:.80}",
                todo="it is a split of another model",
            )


def _file_of(files: list[GgufFile]) -> dict[str, GgufFile]:
    files_by_name: dict[str, GgufFile] = {}
    for file in files:
        for name in file.tensors:
            if name in files_by_name:
                other = files_by_name[name].path.name
                raise GgufError(
                    f"{file.path}: tensor {name!r:.80} is also in {other}", todo="download the splits again"
                )
            files_by_name[name] = file
    return files_by_name


class _Cursor:
    """A position in the header, of at most `end` bytes; reading beyond its end raises `GgufError`."""

    def __init__(self, file: BufferedReader, end: int, path: Path) -> None:
        self.file, self.end, self.path, self.at = file, end, path, 0

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.end - self.at else b""
        if len(data) < count:
            raise GgufError(f"{self.path}: the header ends early, at byte {self.end}", todo="truncated")
        self.at += count
        return data

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def counts(self) -> tuple[int, int]:
        """The numbers of tensors and keys, at the beginning of the file."""
        if self.take(4) != b"GGUF":
            raise GgufError(f"{self.path}: not a GGUF file", expected="'GGUF' as the first four bytes")
        version, num_tensors, num_keys = self.unpack("<IQQ")
        if version != 3:
            kind = UnknownGgufError if 1 <= version <= _MOST_NUMBER else GgufError
            raise kind(f"{self.path}: expected GGUF version 3, found {version}")
        return num_tensors, num_keys

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        return self.take(length).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise GgufError(f"{self.path}: unknown type {kind} of a key's value")
            return self.unpack(_SCALARS[kind])[0]
        items, count = self.unpack("<IQ")
        if items == _STRING:
            self._check_strings(count)
            return [self.string() for _ in range(count)]
        if items not in _SCALARS:
            raise GgufError(f"{self.path}: unknown type {items} of an array's items")
        layout = np.dtype(_SCALARS[items].replace("<?", "?"))
        return np.frombuffer(self.take(count * layout.itemsize), layout).tolist()

    def _check_strings(self, count: int) -> None:
        """Raise `GgufError` if so many strings, with a length of 8 bytes each, are longer than what is left."""
        if count > (self.end - self.at) // 8:
            what = f"an array of {count} strings is longer than the header"
            raise GgufError(f"{self.path}: {what}: the file ends early, or is damaged")

    def skip(self, kind: int) -> None:
        """Go to the end of a value without reading it."""
        items, count = self.unpack("<IQ") if kind == _ARRAY else (kind, 1)
        if items == _STRING:
            self._check_strings(count)
            for _ in range(count):
                self._pass_over(*self.unpack("<Q"))
        elif items in _SCALARS:
            self._pass_over(count * struct.calcsize(_SCALARS[items]))
        else:
            raise GgufError(f"{self.path}: unknown type {items} of a key's value")

    def _pass_over(self, count: int) -> None:
        if count > self.end - self.at:
            raise GgufError(f"{self.path}: the header ends early, at byte {self.end}", todo="truncated")
        self.file.seek(count, os.SEEK_CUR)
        self.at += count
