"""The source archive: no file is used before the hash is checked, and none is written outside its folder."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
import tiny_llama

from kimi_gguf.engine import archive
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import Silent


def flip_byte(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def listing(folder: Path) -> list[str]:
    """All files below a folder except the lock."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "lock")


def test_a_changed_byte_in_a_given_archive_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    tiny = tiny_llama.make(tmp_path)
    flip_byte(tiny.archive)
    with pytest.raises(EngineError, match="not the pinned source archive") as caught:
        tiny.build()
    assert tiny.pin.archive_sha256 in str(caught.value)
    assert listing(tiny.cache.root) == []


def test_a_changed_byte_in_the_cached_archive_is_refused(tmp_path: Path) -> None:
    tiny = tiny_llama.make(tmp_path)
    cached = archive.obtain(tiny.pin, tiny.cache.downloads, tiny.archive, Silent())
    flip_byte(cached)
    with pytest.raises(EngineError, match="not the pinned source archive") as caught:
        archive.obtain(tiny.pin, tiny.cache.downloads, None, Silent())
    assert caught.value.todo is not None
    assert str(cached) in caught.value.todo


def test_without_network_the_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    tiny = tiny_llama.make(tmp_path)
    with pytest.raises(EngineError, match=r"pip could not download tiny==1\.0") as caught:
        archive.obtain(tiny.pin, tiny.cache.downloads, None, Silent())
    assert "--archive" in str(caught.value)
    assert listing(tiny.cache.downloads) == []


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    """An archive member without content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "hostile",
    [
        member("tiny-1.0/llama.cpp/../../../escaped"),
        member("../escaped"),
        member("tiny-1.0/llama.cpp/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("tiny-1.0/llama.cpp/link", tarfile.LNKTYPE, "tiny-1.0/llama.cpp/CMakeLists.txt"),
        member("tiny-1.0/llama.cpp/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name}->{info.linkname}",
)
def test_a_hostile_archive_is_refused_before_anything_is_written(
    tmp_path: Path, hostile: tarfile.TarInfo
) -> None:
    path = tmp_path / "in" / "hostile.tar.gz"
    path.parent.mkdir()
    tiny_llama.pack(path, {"tiny-1.0/llama.cpp/CMakeLists.txt": "x"}, (hostile,))
    with pytest.raises(EngineError, match="refused") as caught:
        archive.unpack(path, {"tiny-1.0/llama.cpp": tmp_path / "out"})
    assert hostile.name in str(caught.value)
    assert listing(tmp_path) == ["in", "in/hostile.tar.gz"]


def test_unpacking_takes_the_wanted_folders_without_git_files(tmp_path: Path) -> None:
    path = tmp_path / "some.tar.gz"
    members = {"t/llama.cpp/a/b.txt": "b", "t/llama.cpp/.git": "gitdir: x", "t/other/c.txt": "c"}
    tiny_llama.pack(path, members)
    archive.unpack(path, {"t/llama.cpp": tmp_path / "out"})
    assert listing(tmp_path / "out") == ["a", "a/b.txt"]
    assert (tmp_path / "out/a/b.txt").read_text() == "b"


@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_a_damaged_archive_is_named(kind: str, tmp_path: Path) -> None:
    path, out = tmp_path / f"a.tar.{kind}", tmp_path / "out"
    content = tmp_path / "content"
    content.write_bytes(os.urandom(100_000))
    with tarfile.open(path, f"w:{kind}") as tar:
        tar.add(content, "t/llama.cpp/content")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], os.urandom(2000), b""):
        path.write_bytes(damaged)
        with pytest.raises(EngineError, match=f"{path}: damaged: .*; copy or download it again"):
            archive.unpack(path, {"t/llama.cpp": out})
