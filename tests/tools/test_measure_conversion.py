"""The timing of conversions: both converters run, their bytes are compared, the page shows the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from convert_tools import convert
from gguf import GGUFReader
from random_checkpoint import Spec, write_checkpoint

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.progress import Silent
from kimi_gguf.tools import measure_conversion
from kimi_gguf.tools.measure_conversion import different_tensors, measure, page

pytestmark = pytest.mark.engine


@pytest.mark.full
def test_both_converters_give_the_same_tensors_and_a_page(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_conversion, "bench_folder", lambda: tmp_path)
    source = write_checkpoint(tmp_path / "source", Spec(layers="KM"))
    rows = [measure(source, kind, 1, engine, Silent()) for kind in ("BF16", "Q4_0")]
    assert [len(row["quantize"]) for row in rows] == [0, 1]
    for row in rows:
        assert set(row["different"]) <= {"ssm_a"}
    assert all(row["convert"][0] > 0 and row["ours"][0] > 0 for row in rows)
    assert list((tmp_path / "conversion").iterdir()) == []
    record = {
        "machine": {"processor": "P", "cores": 2, "memory_gib": 4}, "bytes": 1, "turns": 1, "rows": rows,
        "engine": {"llama_cpp_commit": "c", "package": "p"}, "created": "2026-01-01T00:00", "command": "x",
    }  # fmt: skip
    rows[0]["different"], rows[1]["different"] = [], ["ssm_a", "output.weight"]
    assert "| all |" in page(record) and "| all but ssm_a, output.weight |" in page(record)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Spec(layers="KM"))
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    for file in (one, other):
        convert(source, "-o", file, "--type", "BF16")
    assert different_tensors(one, other) == []
    tensor = next(each for each in GGUFReader(one).tensors if each.name == "blk.1.attn_q.weight")
    np.memmap(other, np.uint8)[tensor.data_offset] ^= 1
    assert different_tensors(one, other) == ["attn_q.weight"]
