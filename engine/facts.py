"""Facts about the build and the machine, for reports.

Input: a build. Output: plain dictionaries of text and numbers, ready for JSON, without paths.
"""

from __future__ import annotations

import os
import platform
from typing import Any

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.toolchain import cpuinfo

Facts = dict[str, Any]


def engine_facts(engine: Engine) -> Facts:
    """The build: pin, commit, patches, compilers, backends."""
    shown = (
        "package", "commit", "llama_cpp_commit", "archive_sha256", "tree_sha256",
        "patches", "options", "compilers", "built",
    )  # fmt: skip
    return {
        "kind": "upstream" if engine.is_upstream else "patched",
        "backends": list(engine.backends),
        **{name: engine.manifest.get(name) for name in shown},
    }


def machine_facts() -> Facts:
    """Processor, cores, memory and system."""
    return {
        "processor": cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
