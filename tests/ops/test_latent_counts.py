"""The counted break-even points of latent attention on CUDA: the code has them, and they are what they claim to be."""

from __future__ import annotations

import re

import pytest
from native_program import OPERATORS

from kimi_gguf.scripts.latent_counts import (
    CACHES,
    COUNTED_HEADS,
    DEVICES,
    FEWEST_HEADS,
    FULL_ANYWHERE,
    HALVES,
    MODES,
    NEVER,
    ROWS,
    Cache,
    Device,
    break_even,
    decode,
    decoding,
    expand,
    pair,
    threshold,
    thresholds,
    upstream_decode,
    upstream_pair,
    weigh,
    with_heads,
)

FOLDER = OPERATORS / "latent_attention"
LAST = 1 << 17  # keys; the thresholds no longer change
CLASSES = {each.name: each for each in DEVICES}


def in_graph() -> list[tuple[int, ...]]:
    """The rows of the table CUDA in llama-latent-attn.cpp: keys, then each class's modes."""
    source = (FOLDER / "graph" / "llama-latent-attn.cpp").read_text()
    body = (
        source.split("static constexpr CudaThreshold CUDA[] = {")[1].split("};")[0].replace("INT64_MAX", "-1")
    )
    rows = [tuple(map(int, re.findall(r"-?\d+", line))) for line in body.strip().splitlines()]
    return rows


def test_the_graph_chooses_by_these_thresholds() -> None:
    wanted = [
        (last or -1, *(threshold(mode, centre, row) for centre in (True, False) for mode in MODES))
        for row, last in enumerate(ROWS)
    ]
    assert in_graph() == wanted


def test_fewer_heads_need_more_queries() -> None:
    source = (FOLDER / "graph" / "llama-latent-attn.cpp").read_text()
    named = (
        f"COUNTED_HEADS = {COUNTED_HEADS}, FEWEST_HEADS = {FEWEST_HEADS}, FULL_ANYWHERE = {FULL_ANYWHERE};"
    )
    assert named in source
    assert [with_heads(176, heads) for heads in (2, 16, 20, 32, 96)] == [176, 352, 281, 176, 176]
    assert (with_heads(1500, 16), with_heads(2064, 16)) == (2048, 2064), "2048 queries fill every device"


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_no_ubatch_is_slower_than_upstream(device: Device) -> None:
    """By the count, from each threshold on, for every number of keys that such a batch can have."""
    for mode in MODES:
        for row, last in enumerate(ROWS):
            first = threshold(mode, device.data_centre, row)
            for keys in range((ROWS[row - 1] or 0) + 16 if row else 16, (last or LAST) + 1, 16):
                if first > keys:
                    continue  # a sequence's keys include the batch
                ours = first * pair(mode, device) + expand(mode, device) + weigh(mode, device) / keys
                theirs = first * (upstream_pair(device) + 131072 / device.cublas / keys)
                assert ours <= theirs * 1.0001


def test_what_is_counted() -> None:
    """Against figures worked out by hand for two devices."""
    h200, rtx4090 = CLASSES["H200"], CLASSES["RTX 4090"]
    assert upstream_pair(h200) == 1.125 + 0.5  # both limited by shared memory
    assert upstream_pair(rtx4090) == 576 / 256 + 512 / 512  # both by tensor cores
    assert pair(HALVES, h200) == (192 + 128) / 16 * 512 / 256 / 128
    assert pair(HALVES, rtx4090) == 320 / 256
    assert expand(HALVES, h200) == (2048 + 2048 + 512) / 24
    assert break_even(HALVES, rtx4090, LAST) == pytest.approx(512 / (3.25 - 1.25), rel=0.01)
    assert break_even(MODES[0], rtx4090, LAST) > 1 << 17 or break_even(MODES[0], rtx4090, LAST) == NEVER


# Cache type -> data centre: rows and keys; GeForce.
LIMITS = {"Q8_0": ((32, 4096), (32, 12289)), "BF16": ((32, 4096), (0, 0)), "F32": ((32, 65536), (0, 0))}


def test_limits_of_the_absorbed_kernels() -> None:
    source = (FOLDER / "cuda" / "latent-ggml.cu").read_text()
    for text in (
        "return { 32, fast_sums ? 4096 : 12289 };",
        "fast_sums ? limit{ 32, 4096 } : limit{};",
        "limit{ 32, 65536 } : limit{};",
    ):
        assert source.count(text) == 1


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_no_absorbed_node_is_slower_than_upstream(cache: Cache, device: Device) -> None:
    rows, keys = LIMITS[cache.name][0 if device.data_centre else 1]
    for n_rows in range(1, rows + 1):
        for n_keys in (max(keys, 8192), 16384, 65536, 1 << 19):
            if n_keys >= keys:
                assert (
                    decode(cache, device, n_rows, n_keys)
                    <= upstream_decode(cache, device, n_rows, n_keys) * 1.05
                )


def test_the_readme_has_the_tables() -> None:
    readme = (FOLDER / "README.md").read_text()
    for table in (thresholds(), decoding()):
        assert "\n".join(table) in readme
