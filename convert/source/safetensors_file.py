"""Reads a safetensors file as untrusted data: every number of its header is checked before it is used.

Input: an open `Source`. Output: `SafetensorsFile`: dtypes, shapes and offsets of its tensors, and ranges
of their elements as arrays. The format: 8 bytes little-endian header length, a JSON object
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}` with an optional `__metadata__`, then the data, which the
offsets must cover exactly: no gap, no overlap, and no bytes after the last tensor.
Source: https://huggingface.co/docs/safetensors (the format, and its header limit of 100 MB).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kimi_gguf.convert.errors import ConvertError, ReadError
from kimi_gguf.convert.source import mxfp4
from kimi_gguf.convert.source.byte_source import Source
from kimi_gguf.convert.source.json_file import check_not_pointer, parse_object

MAX_HEADER_BYTES: Final = 100_000_000
_MAX_DIMENSIONS: Final = 8
_TODO: Final = "the file is damaged or truncated, download it again"


class Dtype(Enum):
    """Types of weights. BF16 elements are handled as the upper half of a float32 (uint16), MXFP4 elements as ggml's
    blocks of bytes (see mxfp4.py); in a file, MXFP4 is two tensors of bytes."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    MXFP4 = "MXFP4"

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype({"F32": "<f4", "F16": "<f2", "BF16": "<u2", "MXFP4": "u1"}[self.value])

    def nbytes(self, elements: int) -> int:
        """Bytes of this number of elements, of MXFP4 whole groups."""
        if self is Dtype.MXFP4:
            return elements // mxfp4.GROUP * mxfp4.BLOCK_BYTES
        return elements * self.numpy.itemsize


FLOATS: Final = tuple(
    dtype.name for dtype in Dtype if dtype is not Dtype.MXFP4
)  # of single tensors with weights
DOUBLE: Final = "F64"  # read as float32
PACKED: Final = ("U8",)  # of the tensor with MXFP4's elements
SCALES: Final = ("U8", "F8_E8M0")  # of the tensor with their scales


def to_float32(values: npt.NDArray[Any], dtype: Dtype) -> npt.NDArray[np.float32]:
    """Stored elements as float32; exact, because float32 has every F16, BF16 and MXFP4 number. Blocks of MXFP4
    [..., 17 n] become elements [..., 32 n]."""
    if dtype is Dtype.BF16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype is Dtype.MXFP4:
        return mxfp4.values(values)
    return values.astype(np.float32, copy=False)


