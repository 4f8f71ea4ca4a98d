"""Shared by the tests of the bench: its command, sizes for a quick run, and a record."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

TINY = ("--shapes", "tiny", "--layers", "4", "--experts", "8", "--threads", "1", "--seconds", "0.05")


def command(*words: str) -> list[str]:
    """`kimi-llama bench` with these arguments."""
    return [sys.executable, "-m", "kimi_gguf.scripts.kimi_llama", "bench", *words]


def bench(*words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `kimi-llama bench`, which must exit with `status`."""
    ended = subprocess.run(command(*words), capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == status, ended.stderr
    return ended


def record(created: str, ratio: float, depth: int = 0) -> dict[str, Any]:
    """A record with one cell."""
    rates = {"threads": 2, "read": 4e10, "f32": 1e11, "int8": 3e11, "bf16": None}
    cell = {
        "cache_type": "f16", "ubatch": 512, "device": None,
        "sequences": 1, "threads": 2, "depth": depth, "batch": 1, "tokens": 1, "ratio": ratio,
        "upstream": {"way": "upstream", "tokens_per_second": 10.0, "spread": 0.01},
        "patched": {"tokens_per_second": 10.0 * ratio, "spread": 0.01},
        "floor": {"share": 0.5, "bound": "memory", "seconds": 0.05, "limits": rates}, "others": 0.0,
    }  # fmt: skip
    about: dict[str, Any] = {
        "load": {}, "contexts": {}, "fallbacks": {}, "left_out": {}, "not_measured": [], "resident": {},
        "peaks": [], "read": {},
    }  # fmt: skip
    engine = {
        "llama_cpp_commit": "0123456789", "package": "llama", "commit": "01234-ours",
        "compilers": {"C++": "c++: some compiler 1.0"},
    }  # fmt: skip
    return {
        "command": f"kimi-llama bench {created}", "created": created, "device": None, "checkout": None,
        "limits": [], "operators": [], "device_operators": [], "matmuls": [], "hybrid": None,
        "switch": "require", "engines": {"patched": engine, "upstream": engine}, "libraries": None,
        "machine": {"processor": "one", "cores": 2, "memory_gib": None, "system": "Linux 1"},
        "models": [{"name": "m", "bytes": 1, "cells": [cell], "about": about}],
    }  # fmt: skip
