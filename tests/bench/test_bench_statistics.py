"""The bench's figures: medians, spreads, upstream's fastest variant, the roofline. No process runs."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_gguf.bench.ab_run import LONG, Result, Sampler, Settings, measure_cell, read_through
from kimi_gguf.bench.cells import PATCHED, UPSTREAM, Cell, grid, variants
from kimi_gguf.bench.hybrid import fit
from kimi_gguf.bench.report import clearly_faster, peaks_table, slower, verdict
from kimi_gguf.bench.roofline import Demand, Peaks, attention_macs
from kimi_gguf.bench.statistics import best, stable, summary, worth_measuring

CELL = Cell("f16", 1, 0, 2, 8)


def test_the_median_is_not_moved_by_a_straggler() -> None:
    found = summary([1.0, 1.1, 0.9, 50.0, 1.0])
    assert (found.median, found.spread) == (1.0, pytest.approx(0.1))
    assert summary([1.0, 2.0, 4.0, 8.0]).median == 3.0, "between the middle two"


def test_upstream_counts_as_its_fastest_variant_by_median() -> None:
    samples = {
        PATCHED.name: [0.5, 0.5, 0.5],
        "upstream": [1.0, 1.0, 0.1],  # one lucky sample does not make it the best
        "upstream -fa 0": [0.8, 0.8, 3.0],
        "upstream --repack 0": [0.9, 0.9, 0.9],
    }
    result = Result(CELL, samples, {}, 1, None)
    assert best({name: each for name, each in samples.items() if name != PATCHED.name}) == "upstream -fa 0"
    assert result.rival == "upstream -fa 0"
    assert result.ratio == pytest.approx(0.8 / 0.5)


def test_variants_near_the_best_one_are_measured_too() -> None:
    assert worth_measuring({"a": 1.05, "b": 1.0, "c": 1.2}) == ["b", "a"]


def test_measuring_goes_on_until_samples_agree_or_are_many() -> None:
    assert not stable([1.0, 1.0])
    assert stable([1.0] * 6)
    assert not stable([1.0, 1.2] * 5)
    assert stable([1.0, 1.2] * 13)


def test_upstream_has_four_variants_if_the_cache_type_allows() -> None:
    assert {variant.name for variant in variants(CELL, UPSTREAM)} == {
        "upstream", "upstream -fa 0", "upstream --repack 0", "upstream --repack 0 -fa 0",
    }  # fmt: skip
    quantised = Cell("q8_0", 1, 0, 2, 8)
    assert {variant.name for variant in variants(quantised, UPSTREAM)} == {"upstream", "upstream --repack 0"}


def test_a_grid_reaches_each_depth_once() -> None:
    cells = grid(("f16",), (1,), (4096, 0), (1, 2), (8, 1))
    assert len(cells) == 8
    assert [cell.depth for cell in cells] == sorted(cell.depth for cell in cells)


def test_only_what_is_beyond_the_spread_is_called_slower() -> None:
    def cell(ratio: float, batch: int) -> dict[str, object]:
        return {
            "ratio": ratio, "batch": batch, "sequences": 1, "threads": 2, "cache_type": "f16", "depth": 0,
            "ubatch": 512, "device": None, "upstream": {"spread": 0.01}, "patched": {"spread": 0.01}, "others": 0.0,
        }  # fmt: skip

    cells = [cell(0.99, 1), cell(0.9, 8), cell(1.5, 512)]
    assert slower(cells) == [cells[1]]
    assert "it is slower by more than the spread in 1: pp8 at 0, 2 threads (0.90)" in verdict(cells)
    assert "faster than the best upstream variant in 1, in 1 by more than the spread;" in verdict(cells)


def test_only_what_is_beyond_the_spread_is_called_faster() -> None:
    def cell(ratio: float) -> dict[str, object]:
        return {"ratio": ratio, "upstream": {"spread": 0.02}, "patched": {"spread": 0.03}, "others": 0.0}

    assert clearly_faster([cell(1.04), cell(1.06)]) == [cell(1.06)]
    assert "variant in 2, in 1 by more than the spread; it is slower" in verdict([cell(1.04), cell(1.06)])


def test_the_floor_adds_parts_bound_by_memory_or_compute() -> None:
    limits = Peaks(threads=1, read=100.0, f32=10.0, int8=1000.0, bf16=None)
    reading = Demand(500.0, 200.0, 100.0, {"Q4_0": 1000.0}, 5.0, 0.0)
    assert reading.floor(limits) == (5.0 + 1.0 + 2.0, "memory")
    multiplying = Demand(100.0, 0.0, 300.0, {"Q4_0": 5000.0, "F32": 20.0}, 40.0, 10.0)
    assert multiplying.floor(limits) == (pytest.approx((5.0 + 2.0) + 4.0 + 1.0), "compute")
    attending = Demand(500.0, 0.0, 100.0, {"Q4_0": 1000.0}, 60.0, 0.0)
    assert attending.floor(limits) == (5.0 + 6.0, "compute")
    mixed = Demand(500.0, 0.0, 100.0, {"Q4_0": 1000.0}, 60.0, 0.0, value_macs=1000.0)
    # 16-bit integers: half of the int8 rate, and at most twice the float32 rate, because tile registers have none
    assert mixed.floor(limits) == (5.0 + 6.0 + 1000.0 / 20.0, "compute")
    vectors = Peaks(threads=1, read=100.0, f32=10.0, int8=30.0, bf16=None)
    assert mixed.floor(vectors) == (pytest.approx(1000.0 / 30.0 + 6.0 + 1000.0 / 15.0), "compute")
    without = Peaks(threads=1, read=100.0, f32=10.0, int8=None, bf16=None)
    assert mixed.floor(without)[0] == 100.0 + 6.0 + 100.0


def test_without_bf16_instructions_such_weights_count_as_float32() -> None:
    limits = Peaks(threads=1, read=1e9, f32=10.0, int8=None, bf16=None)
    assert limits.matmul("BF16") == limits.matmul("Q4_0") == 10.0


def test_attention_takes_the_cheaper_form() -> None:
    """A query and key cost 1088 MACs per head absorbed, otherwise 320 and the key's expansion."""
    one = attention_macs(Cell("f16", 1, 999, 1, 1), 1, 512, 64, 128, 128)
    assert one == (1000 * 1088 + 512 * 256, 0.0)
    pairs, expanded = 512 * 513 / 2, 512 * 512
    keys, values = pairs * 192 + expanded * 256, pairs * 128
    assert attention_macs(Cell("f16", 1, 0, 1, 512), 1, 512, 64, 128, 128) == (keys, values)
    assert attention_macs(Cell("f32", 1, 0, 1, 512), 1, 512, 64, 128, 128) == (keys + values, 0.0)


def test_the_slope_is_found_through_points_on_a_line() -> None:
    line = fit([4096, 16384, 65536], [0.01 + 1e-6 * depth for depth in (4096, 16384, 65536)])
    assert line(1 << 20) == pytest.approx(0.01 + 1e-6 * (1 << 20))


def test_a_file_is_on_disk_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushed = tmp_path / "model", []
    path.write_bytes(bytes(100))
    monkeypatch.setattr("os.fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    read_through(path)
    assert flushed == [path.stat().st_ino]


@pytest.mark.parametrize(("seconds", "kept"), [(LONG, 2), (LONG / 2, 3)], ids=["long", "short"])
def test_a_long_first_look_is_a_sample_itself(
    monkeypatch: pytest.MonkeyPatch, seconds: float, kept: int
) -> None:
    """If the time is up, each variant has two turns and no more; a short first sample is discarded."""
    taken: list[str] = []

    def sample(_self: Sampler, variant: Any, _steps: int) -> float:
        taken.append(variant.name)
        return seconds * (1 if variant == PATCHED else 3)

    monkeypatch.setattr(Sampler, "sample", sample)
    places: Any = {variant: (SimpleNamespace(pid=1), "context") for variant in (PATCHED, UPSTREAM[0])}
    cell = Cell("f16", 1, 0, 2, 2048)
    found = measure_cell(cell, places, Settings(0.0, 0.0))
    assert taken.count(PATCHED.name) == taken.count(UPSTREAM[0].name) == kept
    assert {name: len(each) for name, each in found.samples.items()} == {PATCHED.name: 2, UPSTREAM[0].name: 2}
    assert found.ratio == 3.0


def test_peaks_of_several_measurements_are_shown_as_a_range() -> None:
    measured = [
        {"threads": 2, "read": 57e9, "f32": 250e9, "int8": None, "bf16": 500e9},
        {"threads": 1, "read": 30e9, "f32": 125e9, "int8": None, "bf16": 250e9},
        {"threads": 2, "read": 41.25e9, "f32": 250.2e9, "int8": None, "bf16": 490e9},
    ]
    assert peaks_table(measured)[1:] == [
        ("1", "30.0", "125", "not available", "250"),
        ("2", "41.2 to 57.0", "250", "not available", "490 to 500"),
    ]
