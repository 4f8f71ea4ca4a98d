"""doctor compares an installed package with the list that its wheel has of its files (RECORD)."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_gguf.engine import build, doctor
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.wheel import record_line

PACKAGES = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
COMMAND = "../../../bin/kimi-llama"  # as RECORD names it
RECORD = "kimi_gguf-1.dist-info/RECORD"
MANIFEST = "kimi_gguf/engine/prebuilt/manifest.json"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package with a module and a command."""
    return install(tmp_path / "prefix", PACKAGES, COMMAND, "bin", monkeypatch)


def install(prefix: Path, packages: str, command: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in `packages`, whose RECORD calls its command `command`; it is in `folder`."""
    site = prefix / packages
    contents = {"kimi_gguf/some.py": b"", command: b"#!python\n"}
    for path in (site / "kimi_gguf/some.py", prefix / folder / "kimi-llama", site / RECORD):
        path.parent.mkdir(parents=True, exist_ok=True)
    (site / "kimi_gguf/some.py").write_bytes(b"")
    (prefix / folder / "kimi-llama").write_bytes(b"#!python\n")
    (site / RECORD).with_name("METADATA").write_text("Metadata-Version: 2.1\nName: kimi-gguf\nVersion: 1\n")
    lines = [record_line(name, content) for name, content in contents.items()]
    (site / RECORD).write_text("".join([*lines, f"{RECORD},,\n"]))
    monkeypatch.setattr(doctor, "PREBUILT", (site / MANIFEST).parent)
    return site


def problem() -> str:
    """What doctor says about the files, which are not those of the wheel."""
    with pytest.raises(EngineError) as caught:
        doctor._unchanged_files()
    return str(caught.value)


@pytest.mark.parametrize(
    ("packages", "command", "folder"),
    [
        pytest.param(PACKAGES, COMMAND, "bin", id="environment, --user or --prefix"),
        pytest.param("target", "../../bin/kimi-llama", "target/bin", id="pip --target"),
        pytest.param("target", "bin/kimi-llama", "target/bin", id="other installers' --target"),
    ],
)
def test_commands_are_compared_wherever_they_are(
    packages: str, command: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "own", packages, command, folder, monkeypatch)
    assert doctor._unchanged_files() == "2 files as in the wheel"
    path = tmp_path / "own" / folder / "kimi-llama"
    path.write_bytes(b"other")
    assert "1 of 2 installed files were changed" in problem() and f"found {command};" in problem()
    path.unlink()
    assert f"found {command} (missing);" in problem()


@pytest.mark.parametrize("hostile", ["../../../other/kimi-llama", "kimi_gguf/../../../bin/x", "/bin/sh"])
def test_no_file_outside_of_the_installation_is_read(
    hostile: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (site / RECORD).open("a") as record:
        record.write(record_line(hostile, b""))
    read = list[Path]()
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
    assert re.search(rf"1 files in RECORD are outside .* not read.* found {hostile};", problem())
    assert read == [site / "kimi_gguf/some.py", site.parents[2] / "bin/kimi-llama"]


@pytest.mark.parametrize("text", [None, "no list\n"])
def test_a_missing_list_is_said(text: str | None, site: Path) -> None:
    (site / RECORD).unlink() if text is None else (site / RECORD).write_text(text)
    assert "RECORD in kimi_gguf-*.dist-info, is missing or damaged" in problem()


def test_a_list_without_hashes_is_no_proof(site: Path) -> None:
    """Installers write a hash for every file but the compiled ones and the list itself."""
    compiled = Path(importlib.util.cache_from_source(str(site / "kimi_gguf/some.py")))
    with (site / RECORD).open("a") as record:
        record.write(f"{compiled.relative_to(site)},,\n")
    assert doctor._unchanged_files() == "2 files as in the wheel"
    (site / RECORD).write_text(re.sub(r"(?m)^(\S*some.py),sha256=.*$", r"\1,,", (site / RECORD).read_text()))
    assert "found kimi_gguf/some.py (no hash in RECORD);" in problem()


def test_added_files_are_found(site: Path) -> None:
    """Python runs a .pyc without a source, also if RECORD lists it; ggml loads libraries of its folder."""
    package, libraries = site / "kimi_gguf", site / "kimi_gguf/engine/prebuilt/lib"
    libraries.mkdir(parents=True)
    for path in (package / "alone.pyc", package / "added.py", libraries / "libggml-cpu-added.so"):
        path.touch()
    assert problem().startswith("3 files in the package's folder are not from the wheel")
    with (site / RECORD).open("a") as record:
        record.write("kimi_gguf/alone.pyc,,\n")
    assert "found kimi_gguf/alone.pyc (no hash in RECORD);" in problem()


@pytest.mark.parametrize("level", [0, 2])
def test_a_compiled_file_that_is_not_of_its_source(level: int, site: Path) -> None:
    """Python would run it without a look at the source (PEP 552: unchecked), and with -O that of its own level.
    One of an older source is not used."""
    source, other = site / "kimi_gguf/some.py", site.parent / "other.py"
    other.write_text("print('of another')\n")
    cache = importlib.util.cache_from_source(str(source), optimization=level or "")
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), cache, doraise=True, optimize=level, invalidation_mode=unchecked)
    assert doctor._unchanged_files() == "2 files as in the wheel"
    py_compile.compile(str(other), cache, doraise=True, optimize=level, invalidation_mode=unchecked)
    assert "found kimi_gguf/some.py (its compiled file in __pycache__);" in problem()
    py_compile.compile(str(other), cache, doraise=True, optimize=level)
    assert doctor._unchanged_files() == "2 files as in the wheel"


@pytest.mark.parametrize(
    ("read", "name"),
    [(build.read_manifest, "manifest.json"), (doctor._record, RECORD)],
    ids=["manifest", "record"],
)
def test_no_command_waits_for_a_pipe_in_place_of_a_list(
    read: Callable[[Path], object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: pytest.fail(f"{path} was read"))
    assert not read(tmp_path)


def test_an_engine_whose_folder_was_removed_is_missed(site: Path) -> None:
    """A build in the cache does not make up for it: the wheel's files are still checked."""
    assert not doctor._has_engine(), "a wheel without an engine"
    with (site / RECORD).open("a") as record:
        record.write(record_line(MANIFEST, b"{}"))
    assert doctor._has_engine()
    assert f"found {MANIFEST} (missing);" in problem()
