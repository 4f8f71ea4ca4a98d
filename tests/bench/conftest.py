"""A cache folder for each test of the bench, which contains only the builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_gguf.bench import load
from kimi_gguf.engine.builds import cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test and of the commands that it runs; programs are compiled once for all tests."""
    own = tmp_path_factory.mktemp("cache")
    (cache_folder() / "bench" / "programs").mkdir(parents=True, exist_ok=True)
    (own / "bench").mkdir()
    for name in ("engines", "sources", "downloads", "bench/programs"):
        (own / name).symlink_to(cache_folder() / name)
    monkeypatch.setenv("KIMI_GGUF_CACHE", str(own))
    return own


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disturbed sample is not repeated: other tests run at the same time, and its figure is of no interest."""
    monkeypatch.setattr(load, "PATIENCE", 1)
