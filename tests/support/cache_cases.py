"""Cache types of latent attention on devices, each with its value of KIMI_CASES.

Every fifth case of F32 is run; of the others, which differ in how a row is read, every ninth; all with --full.
"""

from __future__ import annotations

import pytest

_OTHERS = ("f16", "bf16", "q8_0", "q4_0")
CACHE_CASES = [
    ("f32", "5"),
    *((cache_type, "9") for cache_type in _OTHERS),
    *(pytest.param(cache_type, "1", marks=pytest.mark.full) for cache_type in ("f32", *_OTHERS)),
]
