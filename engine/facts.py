"""Facts about the build and the machine, for reports.

Input: a build. Output: plain dictionaries of text and numbers, ready for JSON, without paths.
"""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.toolchain import cpuinfo, sysctl

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
        "processor": cpuinfo("model name") or sysctl("machdep.cpu.brand_string") or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": _system(),
        "python": platform.python_version(),
    }


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
