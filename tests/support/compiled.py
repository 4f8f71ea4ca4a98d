"""Objects and programs of the tests, compiled once for the same content: they are kept in a folder of the cache.

Input: a compiler's command. Output: the file that it makes, or a copy of the one that an equal command made from equal
sources before, in this run, in an earlier one or in another checkout. The file's name in the folder is a digest of the
compiler, the processor, the options and the sources after the preprocessor, so that nothing in the folder is ever
wrong and all of it may be removed. `forget` removes what was not used for the longest time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from kimi_gguf.engine.toolchain import cpu_fingerprint

FOLDER = "KIMI_TEST_OBJECTS"  # environment variable: the folder; if it is not set, nothing is kept
LIMIT = 1 << 30  # bytes in the folder after `forget`
# The folders of files in line markers and in __FILE__: temporary ones, and those of a checkout.
_PATHS = re.compile(rb'"/[^"\n]*/([^"/\n]+)"')


def compile_once(command: Sequence[str], target: Path) -> None:
    """Run a compiler's command, given without -o, to make `target`, or copy what an equal command made before.

    Paths of sources are absolute. Raises `CalledProcessError` with the compiler's messages, which are also printed.
    """
    kept = _place(command) if FOLDER in os.environ else None
    if kept:
        with suppress(FileNotFoundError):  # never made, or removed by another process
            shutil.copy(kept, target)
            os.utime(kept)
            return
    ended = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
    sys.stderr.write(ended.stderr)
    ended.check_returncode()
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        shutil.copy(target, unfinished)
        unfinished.replace(kept)


def environment_digest(compiler: str, folders: Sequence[Path] = ()) -> str:
    """Identifies a compiler, this processor, and all files in `folders`."""
    digest = hashlib.sha256(f"{_version(compiler)}\0{cpu_fingerprint()}".encode())
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def forget(folder: Path, limit: int = LIMIT) -> None:
    """Remove the files that were not used for the longest time, until the others have at most `limit` bytes."""
    files = []
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # another process removes files too
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    size = 0
    for _, length, path in sorted(files, reverse=True):
        size += length
        if size > limit:
            path.unlink(missing_ok=True)


def _place(command: Sequence[str]) -> Path | None:
    """The path of what a command makes; None if the preprocessor fails, as the compiler then does."""
    text = subprocess.run([*command, "-E"], capture_output=True, check=False)
    if text.returncode != 0:
        return None
    digest = hashlib.sha256(environment_digest(command[0]).encode())
    for word in _words(command[1:]):
        digest.update(word + b"\0")
    digest.update(_PATHS.sub(rb'"\1"', text.stdout))
    return Path(os.environ[FOLDER]) / digest.hexdigest()


def _words(options: Sequence[str]) -> Iterator[bytes]:
    """What of a command the preprocessor does not show: options, and the contents of objects and libraries."""
    rest = iter(options)
    for word in rest:
        if word in ("-isystem", "-include"):
            next(rest)
        elif word.endswith((".o", ".so")) and Path(word).is_file():
            yield Path(word).read_bytes()
        elif not word.startswith(("-I", "-D", "/")):
            yield word.encode()


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
