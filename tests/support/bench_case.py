"""What the tests of the bench share: a cache folder of their own beside the finished builds, and tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kimi_gguf.engine.builds import cache_folder

BUILT = ("engines", "sources", "downloads")  # parts of the cache that are made once for all tests


def own_cache(folder: Path) -> Path:
    """A cache folder in which builds are there already, and nothing of the bench."""
    cache = folder / "cache"
    cache.mkdir()
    for name in BUILT:
        (cache / name).symlink_to(cache_folder() / name)
    return cache


def environment(cache: Path) -> Mapping[str, str]:
    """For commands that are to use that cache."""
    return {**os.environ, "KIMI_GGUF_CACHE": str(cache)}


def command(*words: str) -> list[str]:
    """`kimi-llama bench` with these words."""
    return [sys.executable, "-m", "kimi_gguf.scripts.kimi_llama", "bench", *words]


def bench(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `kimi-llama bench`."""
    return subprocess.run(
        command(*words), env=environment(cache), capture_output=True, text=True, check=False, timeout=600
    )
