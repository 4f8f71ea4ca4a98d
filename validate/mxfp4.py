"""Decode a checkpoint's MXFP4 tensors, independently of the converter, which packs the same bytes into a GGUF file.

Input: an open checkpoint, a tensor and a range of its elements. Output: the four bits of each element and the scale of
each group, or the values in float32 of a tensor of any type.

Source: OCP Microscaling specification 1.0 (E2M1 elements, E8M0 scales); the order of the elements is that of
compressed-tensors' format `mxfp4-pack-quantized`: the low half of a byte comes first.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kimi_gguf.convert.source.checkpoint import Checkpoint
from kimi_gguf.convert.source.safetensors_file import Dtype, to_float32

GROUP: Final = 32  # elements with one scale
BLOCK_BYTES: Final = 1 + GROUP // 2  # of ggml's block_mxfp4
LARGE: Final = 253  # from this scale on, some values are not finite in float32
Quants = NDArray[np.uint8]
Float32s = NDArray[np.float32]


def source_values(checkpoint: Checkpoint, name: str, first: int, count: int) -> Float32s:
    """Elements `first .. first+count` of a checkpoint's tensor of any type, exactly, 1-D."""
    if checkpoint.dtype(name) is Dtype.MXFP4:
        return decode(*source_quants(checkpoint, name, first, count))
    return to_float32(checkpoint.elements(name, first, count), checkpoint.dtype(name))


def source_quants(checkpoint: Checkpoint, name: str, first: int, count: int) -> tuple[Quants, Quants]:
    """The four bits of each element [count] and the scales [count / 32]; whole groups."""
    packed, scales = checkpoint.packed_bytes(name, first, count)
    quants = np.empty(count, np.uint8)
    quants[0::2], quants[1::2] = packed & 15, packed >> 4
    return quants, scales


def block_quants(raw: NDArray[Any]) -> tuple[Quants, Quants]:
    """The same of ggml's blocks: byte j has the elements j (low half) and j + 16."""
    blocks = raw.reshape(-1, BLOCK_BYTES)
    return np.concatenate([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], 1).reshape(-1), blocks[:, 0]


def decode(quants: Quants, scales: Quants) -> Float32s:
    """The values: sign, two bits of exponent (0: subnormal) and one of mantissa, times 2^(scale - 127)."""
    sign, exponent, mantissa = quants >> 3, (quants >> 1) & 3, quants & 1
    normal = exponent > 0
    size = np.ldexp((normal + mantissa / 2).astype(np.float64), np.maximum(exponent, 1).astype(np.int32) - 1)
    scaled = np.ldexp(size, np.repeat(scales.astype(np.int32) - 127, GROUP))
    with np.errstate(over="ignore"):
        values: Float32s = np.where(sign == 1, -scaled, scaled).astype(np.float32)
    values[np.repeat(scales == 255, GROUP)] = np.nan
    return values


def not_finite(quants: Quants, scales: Quants) -> NDArray[np.bool_]:
    """Which values are not finite in float32."""
    found = np.zeros((len(scales), GROUP), np.bool_)
    large = scales >= LARGE
    if large.any():
        values = decode(quants.reshape(-1, GROUP)[large].reshape(-1), scales[large])
        found[large] = ~np.isfinite(values).reshape(-1, GROUP)
    return found.reshape(-1)
