"""The header of a GGUF v3 file as bytes.

Input: keys and planned tensors. Output: bytes. Source: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from gguf import GGUFValueType as ValueType

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.gguf_key import Key, Value
from kimi_gguf.convert.model.tensor_table import PlannedTensor

MAGIC: Final = b"GGUF"
VERSION: Final = 3
ALIGNMENT: Final = 32  # GGUF's default: of the data and of each tensor in it
_SCALARS: Final = {
    ValueType.UINT16: "<H",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<?",
}
COUNTS: Final = len(MAGIC) + struct.calcsize("<IQQ")  # bytes before the first key


def aligned(offset: int) -> int:
    """`offset`, or the next multiple of the alignment."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def header_bytes(keys: Sequence[Key], tensors: Sequence[PlannedTensor], offsets: Sequence[int]) -> bytes:
    """The header including padding; `offsets` are those of the tensors, from the start of the data."""
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys)))
    for key in keys:
        out += key_bytes(key)
    for tensor, offset in zip(tensors, offsets, strict=True):
        out += tensor_bytes(tensor, offset)
    out += bytes(aligned(len(out)) - len(out))
    return bytes(out)


def tensor_bytes(tensor: PlannedTensor, offset: int = 0) -> bytes:
    """A tensor's entry; its length does not depend on the offset."""
    ne = tensor.output.ne
    return _string(tensor.name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, tensor.type.number, offset)


def key_bytes(key: Key) -> bytes:
    """A key and its value."""
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
        raise ConvertError(f"{text!r:.80}", expected="valid text", found="an unpaired surrogate") from None
    return struct.pack("<Q", len(data)) + data
