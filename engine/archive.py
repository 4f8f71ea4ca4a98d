"""The pinned source archive: found or downloaded, checked against its hash and unpacked safely.

Input: the pin and a cache folder. Output: the archive's path, or folders holding llama.cpp and the
Python package. No file of the archive is read or run before its sha256 is checked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath

from kimi_gguf.engine.errors import EngineError, install
from kimi_gguf.engine.progress import Reporter
from kimi_gguf.patches.pin import Pin


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, pin: Pin) -> None:
    """`EngineError` unless the file is the pinned archive, byte for byte."""
    if not path.is_file():
        raise EngineError(f"{path}: no such file", todo=f"give the path of {pin.archive}")
    sha256 = file_sha256(path)
    if sha256 != pin.archive_sha256:
        raise EngineError(
            f"{path}: not the pinned source archive",
            expected=f"sha256 {pin.archive_sha256}",
            found=f"sha256 {sha256}, {path.stat().st_size:,} bytes",
            todo=f"remove {path} and run the command again, which downloads it again",
        )


def obtain(pin: Pin, folder: Path, given: Path | None, reporter: Reporter) -> Path:
    """The checked archive in `folder`: copied from the user's file if given, else downloaded with pip if missing."""
    path = folder / pin.archive
    source = path if given is None else given
    if given is not None or path.exists():
        reporter.phase(f"check {source.name}")
        check(source, pin)
        if source.resolve() == path.resolve():
            return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        complete = Path(scratch) / pin.archive
        if given is None:
            reporter.phase(f"download {pin.archive}")
            _download(pin, complete)
            check(complete, pin)
        else:
            shutil.copyfile(given, complete)
        complete.replace(path)
    return path


def unpack(archive: Path, targets: dict[str, Path]) -> None:
    """Write the folders and files of the archive in `wanted` to their places, without git's own files.

    Only regular files are written, each below its place. An archive with an absolute path, a path with `..`, or a
    link or device in a wanted folder is refused before anything is written. Raises `EngineError`.
    """
    try:
        _unpack(archive, targets)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        reason = (str(error) or "it ends too early").splitlines()[0].rstrip(":")
        raise EngineError(f"{archive}: damaged: {reason}", todo="copy or download it again") from None


def _unpack(archive: Path, targets: dict[str, Path]) -> None:
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        plan = [(member, target) for member in members if (target := _target(member, targets, archive))]
        for member, target in plan:
            if member.isdir():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None, member.name
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file)
            if member.mode & 0o100:
                target.chmod(0o755)
    for prefix, target in targets.items():
        if not target.exists():
            raise EngineError(f"{archive}: no {prefix} inside", todo="check the pin in upstream.toml")


def _target(member: tarfile.TarInfo, targets: dict[str, Path], archive: Path) -> Path | None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise EngineError(
            f"{archive}: refused: it has a path that leads out of it",
            expected="relative paths only",
            found=member.name,
        )
    for prefix, target in targets.items():
        if not path.is_relative_to(prefix):
            continue
        if not member.isfile() and not member.isdir():
            raise EngineError(
                f"{archive}: refused: it has a link or device among the sources",
                expected="plain files and folders",
                found=f"{member.name} -> {member.linkname}" if member.linkname else member.name,
            )
        inner = path.relative_to(prefix)
        return None if ".git" in inner.parts else target / inner
    return None


def _download(pin: Pin, path: Path) -> None:
    """Let pip fetch the archive; pip itself checks the hash before it runs the archive's build backend."""
    for module, package in (("pip", "pip"), ("scikit_build_core", "scikit-build-core")):
        if importlib.util.find_spec(module) is None:
            raise EngineError(
                f"the Python package {package} is needed to download {pin.archive} and is not installed",
                found=f"Python at {sys.executable}",
                todo=f"{install(package)}, or give the archive with --archive {pin.archive}",
            )
    requirements = path.with_name("requirements.txt")
    requirements.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.archive_sha256}\n")
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", pin.package, "--no-build-isolation", "--dest", str(path.parent)]
    command += ["--requirement", str(requirements)]
    environment = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode != 0 or not path.exists():
        output = (result.stderr or result.stdout).strip()
        raise EngineError(
            f"pip could not download {pin.package}=={pin.version}",
            expected=f"{pin.archive}, sha256 {pin.archive_sha256}",
            found="\n    ".join(line.strip() for line in output.splitlines()[-6:]),
            todo=f"check the network and the space on disk, or give the archive with --archive {pin.archive}",
        )
