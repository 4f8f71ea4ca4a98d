"""Objects of the tests that are kept between runs: the same one for the same content, and no other."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from compiled import FOLDER, compile_once, forget

from kimi_gguf.engine.toolchain import find_compilers


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "kept"))
    return tmp_path / "kept"


def exit_status(tmp_path: Path, text: str, status: int, *options: str, checkout: str = "a") -> int:
    """Of the program that is compiled from two files in a folder."""
    folder = tmp_path / checkout
    folder.mkdir(exist_ok=True)
    (folder / "status.h").write_text(f"enum {{ STATUS = {status} }};\n")
    (folder / "main.c").write_text(f'#include "status.h"\nint main(void) {{ {text} }}\n')
    command = [find_compilers("cpu")["C"].path, *options, f"-I{folder}", str(folder / "main.c")]
    compile_once(command, folder / "main")
    return subprocess.run([folder / "main"], check=False).returncode


def test_equal_content_is_compiled_once_and_every_change_is_seen(tmp_path: Path, kept: Path) -> None:
    text = "return STATUS;"
    assert exit_status(tmp_path, text, 3) == 3
    assert exit_status(tmp_path, text, 3, checkout="b") == 3
    assert len(list(kept.iterdir())) == 1, "the other checkout's is the same"
    assert exit_status(tmp_path, text, 4) == 4, "a header has changed"
    assert exit_status(tmp_path, "return STATUS + MORE;", 4, "-DMORE=1") == 5
    assert exit_status(tmp_path, "return STATUS + MORE;", 4, "-DMORE=2") == 6, "a definition has changed"
    assert exit_status(tmp_path, text, 3, "-O1") == 3 and len(list(kept.iterdir())) == 5, (
        "an option is another"
    )


def test_what_does_not_compile_is_an_error_in_every_run(
    tmp_path: Path, kept: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            exit_status(tmp_path, "return 0;;; int unused;", 0, "-Wall", "-Werror")
        assert "unused" in capfd.readouterr().err
    assert not kept.exists()


def test_what_was_not_used_for_longest_is_removed(tmp_path: Path, kept: Path) -> None:
    for number, status in enumerate((1, 2, 3)):
        exit_status(tmp_path, "return STATUS;", status)
        newest = max(kept.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    exit_status(tmp_path, "return STATUS;", 1)  # used again
    size = newest.stat().st_size
    forget(kept, 2 * size)
    left = sorted(path.stat().st_mtime for path in kept.iterdir())
    assert len(left) == 2 and left[0] == 2 and left[1] > 3
