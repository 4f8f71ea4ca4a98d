"""The sizes in docs/gpu.md are those of the tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kimi_gguf.scripts import gpu_memory
from kimi_gguf.scripts.gpu_memory import CARDS, GIB, MIXES, on_the_cpu, sizes, table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_has_the_table_and_the_figures() -> None:
    page = (DOCS / "gpu.md").read_text()
    assert "\n".join(table()) in page
    found = sizes("kimi-q4")
    assert f"They take {found.rest / 1e9:.1f} of the {found.total / 1e9:.1f} GB" in page.replace("\n", " ")
    assert f"states: {gpu_memory.STATES / 2**20:.0f} MiB" in page
    assert f"F16 cache: {7 * gpu_memory.LATENT * 2 * gpu_memory.CONTEXT >> 20} MiB" in page


def test_the_sizes_are_those_of_the_conversion_page() -> None:
    """Which are those of whole files, in tenths of a GB."""
    rows = re.findall(r"`--recipe (kimi-q\d)`\*\* \| ([\d.]+) \|", (DOCS / "conversion.md").read_text())
    assert {name for name, _ in rows} >= set(MIXES)
    for name, gigabytes in rows:
        if name in MIXES:
            assert abs(float(gigabytes) - sizes(name).total / 1e9) < 0.15


@pytest.mark.parametrize("mix", MIXES)
def test_fewer_experts_on_the_cpu_would_not_fit(mix: str) -> None:
    found = sizes(mix)
    for card in CARDS:
        n = on_the_cpu(mix, card)
        used = found.rest + found.experts * (found.layers - max(0, n - 1))
        assert used + 2 * GIB < card * GIB
        if n:
            assert used + found.experts + 2 * GIB > card * GIB - found.experts * 2 // 3 - GIB // 2


def test_a_card_that_is_too_small_is_named() -> None:
    with pytest.raises(ValueError, match="kimi-q4 does not fit on a card of 2 GiB"):
        on_the_cpu("kimi-q4", 2)
