"""Table of llama-quantize's file types.

Output: `TYPES` (the values of `--type`: the number in `general.file_type` and the base tensor type; `mixes` chooses
the tensors that get another type). Source: `tools/quantize/quantize.cpp` of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kimi_gguf.engine.tensor_types import TENSOR_TYPES, TensorType


@dataclass(frozen=True)
class FileType:
    """What `--type` names: a tensor type, or one of llama-quantize's mixes of several."""

    name: str
    number: int  # general.file_type (llama_ftype)
    base: TensorType

    @property
    def quantized(self) -> bool:
        return self.base.quantized


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
