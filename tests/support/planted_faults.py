"""Planted faults of the emulators: a program whose argument names one, and the message that it must print.

Input: the program, the fault's name, the source with the kernels. Output: nothing, or a failed assertion.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

# The kernel, the thread that causes the fault, the start of its line, a pattern of the message. None: not checked.
Expected = tuple[str | None, int | None, str | None, str]


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program and wait for it."""
    return subprocess.run(
        [program, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def line_of(source: Path, text: str) -> int:
    """The number of the first line that starts with the text."""
    lines = source.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip().startswith(text))


def assert_found(program: Path, fault: str, expected: Expected, source: Path, **environment: str) -> None:
    """The program ends with status 1, and with a message that contains all that is expected."""
    kernel, thread, line, words = expected
    ended = run(program, fault, **environment)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    message = ended.stdout
    assert re.search(words, message), message
    if kernel is not None:
        assert message.startswith(f"kernel {kernel}"), message
    if thread is not None:
        assert f"), thread ({thread},0,0): " in message
    if line is not None:
        assert f"{source.name}:{line_of(source, line)}: " in message
