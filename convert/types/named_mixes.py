"""Quantization mixes made for this model; docs/conversion.md has their measurements.

Output: `RECIPES`, by the name that `--recipe` accepts.
"""

from __future__ import annotations

from typing import Final

from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.mixes import TypeRequest
from kimi_gguf.engine.tensor_types import TENSOR_TYPES

# All but the experts, which hold 95 % of the 48B's weights: mixers with their gates and latents, shared experts,
# dense layers. (The router, norms and convolutions are F32 in any case.)
NOT_EXPERTS: Final = r"ssm_|attn_|shexp|ffn_(up|gate|down)\."


def _protecting(name: str, experts: str) -> TypeRequest:
    """Experts in the type of a mix, all else in Q8_0: where an error spreads to every token."""
    keep = TENSOR_TYPES["Q8_0"]
    return TypeRequest(
        TYPES[experts], keep, keep, ((NOT_EXPERTS, keep), ("_exps", TYPES[experts].base)), recipe=name
    )


RECIPES: Final = {
    name: _protecting(name, experts)
    for name, experts in (("kimi-q3", "Q3_K_S"), ("kimi-q4", "Q4_K_S"), ("kimi-q5", "Q5_K_S"))
}
