"""Builds a release: `tools/release OUT`.

Input: the checkout's tracked files, and the pinned archive. Output in OUT: a wheel with the engine for all CPUs of an
architecture, an sdist, the wheel's SBOM, and SHA256SUMS. Equal inputs give equal bytes: file times are that
of the commit, and nothing depends on the folder.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
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

from kimi_gguf.engine.build_spec import EMULATOR, MACHINE, PROGRAMS, SYSTEM
from kimi_gguf.engine.builds import Engine, ensure, upstream_source
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.interrupts import INTERRUPTED
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.engine.toolchain import VARIABLES, program_words
from kimi_gguf.engine.version import VERSION
from kimi_gguf.engine.wheel import record_line, write_zip
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.patches.pin import load_pin
from kimi_gguf.tools.sbom import notices, sbom

ROOT: Final = Path(__file__).resolve().parents[1]
ENGINE: Final = "kimi_gguf/engine/prebuilt"  # in the wheel; engine/builds.py looks for it there
# Without OpenMP: its runtime would have to be in the wheel, in addition to the one that torch brings.
DEFINES: Final = (("GGML_OPENMP", "OFF"), ("KIMI_PORTABLE", "ON"))
# The architectures to cross-compile for, with the first words of the names of Debian's tools for them.
CROSS: Final = {"aarch64": "aarch64-linux-gnu"}
TIMES: Final = range(315_532_800, 1 << 32)  # seconds since 1970: zip archives begin in 1980, gzip has 32 bits
POLICY: Final = "manylinux_2_34"  # the oldest systems on which the wheel runs have glibc 2.34

EXAMPLES = """\
examples:
  tools/release dist
  .venv/bin/python -m pip install dist/kimi_gguf-*.whl
  tools/release dist-arm --arch aarch64
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/release",
        description="Build the wheel with the engine, the sdist, the SBOM and the hashes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to; made if it does not exist")
    parser.add_argument(
        "--arch",
        choices=sorted(CROSS),
        help="cross-compile for Linux on this architecture, not for this machine. CC and CXX name the compilers "
        "(default: Debian's aarch64-linux-gnu-gcc and -g++); qemu-aarch64 checks that a program runs",
    )
    parsed = parser.parse_args(arguments)
    try:
        with reporting() as reporter:
            paths = release(parsed.out, reporter, parsed.arch)
    except (KimiError, OSError) as error:
        print(f"release: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    for path in paths:
        print(f"{path.stat().st_size:>12,}  {path}")
    return 0


def release(out: Path, reporter: Reporter, arch: str | None = None) -> list[Path]:
    """Write the release to `out`, and return its files. They appear together, when all are complete.

    SHA256SUMS has these files alone, whatever else is in `out`.
    arch: a key of CROSS, to cross-compile; by default the wheel is for this machine.
    Raises `EngineError` if the tracked files change before they are packed.
    """
    seconds, began = commit_time(), tracked()
    if changed := git("status", "--porcelain", "--untracked-files=no").splitlines():
        reporter.note(
            f"{len(changed)} files differ from the commit, so this will not be the commit's release"
        )
    forget_variables(reporter)
    engine = ensure(backend="cpu-all", defines=(*DEFINES, *(cross_compilation(arch) if arch else ())))
    source = upstream_source()
    document = sbom(source, load_pin(), VERSION, "MIT")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as folder:
        unfinished = Path(folder)
        reporter.phase("pack the sources")
        sdist = make_sdist(unfinished, VERSION, seconds)
        if tracked() != began:
            raise EngineError(
                f"{ROOT}: tracked files changed while the engine compiled, so the release would be of no commit",
                todo="run it again: what is compiled is kept",
            )
        reporter.phase("pack the wheel")
        pure = pure_wheel(sdist, unfinished)
        wheel = make_wheel(pure, unfinished, engine, notices(source, load_pin()), document, seconds)
        pure.unlink()
        check_policy(wheel, engine)
        bill = unfinished / f"kimi_gguf-{VERSION}.cdx.json"
        bill.write_bytes(document)
        files = [wheel, sdist, bill]
        sums = unfinished / "SHA256SUMS"
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
        sums.write_text("".join(sorted(lines, key=lambda line: line.split()[1])))
        return [path.replace(out / path.name) for path in (*files, sums)]


def forget_variables(reporter: Reporter) -> None:
    """Remove from the environment what changes a build: a release depends on the commit and the tools alone.

    Raises `EngineError` if CC or CXX has more than a compiler: without the other words it may be another program.
    """
    for name in ("CC", "CXX"):
        if len(program_words(name)) > 1:
            raise EngineError(
                f"{name}: a release is compiled without flags and launchers",
                expected="a compiler alone",
                found=os.environ[name],
                todo=f"set {name} to the compiler, or unset it",
            )
    if variables := [name for name in VARIABLES[""] if os.environ.pop(name, "")]:
        reporter.note(f"not used for a release: {', '.join(variables)}")


def cross_compilation(arch: str) -> tuple[tuple[str, str], ...]:
    """CMake's settings to compile for Linux on `arch`. Sets CC and CXX, unless the environment has them."""
    tools = CROSS[arch]
    if shutil.which(tools + "-g++") is None and "CXX" not in os.environ:
        raise EngineError(
            f"no compiler for {arch}",
            expected=f"{tools}-gcc and {tools}-g++ on PATH, or CC and CXX in the environment",
            todo=f"install them (Debian: apt install g++-{tools} qemu-user)",
        )
    os.environ.setdefault("CC", f"{tools}-gcc")
    os.environ.setdefault("CXX", f"{tools}-g++")
    return ((SYSTEM, "Linux"), (MACHINE, arch), (EMULATOR, f"qemu-{arch};-L;/usr/{tools}"))


def commit_time() -> int:
    """The time of all files in the release, in seconds since 1970: that of the last commit, or SOURCE_DATE_EPOCH.

    Raises `EngineError` if the archives cannot have it.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct").strip()
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) not in TIMES:
        raise EngineError(
            "SOURCE_DATE_EPOCH, or the time of the commit, is not one that files in a release can have",
            expected=f"seconds since 1970, {TIMES.start} to {TIMES.stop - 1}",
            found=text,
            todo="set SOURCE_DATE_EPOCH to such a time, or unset it to use that of the commit",
        )
    return int(text)


def tracked() -> tuple[str, str]:
    """Identifies the content of all tracked files: the commit, and what differs from it."""
    return git("rev-parse", "HEAD"), git("diff", "HEAD", "--binary")


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
    command = [sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # pip's cache finds wheels by the path of their sdist, which may have changed
    command += ["--no-cache-dir", "--wheel-dir", str(folder), str(sdist)]
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
    tag = f"py3-none-{platform_tag(engine)}"
    wheel = files[f"{info}/WHEEL"].decode()
    wheel = wheel.replace("Root-Is-Purelib: true", "Root-Is-Purelib: false").replace("py3-none-any", tag)
    files[f"{info}/WHEEL"] = wheel.encode()
    programs: set[str] = set()
    for path in sorted(engine.folder.rglob("*")):
        name = path.relative_to(engine.folder).as_posix()
        if path.is_file() and wanted(name):
            files[f"{ENGINE}/{name}"] = path.read_bytes()
            programs |= {f"{ENGINE}/{name}"} if name.startswith(("bin/", "lib/")) else set()
    files[f"{ENGINE}/manifest.json"] = _json(published_manifest(engine, seconds))
    files |= {f"{info}/licenses/{name}": text for name, text in texts.items()}
    files[f"{info}/sboms/kimi-gguf.cdx.json"] = document
    # A file of the package's own folder: without one, pip removes the files below and leaves the folder. Not in src/,
    # where it would make an editable installation import src/kimi_gguf instead of what its links lead to.
    files["kimi_gguf/py.typed"] = b""
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
    """The manifest of the build without what differs between equal builds; the key is the hash of the rest."""
    built = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    compilers = {language: compiler_version(text) for language, text in engine.manifest["compilers"].items()}
    # Builds that are compiled later take the options of the installed one: they are not cross compilations.
    options = {**engine.manifest["options"]}
    for name in (SYSTEM, MACHINE, EMULATOR):
        options.pop(name, None)
    replaced = {"seconds": None, "built": built, "compilers": compilers, "options": options}
    published = {**engine.manifest, **replaced, "tests": False, "test_programs": []}
    del published["key"]  # that of the cache depends on the compilers' paths
    return {**published, "key": hashlib.sha256(_json(published)).hexdigest()[: len(engine.key)]}


def compiler_version(text: str) -> str:
    """The version in a manifest's `PATH: VERSION`. GCC begins it with the name that it was called by."""
    path, _, version = text.partition(": ")
    name = Path(path).name
    return f"GCC{version.removeprefix(name)}" if version.startswith(f"{name} (") else version


def platform_tag(engine: Engine) -> str:
    """The wheel's platform: manylinux and the build's architecture on Linux, else as Python names this machine."""
    if sys.platform == "linux":
        return f"{POLICY}_{engine.manifest['options'].get(MACHINE, platform.machine())}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def check_policy(wheel: Path, engine: Engine) -> None:
    """On Linux, check that the wheel needs no newer system than its name says. Raises `EngineError`."""
    if sys.platform != "linux":
        return
    command = [sys.executable, "-P", "-m", "auditwheel", "show", str(wheel)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    verdict = " ".join((ended.stdout + ended.stderr).split())
    if f'consistent with the following platform tag: "{platform_tag(engine)}"' not in verdict:
        raise EngineError(
            f"{wheel.name}: not a {POLICY} wheel",
            found=verdict[-2000:],
            todo="see which symbols are too new: python -m auditwheel show WHEEL",
        )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


if __name__ == "__main__":
    sys.exit(main())
