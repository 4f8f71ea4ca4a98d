"""Builds a release: `scripts/release OUT`.

Input: the checkout's tracked files, and the pinned archive. Output in OUT: a wheel with the engine for all CPUs of this
machine's architecture, an sdist, the wheel's SBOM, and SHA256SUMS. Equal inputs give equal bytes: file times are that
of the commit, and nothing depends on the folder.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from kimi_gguf.engine.build_spec import PROGRAMS
from kimi_gguf.engine.builds import Engine, ensure, upstream_source
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.engine.version import VERSION
from kimi_gguf.engine.wheel import record_line, write_zip
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.patches.pin import load_pin
from kimi_gguf.scripts.sbom import notices, sbom

ROOT: Final = Path(__file__).resolve().parents[1]
ENGINE: Final = "kimi_gguf/engine/prebuilt"  # in the wheel; engine/builds.py looks for it there
# Without OpenMP: its runtime would have to be in the wheel, in addition to the one that torch brings.
DEFINES: Final = (("GGML_OPENMP", "OFF"), ("KIMI_PORTABLE", "ON"))
POLICY: Final = "manylinux_2_34"  # the oldest systems on which the wheel runs have glibc 2.34

EXAMPLES = """\
examples:
  scripts/release dist
  .venv/bin/python -m pip install dist/kimi_gguf-*.whl
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/release",
        description="Build the wheel with the engine, the sdist, the SBOM and the hashes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to; it is made if needed")
    parsed = parser.parse_args(arguments)
    try:
        with reporting() as reporter:
            paths = release(parsed.out, reporter)
    except (KimiError, OSError) as error:
        print(f"release: error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"{path.stat().st_size:>12,}  {path}")
    return 0


def release(out: Path, reporter: Reporter) -> list[Path]:
    """Write the release to `out`, and return its files. They appear together, when all are complete."""
    seconds = commit_time()
    engine = ensure(backend="cpu-all", defines=DEFINES)
    source = upstream_source()
    document = sbom(source, load_pin(), VERSION, "MIT")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as folder:
        place = Path(folder)
        reporter.phase("pack the sources")
        sdist = make_sdist(place, VERSION, seconds)
        reporter.phase("pack the wheel")
        pure = pure_wheel(sdist, place)
        wheel = make_wheel(pure, place, engine, notices(source, load_pin()), document, seconds)
        pure.unlink()
        check_policy(wheel)
        bill = place / f"kimi_gguf-{VERSION}.cdx.json"
        bill.write_bytes(document)
        files = [wheel, sdist, bill]
        sums = place / "SHA256SUMS"
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
        sums.write_text("".join(sorted(lines, key=lambda line: line.split()[1])))
        return [path.replace(out / path.name) for path in (*files, sums)]


def commit_time() -> int:
    """Seconds since 1970 of the last commit: the time of all files in the release. Raises `EngineError`."""
    if chosen := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(chosen)
    return int(git("log", "-1", "--format=%ct"))


def git(*words: str) -> str:
    """The output of a git command in the checkout."""
    ended = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise EngineError(
            "a release is built from a git checkout", found=ended.stderr.strip(), todo="clone the project"
        )
    return ended.stdout


def make_sdist(folder: Path, version: str, seconds: int) -> Path:
    """The tracked files with PKG-INFO, as pip expects them."""
    name = f"kimi_gguf-{version}"
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for file in sorted(git("ls-files", "-z").split("\0")):
            if file:
                entry = archive.gettarinfo(ROOT / file, f"{name}/{file}")
                _anonymous(entry, seconds)
                content = None if entry.issym() else io.BytesIO((ROOT / file).read_bytes())
                archive.addfile(entry, content)
        info = f"Metadata-Version: 2.1\nName: kimi-gguf\nVersion: {version}\n".encode()
        entry = tarfile.TarInfo(f"{name}/PKG-INFO")
        entry.size = len(info)
        _anonymous(entry, seconds)
        archive.addfile(entry, io.BytesIO(info))
    path = folder / f"{name}.tar.gz"
    with path.open("wb") as raw_file, gzip.GzipFile("", "wb", 9, raw_file, mtime=seconds) as packed:
        packed.write(raw.getvalue())
    return path


def _anonymous(entry: tarfile.TarInfo, seconds: int) -> None:
    """Leave out of a tar entry what differs between machines."""
    entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = seconds, 0, 0, "", ""
    entry.mode = 0o755 if entry.mode & 0o100 else 0o644


def pure_wheel(sdist: Path, folder: Path) -> Path:
    """The wheel that pip builds from the sdist: Python, patches and operators, without an engine."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder), str(sdist)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise EngineError(
            "pip cannot build the wheel", found=ended.stderr.strip()[-2000:], todo="see its output"
        )
    (path,) = folder.glob("*.whl")
    return path


def make_wheel(
    pure: Path, folder: Path, engine: Engine, texts: Mapping[str, bytes], document: bytes, seconds: int
) -> Path:
    """The pure wheel with the engine, the licences of what is in it, and the SBOM."""
    with zipfile.ZipFile(pure) as archive:
        files = {name: archive.read(name) for name in sorted(archive.namelist())}
    (info,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
    del files[f"{info}/RECORD"]
    tag = f"py3-none-{platform_tag()}"
    wheel = files[f"{info}/WHEEL"].decode()
    wheel = wheel.replace("Root-Is-Purelib: true", "Root-Is-Purelib: false").replace("py3-none-any", tag)
    files[f"{info}/WHEEL"] = wheel.encode()
    programs: set[str] = set()
    for path in sorted(engine.prefix.rglob("*")):
        name = path.relative_to(engine.prefix).as_posix()
        if path.is_file() and wanted(name):
            files[f"{ENGINE}/{name}"] = path.read_bytes()
            programs |= {f"{ENGINE}/{name}"} if name.startswith(("bin/", "lib/")) else set()
    files[f"{ENGINE}/manifest.json"] = _json(published_manifest(engine, seconds))
    files |= {f"{info}/licenses/{name}": text for name, text in texts.items()}
    files[f"{info}/sboms/kimi-gguf.cdx.json"] = document
    files = dict(sorted(files.items()))
    lines = [record_line(name, content) for name, content in files.items()]
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"]).encode()
    path = folder / pure.name.replace("py3-none-any", tag)
    write_zip(path, files, programs, datetime.fromtimestamp(seconds, UTC))
    return path


def wanted(name: str) -> bool:
    """Whether a file of the build is in the wheel: programs, libraries, llama_cpp; no tests, no logs."""
    if name.startswith("bin/"):
        return name.removeprefix("bin/") in PROGRAMS
    return (name.startswith(("lib/", "python/")) and not name.endswith(".pyc")) or name == "LICENSE"


def published_manifest(engine: Engine, seconds: int) -> dict[str, Any]:
    """The manifest of the build without what differs between equal builds."""
    own = {"seconds": None, "built": datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    compilers = {key: Path(text).name for key, text in engine.manifest["compilers"].items()}
    return {**engine.manifest, **own, "compilers": compilers, "tests": False, "test_programs": []}


def platform_tag() -> str:
    """The wheel's platform: manylinux on Linux, else as Python names it."""
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return machine.replace("linux", POLICY, 1) if sys.platform == "linux" else machine


def check_policy(wheel: Path) -> None:
    """On Linux, check that the wheel needs no newer system than its name says. Raises `EngineError`."""
    if sys.platform != "linux":
        return
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    said = " ".join((ended.stdout + ended.stderr).split())
    if f'consistent with the following platform tag: "{platform_tag()}"' not in said:
        raise EngineError(
            f"{wheel.name}: not a {POLICY} wheel",
            found=said[-2000:],
            todo="see which symbols are too new: python -m auditwheel show WHEEL",
        )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


if __name__ == "__main__":
    sys.exit(main())
