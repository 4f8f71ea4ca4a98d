"""The documentation as a site: it builds without warnings and needs no other host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_gguf.tools import pictures

ROOT = Path(__file__).parents[2]


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout; a proxy that does not exist keeps it from the network."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    ended = build(ROOT, out)
    assert ended.returncode == 0, ended.stderr
    return out


def test_every_page_of_the_navigation_and_every_linked_source_is_there(site: Path) -> None:
    for page in (
        "",
        "docs/getting-started",
        "docs/faq",
        "ggml_ops/kda",
        "patches",
        "tests/ops/test_kda_operators.py",
    ):
        assert (site / page / "index.html").is_file(), page
    home = (site / "index.html").read_text()
    assert 'href="docs/claims/"' in home
    models = (site / "docs/models/index.html").read_text()
    assert 'tests/ops/test_kda_operators.py/"' in models
    source = (site / "tests/ops/test_kda_operators.py/index.html").read_text()
    assert "def test_" in re.sub("<[^>]*>", "", source)


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    elsewhere = r"""["']?(https?:|//)"""
    loads = re.compile(
        rf"<(script|img|iframe)[^>]+src={elsewhere}|<link[^>]+rel=.?(stylesheet|preconnect)[^>]+href={elsewhere}"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 100
    assert [str(page) for page in pages if loads.search(page.read_text())] == []


def test_the_claim_about_all_cells_is_the_verdict_of_its_page() -> None:
    """The page's is written by the bench, from the records."""
    part = (ROOT / "docs/bench.md").read_text().partition("\n## All cells\n\n")[2]
    pattern = r"(\d+) cells; .* in \d+, in (\d+) by more than the spread; it is slower by .* in none\."
    found = re.fullmatch(pattern, part.partition("\n")[0])
    assert found, "the claim says that no cell is slower"
    cells, faster = map(int, found.groups())
    claims = " ".join((ROOT / "docs/claims.md").read_text().split())
    assert (
        f"In {faster} of the {cells} cells of [the benchmark](bench.md#all-cells), patched is faster than upstream "
        "by more than the spread; it is slower in none."
    ) in claims


def test_the_bars_of_the_readme_are_those_of_the_bench_pages() -> None:
    assert pictures.SPEED.read_text() == pictures.speed(), "run: tools/run pictures --speed"


def test_the_readme_fits_on_a_screen() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 6 * 1024
