"""Tables of ggml's tensor types and llama-quantize's file types.

Output: `TENSOR_TYPES` (number, block size and bytes of each tensor type) and `TYPES` (the values of `--type`: the
number in `general.file_type` and the base tensor type; `mixes` chooses the tensors that get another type).
Sources: `ggml.h`, `gguf-py/gguf/constants.py`, `tools/quantize/quantize.cpp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Stored = npt.NDArray[Any]  # elements as they stand in the checkpoint; BF16 as uint16


@dataclass(frozen=True)
class TensorType:
    """A ggml tensor type that can be written."""

    name: str
    number: int  # ggml_type
    block: int  # elements that are encoded together; a row must be whole blocks
    block_bytes: int
    limit: float  # magnitudes from here on have no finite encoding, or are not worth trying
    needs_weights: bool = False  # ggml has no search for it without importances

    @property
    def quantised(self) -> bool:
        """Whether ggml counts it among its quantisations: blocks with scales."""
        return self.block > 1

    def nbytes(self, ne: Sequence[int]) -> int:
        """Bytes of a tensor of ggml shape `ne`, whose first dimension must be whole blocks."""
        if ne[0] % self.block:
            raise ValueError(f"rows of {ne[0]} are not whole blocks of {self.block}")
        size = self.block_bytes * (ne[0] // self.block)
        for n in ne[1:]:
            size *= n
        return size


@dataclass(frozen=True)
class FileType:
    """What `--type` names: a tensor type, or one of llama-quantize's mixes of several."""

    name: str
    number: int  # general.file_type (llama_ftype)
    base: TensorType

    @property
    def quantised(self) -> bool:
        return self.base.quantised


_F16_LIMIT: Final = 65520.0  # halfway between the largest half, 65504, and the next step
_BF16_LIMIT: Final = float(np.array(0x7F7F8000, np.uint32).view(np.float32))
# Every block type but the 4-bit floats has scales in half precision, so that the result is checked by ggml.
# This bound lies above all of them and below where the searches' sums of squares overflow.
_BLOCK_LIMIT: Final = float(1 << 28)

F32: Final = TensorType("F32", 0, 1, 4, float("inf"))
F16: Final = TensorType("F16", 1, 1, 2, _F16_LIMIT)
BF16: Final = TensorType("BF16", 30, 1, 2, _BF16_LIMIT)

_BLOCK_TYPES: Final = (
    # name, ggml_type, elements and bytes of a block, whether importances are a must
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

_FILE_TYPES: Final = (
    # name, llama_ftype, the tensor type it starts from
    ("F32", 0, "F32"),
    ("F16", 1, "F16"),
    ("BF16", 32, "BF16"),
    ("Q8_0", 7, "Q8_0"),
    ("Q6_K", 18, "Q6_K"),
    ("Q5_K_M", 17, "Q5_K"),
    ("Q5_K_S", 16, "Q5_K"),
    ("Q5_1", 9, "Q5_1"),
    ("Q5_0", 8, "Q5_0"),
    ("Q4_K_M", 15, "Q4_K"),
    ("Q4_K_S", 14, "Q4_K"),
    ("IQ4_NL", 25, "IQ4_NL"),
    ("IQ4_XS", 30, "IQ4_XS"),
    ("Q4_1", 3, "Q4_1"),
    ("Q4_0", 2, "Q4_0"),
    ("MXFP4_MOE", 38, "MXFP4"),
    ("Q3_K_L", 13, "Q3_K"),
    ("Q3_K_M", 12, "Q3_K"),
    ("Q3_K_S", 11, "Q3_K"),
    ("IQ3_M", 27, "IQ3_S"),
    ("IQ3_S", 26, "IQ3_S"),
    ("IQ3_XS", 22, "IQ3_S"),
    ("IQ3_XXS", 23, "IQ3_XXS"),
    ("Q2_K", 10, "Q2_K"),
    ("Q2_K_S", 21, "Q2_K"),
    ("IQ2_M", 29, "IQ2_S"),
    ("IQ2_S", 28, "IQ2_XS"),
    ("IQ2_XS", 20, "IQ2_XS"),
    ("IQ2_XXS", 19, "IQ2_XXS"),
    ("Q2_0", 41, "Q2_0"),
    ("TQ2_0", 37, "TQ2_0"),
    ("TQ1_0", 36, "TQ1_0"),
    ("IQ1_M", 31, "IQ1_M"),
    ("IQ1_S", 24, "IQ1_S"),
    ("Q1_0", 40, "Q1_0"),
)

TYPES: Final = {name: FileType(name, number, TENSOR_TYPES[base]) for name, number, base in _FILE_TYPES}
ALIASES: Final = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