# Bytes of every dtype of the format: the offsets of other types are checked too.
_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as described by its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # absolute byte offsets in the file
    end: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def plain_name(name: str) -> str:
    """A tensor's name without what torch.compile and DataParallel put into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _numpy(dtype: str) -> np.dtype[Any]:
    return (
        Dtype(dtype).numpy
        if dtype in FLOATS
        else np.dtype({"I8": "i1", "I32": "<i4", DOUBLE: "<f8"}.get(dtype, "u1"))
    )


class SafetensorsFile:
    """An open safetensors file; a context manager. Raises `ConvertError` for anything that is invalid."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.path = source.path
        try:
            self.tensors: Mapping[str, StoredTensor] = self._read_header()
        except BaseException:
            source.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.source.close()

    def identity(self) -> bytes:
        """Identifies the file among others with its name: the stamp of its source, and the hash of its header."""
        return repr((self.path.name, self.source.stamp, self.header_hash)).encode()

    def check_unchanged(self, thoroughly: bool = False) -> None:
        """Raise `ConvertError` if the file was replaced or written to since it was opened; thoroughly: compare its
        header too."""
        same = self.source.unchanged()
        if same and thoroughly:
            try:
                same = hashlib.sha256(self._header_bytes()).hexdigest() == self.header_hash
            except ReadError:
                raise
            except ConvertError:
                same = False
        if not same:
            raise ConvertError(
                f"{self.path}: was changed while it was read",
                todo="the output would be a mixture: convert the checkpoint again",
            )

    def read(self, name: str, first: int, count: int) -> npt.NDArray[Any]:
        """Elements `first .. first+count` of tensor `name` in row-major order, 1-D, in the stored dtype
        (BF16 as uint16, F64 as float32, other types of one byte as uint8). The range must be inside the tensor, and the
        dtype one of `FLOATS`, F64, I8, I32, or of one byte."""
        ((source, begin, _),) = self.spans(name, first, count)
        out = np.empty(count, _numpy(self.tensors[name].dtype))
        source.read_into(out.view(np.uint8).data, begin, repr(name))
        with np.errstate(over="ignore"):
            return out.astype(np.float32) if out.dtype == np.float64 else out

    def spans(self, name: str, first: int, count: int) -> Iterator[tuple[Source, int, int]]:
        """Where elements `first .. first+count` of tensor `name` are stored: the source, first byte and end."""
        tensor = self.tensors[name]
        if not 0 <= first <= first + count <= tensor.size:
            raise ValueError(f"{name}: elements {first}..{first + count} of {tensor.size}")
        width = _numpy(tensor.dtype).itemsize
        yield self.source, tensor.begin + first * width, tensor.begin + (first + count) * width

    def _header_bytes(self) -> bytes:
        size = self.source.size
        if size < 8:
            raise ConvertError(self.path, expected="at least 8 bytes", found=size, todo=_TODO)
        prefix = bytearray(8)
        self.source.read_into(memoryview(prefix), 0, "the header's length")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, MAX_HEADER_BYTES):
            begin = bytearray(min(size, 64))
            self.source.read_into(memoryview(begin), 0, "the first bytes")
            check_not_pointer(bytes(begin), self.path)
            raise ConvertError(
                f"{self.path}: header length",
                expected=f"at most {min(size - 8, MAX_HEADER_BYTES)} bytes",
                found=length,
                todo=f"not a safetensors file, or {_TODO}",
            )
        header = bytearray(length)
        self.source.read_into(memoryview(header), 8, "the header")
        return bytes(header)

    def _read_header(self) -> dict[str, StoredTensor]:
        size = self.source.size
        header = self._header_bytes()
        self.header_hash = hashlib.sha256(header).hexdigest()
        entries = parse_object(header, f"{self.path} (header)")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ConvertError(f"{self.path}: __metadata__", expected="an object of strings", todo=_TODO)
        start = 8 + len(header)
        tensors = {plain_name(name): self._entry(name, entry, start, size) for name, entry in entries.items()}
        if len(tensors) < len(entries):
            raise ConvertError(
                f"{self.path}: two tensors differ only by _orig_mod. or module. in their names", todo=_TODO
            )
        self._check_cover(list(tensors.values()), start, size)
        return tensors

    def _entry(self, name: str, entry: Any, start: int, size: int) -> StoredTensor:
        def fail(expected: str, found: Any) -> ConvertError:
            return ConvertError(
                f"{self.path}: {name!r}", expected=expected, found=f"{found!r:.80}", todo=_TODO
            )

        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise fail("an object of dtype, shape and data_offsets", entry)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BYTES:
            raise fail("a safetensors dtype", dtype)
        if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape):
            raise fail("a shape of whole numbers below 2^63", shape)
        if len(shape) > _MAX_DIMENSIONS:
            raise fail(f"at most {_MAX_DIMENSIONS} dimensions", shape)
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
            raise fail("two data_offsets", offsets)
        begin, end = offsets
        if not 0 <= begin <= end <= size - start:
            raise fail(f"data_offsets inside the {size - start} bytes of data", offsets)
        nbytes = math.prod(shape) * _BYTES[dtype]
        if end - begin != nbytes:
            raise fail(f"{nbytes} bytes for {dtype} {shape}", end - begin)
        return StoredTensor(name, dtype, tuple(shape), start + begin, start + end)

    def _check_cover(self, tensors: list[StoredTensor], start: int, size: int) -> None:
        at, before = start, "the header"
        for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
            if tensor.begin != at:
                what = "overlaps" if tensor.begin < at else "leaves a gap after"
                raise ConvertError(f"{self.path}: {tensor.name!r} {what} {before}", todo=_TODO)
            at, before = tensor.end, repr(tensor.name)
        if at != size:
            raise ConvertError(self.path, expected=f"{at} bytes by its header", found=size, todo=_TODO)
