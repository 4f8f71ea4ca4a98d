"""Makes a build from a build spec: prepares the sources, runs CMake and Ninja, and installs the result.

Input: a `BuildSpec` and the cache's folders. Output: `engines/<key>/` with bin/, lib/, python/ and
manifest.json, complete or not at all.

The scratch folder `work/<key>/` (src/ and build/) is kept after a successful build, so that the upstream build and the
test programs compile only what differs; Ninja decides this by file times and commands. It is also kept when a build
reaches its time limit: the next build continues there. It is removed when a build fails or is interrupted; if a build
was killed, the next build removes it.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from kimi_gguf.engine import archive
from kimi_gguf.engine.build_spec import BACKENDS, CPU_BACKENDS, EMULATOR, LAYOUT, BuildSpec
from kimi_gguf.engine.compiling import compile_tree
from kimi_gguf.engine.errors import EngineError, UnfinishedError
from kimi_gguf.engine.progress import Reporter
from kimi_gguf.patches.pin import Pin
from kimi_gguf.patches.series import load_series
from kimi_gguf.patches.tree import Tree, expect_tree, tree_hash

NEEDED_SPACE = {
    "cpu": 1_000_000_000, "cpu-all": 2_000_000_000, "cuda": 4_000_000_000, "metal": 1_000_000_000,
    "vulkan": 2_000_000_000,
}  # fmt: skip
PACKAGE_FILES = ("PKG-INFO", "LICENSE.md")  # of the Python package, next to it in the archive
NOT_COMPILED = ("benches/", "docs/", "media/", "models/")  # large, and not needed in the scratch folder
_UNPACK_AGAIN = "remove the folder sources/ in the cache and build again"
_RECORD = (
    "restore patches/ and ggml_ops/ as they were published; if they were changed on purpose, record the tree "
    "they make now: tools/run patches record LLAMA_CPP"
)


class Cache:
    """The folders below the cache's root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.downloads = root / "downloads"  # checked archives
        self.sources = root / "sources"  # unpacked archives, as upstream published them
        self.work = root / "work"  # scratch folders; may be removed at any time
        self.engines = root / "engines"  # finished builds
        self.logs = root / "logs"  # of builds that failed


