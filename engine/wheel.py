"""Packs a build as one installable file: the Python package llama_cpp with this build's libraries.

Input: a finished build. Output: a wheel with a local version, so that pip does not confuse it with the one on the
index.
"""

from __future__ import annotations

import base64
import hashlib
import re
import stat
import sysconfig
import zipfile
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

from kimi_gguf.engine.build_spec import VERIFY
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError

_NAME = "llama_cpp_python"
_DATE = datetime(2026, 1, 1, tzinfo=UTC)  # of every file in it, so that equal builds give equal wheels


def make_wheel(engine: Engine, folder: Path) -> Path:
    """Write the wheel of a build to `folder`, creating it if needed; return its path."""
    version = _local_version(engine)
    tag = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
    path = folder / f"{_NAME}-{version}-{tag}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    try:
        contents = _contents(engine, version, tag)
        write_zip(unfinished, contents, [name for name in contents if "/lib/" in name], _DATE)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _contents(engine: Engine, version: str, tag: str) -> dict[str, bytes]:
    """All files of the wheel by their name in it."""
    package, info = engine.folder / "python", f"{_NAME}-{version}.dist-info"
    metadata = (package / "PKG-INFO").read_text(encoding="utf-8")
    metadata = re.sub(r"(?m)^Version:.*", f"Version: {version}", metadata, count=1)
    wheel = f"Wheel-Version: 1.0\nGenerator: kimi-gguf\nRoot-Is-Purelib: false\nTag: {tag}\n"
    sources = [path for path in sorted((package / "llama_cpp").rglob("*")) if path.is_file()]
    files = {
        **{path.relative_to(package).as_posix(): path for path in sources if path.suffix != ".pyc"},
        **{f"llama_cpp/lib/{path.name}": path for path in [*_wanted_libraries(engine), *_verify(engine)]},
        f"{info}/licenses/LICENSE.md": package / "LICENSE.md",
        f"{info}/licenses/llama.cpp/LICENSE": engine.folder / "LICENSE",
        f"{info}/kimi-gguf.json": engine.folder / "manifest.json",
    }
    contents = {name: path.read_bytes() for name, path in files.items()}
    contents[f"{info}/METADATA"] = metadata.encode()
    contents[f"{info}/WHEEL"] = wheel.encode()
    listed = [record_line(name, content) for name, content in contents.items()]
    contents[f"{info}/RECORD"] = "".join([*listed, f"{info}/RECORD,,\n"]).encode()
    return contents


def _wanted_libraries(engine: Engine) -> list[Path]:
    """The libraries that llama_cpp loads and their dependencies, without those that only programs use."""
    wanted = ("libggml", "libllama.", "libmtmd")
    paths = sorted(path for path in engine.lib.iterdir() if path.name.startswith(wanted))
    links = [path.name for path in paths if path.is_symlink()]
    if links:
        raise EngineError(f"{engine.lib}: symbolic links cannot go into a wheel", found=", ".join(links))
    return paths


def _verify(engine: Engine) -> list[Path]:
    """The program that ggml starts to check the operators on a GPU; upstream's builds have none."""
    return [path for path in (engine.bin / VERIFY,) if path.exists()]


def _local_version(engine: Engine) -> str:
    """The package's version, with the hash of the series or `upstream` after it."""
    upstream = str(engine.manifest["package"]).split("==")[1]
    series = str(engine.manifest["series_sha256"])[:8]
    return f"{upstream}+upstream" if engine.is_upstream else f"{upstream}+kimi.{series}"


def record_hash(content: bytes) -> str:
    """SHA-256 as a wheel's RECORD writes it: base64 with the URL's alphabet, without padding (PEP 376, PEP 427)."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def record_line(name: str, content: bytes) -> str:
    """The line of a file in a wheel's RECORD."""
    return f"{name},sha256={record_hash(content)},{len(content)}\n"


def write_zip(path: Path, files: Mapping[str, bytes], programs: Collection[str], date: datetime) -> None:
    """Write a zip archive of `files`, of which `programs` may be executed, all of one date."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, date.timetuple()[:6])
            entry.compress_type = zipfile.ZIP_DEFLATED
            mode = 0o755 if name in programs else 0o644
            entry.external_attr = (stat.S_IFREG | mode) << 16  # pip keeps the mode of regular files only
            archive.writestr(entry, content)
