"""What is different on a Mac, with its answers to sysctl: processors, facts for a report, compilers, files."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shell_program import write_program

from kimi_gguf.convert.output.growing import Growing
from kimi_gguf.engine import toolchain
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.facts import machine_facts

SYSCTL = {"hw.perflevel0.physicalcpu": "12", "machdep.cpu.brand_string": "Apple M3 Max"}
F_FULLFSYNC = 51


@pytest.fixture(autouse=True)
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def answer(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[0] == "/usr/sbin/sysctl":
            return subprocess.CompletedProcess(command, 0, SYSCTL[command[2]] + "\n", "")
        return run(command, **options)

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(toolchain, "cpuinfo", lambda *_: "")
    monkeypatch.setattr("kimi_gguf.engine.facts.cpuinfo", lambda *_: "")


def test_only_the_fast_processors_compute() -> None:
    assert toolchain.cores() == 12


def test_facts_name_the_chip_and_the_version_of_macos() -> None:
    facts = machine_facts()
    assert facts["processor"] == "Apple M3 Max"
    assert facts["system"] == "macOS 15.1"


def test_a_compiler_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has /usr/bin/c++ without the tools, too; it only prints an error."""
    fails = "echo 'xcode-select: error: no developer tools were found' >&2; exit 1"
    compiler = write_program(tmp_path / "c++", fails)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(EngineError, match=r"xcode-select --install"):
        toolchain.find_compilers("cpu")


def test_a_file_is_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has no os.fdatasync there."""
    asked = []
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda _, command, *__: asked.append(command) or 0)
    growing = Growing(tmp_path / "file", 0)
    growing.write(np.frombuffer(b"bytes", np.uint8))
    growing.settle()
    assert asked.count(F_FULLFSYNC) == 1
    growing.complete()
    growing.close()
    assert asked.count(F_FULLFSYNC) == 2
    assert (tmp_path / "file").read_bytes() == b"bytes"
