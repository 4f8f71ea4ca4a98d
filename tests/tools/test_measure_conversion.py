"""The timing of conversions: both converters run, their bytes are compared, the page shows the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from convert_tools import convert
from gguf import GGUFReader
from random_checkpoint import Spec, write_checkpoint

from kimi_gguf.tools.measure_conversion import different_tensors

pytestmark = pytest.mark.engine


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Spec(layers="KM"))
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    for file in (one, other):
        convert(source, "-o", file, "--type", "BF16")
    assert different_tensors(one, other) == []
    tensor = next(each for each in GGUFReader(one).tensors if each.name == "blk.1.attn_q.weight")
    np.memmap(other, np.uint8)[tensor.data_offset] ^= 1
    assert different_tensors(one, other) == ["attn_q.weight"]
