"""Cache types of latent attention on devices, each with its value of KIMI_CASES.

Every ninth case is run; all with --full.
"""

from __future__ import annotations

import pytest

_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
CACHE_CASES = [
    *((cache_type, "9") for cache_type in _TYPES),
    *(pytest.param(cache_type, "1", marks=pytest.mark.full) for cache_type in _TYPES),
]
