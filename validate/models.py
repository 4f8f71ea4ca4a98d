"""The reference of each architecture.

Input: the architecture of a checkpoint's config. Output: a class.
"""

from __future__ import annotations

from typing import Final

from kimi_gguf.convert.model import kimi_k3, kimi_linear, ling3
from kimi_gguf.validate.kimi_k3 import KimiK3
from kimi_gguf.validate.ling3 import Ling3
from kimi_gguf.validate.reference import Reference

REFERENCES: Final[dict[str, type[Reference]]] = {
    kimi_linear.FAMILY.architecture: Reference,
    ling3.ARCHITECTURE: Ling3,
    kimi_k3.ARCHITECTURE: KimiK3,
}
