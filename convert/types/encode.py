"""Checks a chunk of a tensor and encodes it as a tensor type.

Input: rows of elements as stored in the checkpoint. Output: bytes; or `BadValueError` with the index of the first
invalid element. F32, F16 and BF16 are converted here, rounded to nearest, ties to even; ggml encodes block types.
Elements in MXFP4 are kept bit by bit if that is the type, and converted from their exact values otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kimi_gguf.convert.source import mxfp4
from kimi_gguf.convert.source.safetensors_file import Dtype, to_float32
from kimi_gguf.convert.types.ggml import Ggml
from kimi_gguf.engine.tensor_types import BF16, F16, F32, Bytes, TensorType, Values

Stored = npt.NDArray[Any]  # elements as they are in the checkpoint; BF16 as uint16, MXFP4 as blocks of bytes
BLOCK_ELEMENTS: Final = 1 << 18  # float32 copies are made in blocks that a core's cache holds
# Dtype -> (integer type of the same width, mask of the magnitude, bits of infinity). Masked integers have the order
# of the magnitudes.
_BITS: Final[dict[Dtype, tuple[Any, int, int]]] = {
    Dtype.BF16: (np.uint16, 0x7FFF, 0x7F80),
    Dtype.F16: (np.uint16, 0x7FFF, 0x7C00),
    Dtype.F32: (np.uint32, 0x7FFFFFFF, 0x7F800000),
}


@dataclass
class BadValueError(Exception):
    """Element `index` of a chunk is `value`: not finite, or `beyond` the largest number of the type."""

    index: int
    value: float
    beyond: bool = False


def check(values: Stored, dtype: Dtype, kind: TensorType) -> None:
    """Raise `BadValueError` for the first NaN or infinity, else for the largest number if the type cannot hold it."""
    if dtype is Dtype.MXFP4:
        _check_blocks(values, kind)
        return
    integers, mask, infinity = _BITS[dtype]
    flat = values.reshape(-1)
    magnitudes = flat.view(integers) & integers(mask)
    largest = int(magnitudes.max(initial=0))
    if largest >= infinity:
        at = int(np.argmax(magnitudes >= infinity))
        raise BadValueError(at, float(to_float32(flat[at : at + 1], dtype)[0]))
    if _value(largest, dtype) >= kind.limit:
        at = int(np.argmax(magnitudes == largest))
        raise BadValueError(at, float(to_float32(flat[at : at + 1], dtype)[0]), beyond=True)


def encode(
    rows: Stored, dtype: Dtype, kind: TensorType, weights: Values | None = None, ggml: Ggml | None = None
) -> Bytes:
    """`rows` [n, columns], checked, as the bytes of `kind`. Raises `BadValueError`; block types need `ggml`."""
    check(rows, dtype, kind)
    if kind.name == dtype.name:
        return _as_bytes(rows)
    if not kind.quantized:
        return _CASTS[kind.name](to_float32(rows, dtype))
    if ggml is None:
        raise ValueError(f"{kind.name} needs ggml")
    columns = rows.shape[1] // mxfp4.BLOCK_BYTES * mxfp4.GROUP if dtype is Dtype.MXFP4 else rows.shape[1]
    per_row = columns // kind.block * kind.block_bytes
    out = np.empty(len(rows) * per_row, np.uint8)
    step = max(BLOCK_ELEMENTS // columns, 1)
    for first in range(0, len(rows), step):
        part = np.ascontiguousarray(to_float32(rows[first : first + step], dtype))
        if not ggml.quantize(kind, part, weights, out[first * per_row : (first + len(part)) * per_row]):
            at = int(np.abs(part).argmax())
            raise BadValueError(first * columns + at, float(part.flat[at]), beyond=True)
    return out


def _check_blocks(values: Stored, kind: TensorType) -> None:
    """`check` for blocks of MXFP4."""
    flat = values.reshape(-1)
    if (bad := mxfp4.first_not_finite(flat)) is not None:
        block = bad // mxfp4.GROUP * mxfp4.BLOCK_BYTES
        element = mxfp4.values(flat[block : block + mxfp4.BLOCK_BYTES])[bad % mxfp4.GROUP]
        raise BadValueError(bad, float(element))
    if kind.name == Dtype.MXFP4.name or mxfp4.bound(flat) < kind.limit:
        return
    exact = mxfp4.values(flat)
    at = int(np.abs(exact).argmax())
    if abs(exact[at]) >= kind.limit:
        raise BadValueError(at, float(exact[at]), beyond=True)


def _value(bits: int, dtype: Dtype) -> float:
    return float(to_float32(np.array([bits], _BITS[dtype][0]).view(dtype.numpy), dtype)[0])


def _as_bytes(values: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _bf16(values: Values) -> Bytes:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    return _as_bytes(rounded.view("<u2").reshape(-1, 2)[:, 1])


_CASTS: Final[dict[str, Callable[[Values], Bytes]]] = {
    F32.name: lambda values: _as_bytes(values.astype("<f4", copy=False)),
    F16.name: lambda values: _as_bytes(values.astype("<f2")),
    BF16.name: _bf16,
}