@contextmanager
def build_lock(cache: Cache, reporter: Reporter) -> Iterator[int]:
    """Allow one build at a time in a cache; yields the lock's file descriptor, which child processes inherit."""
    try:
        import fcntl
    except ImportError as error:
        raise EngineError(
            "building llama.cpp is not supported on this system",
            expected="Linux or macOS",
            found=sys.platform,
            todo="on Windows, use WSL",
        ) from error
    cache.root.mkdir(parents=True, exist_ok=True)
    with (cache.root / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.note(f"another build is running in {cache.root}; waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def pinned_source(pin: Pin, cache: Cache, given: Path | None, reporter: Reporter) -> Path:
    """The folder with the archive's llama.cpp/ and llama_cpp/, unpacked once and verified by hash."""
    folder = _source_folder(pin, cache)
    packed = (
        None if folder.is_dir() and given is None else archive.obtain(pin, cache.downloads, given, reporter)
    )
    if packed is None or folder.is_dir():
        return folder
    reporter.phase(f"unpack {pin.archive}")
    around = PurePosixPath(pin.python_folder).parent
    names = {pin.source_folder: "llama.cpp", pin.python_folder: "llama_cpp"}
    names |= {str(around / name): name for name in PACKAGE_FILES}
    _unpack_source(packed, names, folder, pin)
    return folder


def pack_source(pin: Pin, cache: Cache, packed: Path, reporter: Reporter) -> None:
    """Write the unpacked archive to `packed`, a tar.xz of a third of its size, for `adopt_source`."""
    source = pinned_source(pin, cache, None, reporter)
    reporter.phase(f"pack {pin.archive}")
    part = packed.with_name(f".{packed.name}")
    with tarfile.open(part, "w:xz") as tar:
        for name in ("llama.cpp", "llama_cpp", *PACKAGE_FILES):
            tar.add(source / name, name)
    part.replace(packed)


def adopt_source(pin: Pin, cache: Cache, packed: Path) -> None:
    """Unpack what `pack_source` wrote into the cache, verified by hash, unless the cache has the sources."""
    folder = _source_folder(pin, cache)
    if not folder.is_dir():
        if not packed.is_file():
            raise EngineError(
                f"{packed}: no such file", todo="write it on a machine with a network: bench-gpu --prepare"
            )
        names = ("llama.cpp", "llama_cpp", *PACKAGE_FILES)
        _unpack_source(packed, dict(zip(names, names, strict=True)), folder, pin)


def _source_folder(pin: Pin, cache: Cache) -> Path:
    return cache.sources / f"{pin.archive_sha256[:16]}-{LAYOUT}"


def _unpack_source(packed: Path, names: Mapping[str, str], folder: Path, pin: Pin) -> None:
    """names: by path inside the archive, the path below `folder`."""
    with fresh_folder(folder) as scratch:
        archive.unpack(packed, {inside: scratch / name for inside, name in names.items()})
        expect_tree(tree_hash(scratch / "llama.cpp"), pin.upstream_tree_sha256, str(packed), _UNPACK_AGAIN)


def build(
    spec: BuildSpec,
    cache: Cache,
    given: Path | None,
    tests: bool,
    reporter: Reporter,
    limit: float | None = None,
) -> Path:
    """Make the build of a build spec while holding the build lock. Returns its folder.

    limit: seconds of compiling, after which it raises `UnfinishedError`; what is compiled is kept.
    """
    folder = cache.engines / spec.key
    with _space_errors(cache.root), build_lock(cache, reporter) as lock:
        present = read_manifest(folder)
        if present is not None and (present["tests"] or not tests):
            return folder  # another process has built it in the meantime
        _sweep(cache)
        _require_space(cache.root, spec.backend)
        began = time.monotonic()
        source = pinned_source(spec.pin, cache, given, reporter)
        tree = _patched_tree(spec, source, reporter)
        digest = _verified(spec, tree, reporter)
        with _workspace(cache, spec) as work:
            compiled = tree.without(NOT_COMPILED)
            compiled.write_to(work / "src")
            expect_tree(tree_hash(work / "src"), compiled.hash(), str(work / "src"), "build again")
            log = work / "build.log"
            try:
                tests = tests or (present is not None and present["tests"])
                programs = compile_tree(spec, work, tests, lock, reporter, limit)
            except UnfinishedError:
                raise
            except EngineError as error:
                raise _with_log(error, log, cache, spec) from error
        reporter.phase("install")
        manifest = _manifest(spec, digest, programs, time.monotonic() - began)
        with fresh_folder(folder) as scratch:
            _install(work / "build" / "bin", source, scratch, programs)
            log.replace(scratch / "build.log")
            check_runs(scratch, dict(spec.options).get(EMULATOR, "").split(";"))
            (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return folder


# What other modules read from the manifest of a build.
_MANIFEST = {
    "key": str, "upstream": bool, "backends": list, "tests": bool, "package": str, "commit": str, "patches": list,
    "options": dict, "compilers": dict, "cpu": str, "built": str, "tree_sha256": str, "series_sha256": str,
}  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished build; None if there is none, or if it is damaged: the build is then made again."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8") if path.is_file() else "null")
    except (FileNotFoundError, ValueError):
        return None
    complete = isinstance(manifest, dict) and all(
        isinstance(manifest.get(key), kind) for key, kind in _MANIFEST.items()
    )
    if not complete or not isinstance(manifest.get("environment", {}), dict):  # earlier versions had none
        return None
    return manifest if manifest["backends"] and manifest["backends"][0] in BACKENDS else None


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that is renamed to `folder` if the block succeeds, and removed if it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    _remove(scratch, old)
    scratch.mkdir()
    try:
        yield scratch
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
    finally:
        _remove(scratch, old)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def check_runs(folder: Path, emulator: Sequence[str] = ()) -> str:
    """Run the build's own program once; return its version text. Raises `EngineError` with its output.

    emulator: the words of the command that runs programs of another architecture.
    """
    program = folder / "bin" / "llama-cli"
    command = [*filter(None, emulator), str(program), "--version"]
    if shutil.which(command[0]) is None:
        raise EngineError(
            f"{program} does not run", found=f"no program {command[0]}", todo="install it (Debian: qemu-user)"
        )
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise EngineError(
            f"{program} does not run",
            found=(result.stderr or result.stdout).strip() or f"exit status {result.returncode}",
            todo="install the missing library, or name its folder in LD_LIBRARY_PATH",
        )
    return (result.stdout + result.stderr).strip()


def _patched_tree(spec: BuildSpec, source: Path, reporter: Reporter) -> Tree:
    """The sources of a build spec with its series applied in memory."""
    tree = spec.source_tree or Tree(source / "llama.cpp")
    tree = tree.fork()
    if spec.upstream:
        held = 0 if spec.source is None else load_series().applied(tree)
        if held:
            raise EngineError(
                f"{spec.source} already has {held} of the patches, so no upstream build can be made from it",
                todo="give --source a checkout without patches",
            )
        return tree
    reporter.phase("apply the patches")
    spec.series.apply(tree)
    return tree


def _verified(spec: BuildSpec, tree: Tree, reporter: Reporter) -> str:
    """The tree's hash; for the pinned archive it must be the pinned one."""
    reporter.phase("verify the sources")
    digest = tree.hash()
    if spec.source is None and spec.upstream:
        expect_tree(digest, spec.pin.upstream_tree_sha256, "llama.cpp", _UNPACK_AGAIN)
    elif spec.source is None:
        expect_tree(digest, spec.pin.patched_tree_sha256, "llama.cpp with the patches", _RECORD)
    return digest


def _sweep(cache: Cache) -> None:
    """Remove the files of killed builds; the lock is held, so no other build uses them."""
    leftovers = [path for part in (cache.downloads, cache.sources, cache.engines) for path in part.glob(".*")]
    for work in cache.work.glob("*"):
        complete = work / "complete"
        if not complete.exists() or complete.read_text() != str(work):  # CMake's files hold absolute paths
            leftovers.append(work)
    _remove(*leftovers)


@contextmanager
def _workspace(cache: Cache, spec: BuildSpec) -> Iterator[Path]:
    """The scratch folder: kept if the block succeeds or reaches its time limit, else removed."""
    work = cache.work / spec.work_key
    complete = work / "complete"
    work.mkdir(parents=True, exist_ok=True)
    complete.unlink(missing_ok=True)
    try:
        yield work
    except UnfinishedError:
        complete.write_text(str(work))
        raise
    except BaseException:
        _remove(work)
        raise
    complete.write_text(str(work))


def _with_log(error: EngineError, log: Path, cache: Cache, spec: BuildSpec) -> EngineError:
    """The same error with the path of the log, which is moved out of the scratch folder."""
    if not log.exists():
        return error
    cache.logs.mkdir(parents=True, exist_ok=True)
    kept = cache.logs / f"{spec.key}.log"
    log.replace(kept)
    todo = f"{error.todo}; log: {kept}"
    return EngineError(error.what, expected=error.expected, found=error.found, todo=todo)


def _install(built: Path, source: Path, folder: Path, programs: dict[str, list[str]]) -> None:
    """Copy programs, libraries and the Python package into the folder of the finished build."""
    for name in ("bin", "lib", "python"):
        (folder / name).mkdir()
    for name in (*programs["programs"], *programs["tests"]):
        shutil.copy2(built / name, folder / "bin" / name)
    for path in sorted(built.glob("lib*")):
        if ".so" in path.name or path.suffix == ".dylib":
            shutil.copy2(path, folder / "lib" / path.name, follow_symlinks=False)
    shutil.copytree(source / "llama_cpp", folder / "python" / "llama_cpp")
    for name in PACKAGE_FILES:
        shutil.copyfile(source / name, folder / "python" / name)
    shutil.copyfile(source / "llama.cpp" / "LICENSE", folder / "LICENSE")


def _manifest(spec: BuildSpec, digest: str, programs: dict[str, list[str]], seconds: float) -> dict[str, Any]:
    return {
        "key": spec.key,
        "upstream": spec.upstream,
        "backends": [spec.backend] if spec.backend in CPU_BACKENDS else [spec.backend, "cpu"],
        "tests": bool(programs["tests"]),
        "package": f"{spec.pin.package}=={spec.pin.version}",
        "archive_sha256": spec.pin.archive_sha256,
        "source": None if spec.source is None else str(spec.source),
        "origin": spec.origin,
        "commit": spec.commit,
        "llama_cpp_commit": spec.pin.llama_cpp_commit if spec.source is None else None,
        "tree_sha256": digest,
        "series_sha256": spec.series.digest(),
        "patches": [{"name": patch.name, "subject": patch.subject} for patch in spec.series.patches],
        "options": dict(spec.options),
        "compilers": {
            language: f"{compiler.path}: {compiler.version}" for language, compiler in spec.compilers
        },
        "binutils": list(spec.binutils),
        "environment": dict(spec.variables),
        "cpu": spec.cpu,
        "programs": programs["programs"],
        "test_programs": programs["tests"],
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
    }


def _require_space(root: Path, backend: str) -> None:
    free = shutil.disk_usage(root).free
    if free < NEEDED_SPACE[backend]:
        raise EngineError(
            f"{root}: not enough space on disk to build",
            expected=f"{NEEDED_SPACE[backend] / 1e9:.1f} GB free",
            found=f"{free / 1e9:.1f} GB",
            todo="free some space, or set KIMI_GGUF_CACHE to a folder on another disk",
        )


@contextmanager
def _space_errors(root: Path) -> Iterator[None]:
    """Turn file system errors into an error that says what to do."""
    try:
        yield
    except BrokenPipeError:
        raise  # see scripts/commands.py
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise EngineError(
            f"{root}: " + ("the disk is full" if full else "the build's files cannot be read or written"),
            found=str(error),
            todo=("free some space" if full else "check the folder's permissions")
            + ", or set KIMI_GGUF_CACHE to another folder",
        ) from error
