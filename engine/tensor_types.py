"""ggml's tensor types, as data: number, elements and bytes of a block.

Input: none. Output: `TENSOR_TYPES`, the types that a GGUF file's tensors may have. Sources: `ggml.h` and
`gguf-py/gguf/constants.py` of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TensorType:
    """A ggml tensor type that can be written."""

    name: str
    number: int  # ggml_type
    block: int  # elements that are encoded together; a row must consist of whole blocks
    block_bytes: int
    limit: float  # magnitudes from here on have no finite encoding, or are not supported
    needs_weights: bool = False  # ggml cannot quantize to it without importances

    @property
    def quantized(self) -> bool:
        """Whether ggml counts it among its quantized types: blocks with scales."""
        return self.block > 1

    def nbytes(self, ne: Sequence[int]) -> int:
        """Bytes of a tensor of ggml shape `ne`, whose first dimension must be whole blocks."""
        if ne[0] % self.block:
            raise ValueError(f"row length {ne[0]} is not a multiple of the block size {self.block}")
        return self.block_bytes * (ne[0] // self.block) * math.prod(ne[1:])


_F16_LIMIT: Final = 65520.0  # halfway between the largest half, 65504, and the next step
_BF16_LIMIT: Final = float(np.array(0x7F7F8000, np.uint32).view(np.float32))
# All block types except the 4-bit floats have scales in half precision; ggml checks the result for overflow.
# This bound is above all limits, and below the values at which the sums of squares in the searches overflow.
_BLOCK_LIMIT: Final = float(1 << 28)

F32: Final = TensorType("F32", 0, 1, 4, float("inf"))
F16: Final = TensorType("F16", 1, 1, 2, _F16_LIMIT)
BF16: Final = TensorType("BF16", 30, 1, 2, _BF16_LIMIT)

_BLOCK_TYPES: Final = (
    # name, ggml_type, elements and bytes of a block, whether importances are required
    ("Q4_0", 2, 32, 18, False),
    ("Q4_1", 3, 32, 20, False),
    ("Q5_0", 6, 32, 22, False),
    ("Q5_1", 7, 32, 24, False),
    ("Q8_0", 8, 32, 34, False),
    ("Q2_K", 10, 256, 84, False),
    ("Q3_K", 11, 256, 110, False),
    ("Q4_K", 12, 256, 144, False),
    ("Q5_K", 13, 256, 176, False),
    ("Q6_K", 14, 256, 210, False),
    ("IQ2_XXS", 16, 256, 66, True),
    ("IQ2_XS", 17, 256, 74, True),
    ("IQ3_XXS", 18, 256, 98, False),
    ("IQ1_S", 19, 256, 50, True),
    ("IQ4_NL", 20, 32, 18, False),
    ("IQ3_S", 21, 256, 110, False),
    ("IQ2_S", 22, 256, 82, False),
    ("IQ4_XS", 23, 256, 136, False),
    ("IQ1_M", 29, 256, 56, False),
    ("TQ1_0", 34, 256, 54, False),
    ("TQ2_0", 35, 256, 66, False),
    ("MXFP4", 39, 32, 17, False),
    ("NVFP4", 40, 64, 36, False),
    ("Q1_0", 41, 128, 18, False),
    ("Q2_0", 42, 64, 18, False),
)

TENSOR_TYPES: Final = {t.name: t for t in (F32, F16, BF16)} | {
    name: TensorType(name, number, block, nbytes, _BLOCK_LIMIT, must)
    for name, number, block, nbytes, must in _BLOCK_TYPES
}
