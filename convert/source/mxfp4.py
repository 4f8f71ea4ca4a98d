"""MXFP4 weights: from the two tensors of a checkpoint to ggml's blocks, and to float32.

Input: `weight_packed` (a byte holds element 2i in its low half and element 2i+1 in its high half) and `weight_scale`
(one byte per 32 elements, a power of two). Output: blocks of 17 bytes, ggml's `block_mxfp4`: the scale, then 16 bytes
of which byte j holds element j in its low half and element j+16 in its high half. Both hold the same bits, so nothing
is rounded. Sources: the OCP Microscaling specification 1.0; compressed-tensors' format `mxfp4-pack-quantized`;
`block_mxfp4` in ggml-common.h.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

GROUP: Final = 32  # elements with one scale
BLOCK_BYTES: Final = 1 + GROUP // 2
NAN: Final = 255  # the scale that is no number
_LARGE: Final = 253  # from this scale on, some elements are not finite in float32
_AT_ONCE: Final = 1 << 15  # blocks whose temporary copies are in memory at a time
# Values of four bits: a sign, two bits of exponent, one of mantissa.
_E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Byte -> the values of its two halves.
PAIRS: Final = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], -1)
# Scale -> its value; exact in float32 down to 2^-127, which is subnormal there. The last one is NaN.
SCALES: Final = np.append(np.ldexp(np.ones(NAN), np.arange(NAN) - 127), np.nan).astype(np.float32)
_LOW: Final = np.uint64(0x0F0F0F0F0F0F0F0F)
_HIGH: Final = np.uint64(0xF0F0F0F0F0F0F0F0)


def blocks(packed: Bytes, scales: Bytes) -> Bytes:
    """packed [16 n], scales [n] -> blocks [17 n]; only moves bits."""
    out = np.empty((len(scales), BLOCK_BYTES), np.uint8)
    out[:, 0] = scales
    # Bytes i and i + 8 of a group hold the elements 2i, 2i+1 and 2i+16, 2i+17. Eight bytes are moved at a time.
    halves = np.ascontiguousarray(packed).view(np.uint64).reshape(-1, 2)
    first, second = halves[:, 0], halves[:, 1]
    even = (first & _LOW) | ((second & _LOW) << np.uint64(4))
    odd = ((first & _HIGH) >> np.uint64(4)) | (second & _HIGH)
    both = np.empty((len(scales), GROUP // 4, 2), np.uint8)  # aligned: twice as fast as writing to `out`
    both[..., 0] = even.view(np.uint8).reshape(-1, 8)
    both[..., 1] = odd.view(np.uint8).reshape(-1, 8)
    out[:, 1:] = both.reshape(-1, GROUP // 2)
    return out.reshape(-1)


def values(data: Bytes) -> npt.NDArray[np.float32]:
    """Blocks [..., 17 n] -> the exact elements [..., 32 n]; a scale that is too large or NAN gives no finite ones."""
    flat = np.ascontiguousarray(data).reshape(-1, BLOCK_BYTES)
    out = np.empty((len(flat), 2, GROUP // 2), np.float32)
    for first in range(0, len(flat), _AT_ONCE):
        part = flat[first : first + _AT_ONCE]
        pairs = PAIRS[part[:, 1:]]  # [n, 16, 2]
        with np.errstate(over="ignore", invalid="ignore"):
            pairs *= SCALES[part[:, 0]][:, None, None]
        out[first : first + len(part)] = pairs.transpose(0, 2, 1)
    return out.reshape(*data.shape[:-1], -1)


def first_not_finite(data: Bytes) -> int | None:
    """The first element of blocks [17 n] that is not finite in float32 (with the scale NAN all 32 are), or None."""
    flat = data.reshape(-1, BLOCK_BYTES)
    for block in np.flatnonzero(flat[:, 0] >= _LARGE):
        finite = np.isfinite(values(flat[block]))
        if not finite.all():
            return int(block) * GROUP + int(np.argmin(finite))
    return None


def bound(data: Bytes) -> float:
    """No element of the blocks [17 n] has a larger magnitude."""
    top = int(data.reshape(-1, BLOCK_BYTES)[:, 0].max(initial=0))
    return 6.0 * 2.0 ** (top - 127)
