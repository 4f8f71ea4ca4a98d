"""llama-completion with native/small_memory.c preloaded, which tells it how much memory is available.

`complete` returns what the program printed: its log, and how it mapped the file.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from kimi_gguf.engine.builds import Engine

SHIM = "small_memory.c"  # of tests/native: the library for LD_PRELOAD


def machine(folder: Path, available: int) -> Path:
    """A folder in place of the root, with a /proc/meminfo that says how many bytes are available."""
    (folder / "proc").mkdir(parents=True, exist_ok=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available // 1024} kB\n")
    return folder


def complete(engine: Engine, model: Path, shim: Path, *options: str, **environment: str) -> str:
    """What the program prints while it continues a text by one token."""
    command = [engine.bin / "llama-completion", "--model", model, "--prompt", "the hat", "-n", "1"]
    ended = subprocess.run(
        [*command, "--no-conversation", "--threads", "1", *options],
        env={"LD_PRELOAD": str(shim), **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr
