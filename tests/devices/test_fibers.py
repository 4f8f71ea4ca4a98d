"""The emulators' fibers on this processor and on ARM, which qemu emulates."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulators.common import INCLUDE
from ggml_variant import require_tools
from native_program import NATIVE

from kimi_gguf.engine.toolchain import find_compilers

ARM = "aarch64-linux-gnu"
ARM_TOOLS = {f"{ARM}-g++": f"g++-{ARM}", "qemu-aarch64": "qemu-user"}
SOURCE = "emulator/fiber.h"
# Planted faults of the switch for ARM: a part of it, and what replaces it.
PAIRS = (
    "x19, x20",
    "x21, x22",
    "x23, x24",
    "x25, x26",
    "x27, x28",
    "x29, x30",
    "d8, d9",
    "d10, d11",
    "d12, d13",
    "d14, d15",
)
FAULTS = {
    **{f"{pair} not stored": (f"stp {pair}, [sp, #{16 * i}]", "nop") for i, pair in enumerate(PAIRS)},
    **{f"{pair} not loaded": (f"ldp {pair}, [sp, #{16 * i}]", "nop") for i, pair in enumerate(PAIRS)},
    "a stack that is not aligned": ("slot -= 20;", "slot -= 19;"),
    "no stack pointer stored": ("str x9, [x0]", "nop"),
    "another entry": ("slot[11] = ", "slot[10] = "),
}


def run(folder: Path, include: Path, arm: bool) -> subprocess.CompletedProcess[str]:
    """Compile the program with the header in `include` and run it."""
    compiler = f"{ARM}-g++" if arm else find_compilers("cpu")["C++"].path
    program = folder / "fibers"
    options = ["-std=c++17", "-O2", "-static", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Werror"]
    source = NATIVE / "emulator-fibers.cpp"
    subprocess.run([compiler, *options, f"-I{include}", source, "-o", program], check=True)
    command = ["qemu-aarch64", program] if arm else [program]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("arm", [False, True], ids=["here", "arm"])
def test_fibers_keep_their_values(arm: bool, tmp_path: Path) -> None:
    require_tools(ARM_TOOLS if arm else {})
    ended = run(tmp_path, INCLUDE, arm)
    assert (ended.returncode, ended.stdout) == (0, "6400 turns\n"), ended.stdout + ended.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    require_tools(ARM_TOOLS)
    right, wrong = FAULTS[fault]
    text = (INCLUDE / SOURCE).read_text()
    assert text.count(right) == 1
    header = tmp_path / SOURCE
    header.parent.mkdir()
    header.write_text(text.replace(right, wrong))
    assert run(tmp_path, tmp_path, arm=True).returncode != 0
