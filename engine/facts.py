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

# generation, family, models; the source is bsp_init_amd() in Linux's arch/x86/kernel/cpu/amd.c
_ZEN = (
    (1, 0x17, (range(0x00, 0x30), range(0x50, 0x60))),
    (2, 0x17, (range(0x30, 0x50), range(0x60, 0x80), range(0x90, 0x92), range(0xA0, 0xB0))),
    (3, 0x19, (range(0x00, 0x10), range(0x20, 0x60))),
    (4, 0x19, (range(0x10, 0x20), range(0x60, 0xB0))),
    (5, 0x1A, (range(0x00, 0x30), range(0x40, 0x50), range(0x60, 0x80))),
)


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
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": _system(),
        "python": platform.python_version(),
    }


def processor() -> str:
    """Its name. Virtual machines that call their processor just AMD EPYC get its generation: AMD EPYC (Zen 3)."""
    name = cpuinfo("model name") or sysctl("machdep.cpu.brand_string") or platform.machine()
    family, model = cpuinfo("cpu family"), cpuinfo("model")
    if name != "AMD EPYC" or not (family.isdigit() and model.isdigit()):
        return name
    for generation, its_family, models in _ZEN:
        if int(family) == its_family and any(int(model) in numbers for numbers in models):
            return f"{name} (Zen {generation})"
    return name


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
