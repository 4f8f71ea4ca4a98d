"""Tries the series on another release of llama-cpp-python, and writes the new pin if asked.

Input: a version, or its source archive. Output: a line for each patch, with file and line of each conflict; with
--tests also whether each fix with a test for upstream is still needed. The project changes only with --write.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kimi_gguf.engine.archive import file_sha256, unpack
from kimi_gguf.engine.interrupts import INTERRUPTED
from kimi_gguf.patches.errors import KimiError, PatchError
from kimi_gguf.patches.pin import PIN_FILE, Pin, load_pin
from kimi_gguf.patches.series import FIXES, Series, load_series
from kimi_gguf.patches.tree import Tree, expect_tree, tree_hash
from kimi_gguf.tools.pull_request import load_pull_requests
from kimi_gguf.tools.series_trial import (
    APPLIES,
    CONFLICTS,
    Trial,
    folders_in,
    ggml_version,
    try_series,
    write_pin,
)
from kimi_gguf.tools.upstream_tests import without_fix

EXAMPLES = """\
examples:
  tools/move-pin 0.3.37                          download, try the series, report; nothing in the project changes
  tools/move-pin 0.3.37 --tests                  also compile and run the tests of the fixes (up to an hour on 2 cores)
  tools/move-pin 0.3.37 --archive FILE           use a file instead of downloading
  tools/move-pin 0.3.37 --write --commit SHA     pin it: write patches/upstream.toml. SHA is the commit of the
                                                 submodule vendor/llama.cpp at tag v0.3.37 of llama-cpp-python

exit status: 0 if all patches apply; 1 if some do not, or upstream has some already; 2 for an invalid command line,
archive or version. docs/moving-to-a-new-llama.cpp.md says what to do next.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/move-pin",
        description="Try the patch series on another release of llama-cpp-python.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", help="of llama-cpp-python, such as 0.3.37")
    parser.add_argument("--archive", type=Path, help="its source archive (default: downloaded by pip)")
    parser.add_argument(
        "--work", type=Path, default=Path("out/move-pin"), help="scratch folder (default: %(default)s)"
    )
    parser.add_argument(
        "--tests", action="store_true", help="run the tests that show which fixes are still needed"
    )
    parser.add_argument(
        "--write", action="store_true", help="write the pin to patches/upstream.toml; needs --commit"
    )
    parser.add_argument("--commit", help="llama.cpp's commit, 40 hex digits")
    parsed = parser.parse_args(arguments)
    if not re.fullmatch(r"[0-9][0-9A-Za-z.]*", parsed.version):
        parser.error(f"{parsed.version}: expected a version such as 0.3.37")
    if parsed.write and not re.fullmatch(r"[0-9a-f]{40}", parsed.commit or ""):
        parser.error("--write needs --commit with 40 hex digits")
    try:
        work = parsed.work.absolute() / parsed.version
        archive = parsed.archive or download(load_pin().package, parsed.version, work)
        return move(
            parsed.version,
            archive,
            work,
            load_series(),
            parsed.tests,
            parsed.commit if parsed.write else None,
        )
    except KimiError as error:
        print(f"move-pin: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def move(
    version: str,
    archive: Path,
    work: Path,
    series: Series,
    tests: bool,
    commit: str | None,
    pin_file: Path = PIN_FILE,
) -> int:
    """Try the series on the archive's llama.cpp, unpacked into `work`; return the exit status."""
    source_folder, python_folder = folders_in(archive)
    name, _, found = Path(source_folder).parts[0].rpartition("-")
    if found != version:
        raise PatchError(
            f"{archive}: is of another version",
            expected=f"the folder {name}-{version}",
            found=f"{name}-{found}",
            todo="give the version and the archive that belong together",
        )
    digest = file_sha256(archive)
    source = unpacked(archive, source_folder, work / digest[:16])
    tree = Tree(source)
    trials = try_series(tree, series)
    print(f"{version}: {archive.name}, sha256 {digest}")
    for trial in trials:
        print(trial.text())
    verdicts = [trial.verdict for trial in trials]
    print(", ".join(f"{verdict}: {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts)))
    if tests:
        print_needed(trials, series, source, work / "tests")
    if commit is not None:
        pin = dataclasses.replace(
            load_pin(pin_file),
            version=version, archive=archive.name, archive_sha256=digest, source_folder=source_folder,
            python_folder=python_folder, llama_cpp_commit=commit, ggml_version=ggml_version(tree),
            upstream_tree_sha256=tree_hash(source),
        )  # fmt: skip
        write(pin, tree, CONFLICTS in verdicts, pin_file)
    return int(any(verdict != APPLIES for verdict in verdicts))


def unpacked(archive: Path, folder: str, target: Path) -> Path:
    """The archive's folder, written to `target`. Raises `PatchError` if other files are there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacked-") as scratch:
        whole = Path(scratch) / "source"
        unpack(archive, {folder: whole})
        if target.exists():
            todo = f"remove {target}; changes to llama.cpp belong into the patches"
            problem = f"its files are not those of {archive.name}"
            expect_tree(tree_hash(target), tree_hash(whole), str(target), todo, problem)
        else:
            whole.rename(target)
    return target


def print_needed(trials: list[Trial], series: Series, source: Path, work: Path) -> None:
    """Run the tests of the fixes on upstream without them."""
    trial = {each.patch.name: each for each in trials if each.patch.kind == FIXES}
    for request in load_pull_requests(series):
        if request.test is None:
            todo = f"no upstream test: remove the patch and run {request.patch.field('Test')}"
            print(f"{request.name}: {trial[request.patch.name].verdict}; {todo}")
            continue
        verdict, reason = without_fix(request, source, work)
        print(f"{request.name}: {verdict}" + (f" ({reason})" if reason else ""), flush=True)


def write(pin: Pin, tree: Tree, conflicts: bool, pin_file: Path) -> None:
    """Write the pin; the hash of the patched tree only if all patches apply."""
    if not conflicts:
        pin = dataclasses.replace(pin, patched_tree_sha256=tree.hash())
    write_pin(pin, pin_file)
    print(f"wrote {pin_file}")
    if conflicts:
        print(f"repair the patches, then run: tools/run patches record {tree.root}")


def download(package: str, version: str, folder: Path) -> Path:
    """The source archive of a version, downloaded by pip unless it is in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += [
        "--no-deps",
        "--no-binary",
        package,
        "--no-build-isolation",
        "--dest",
        str(folder),
        f"{package}=={version}",
    ]
    if not (present := sorted(folder.glob("*.tar.gz"))):
        environment = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        present = sorted(folder.glob("*.tar.gz"))
        if done.returncode != 0 or len(present) != 1:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise PatchError(
                f"pip could not download {package}=={version}",
                found="\n    ".join(said[-4:]),
                todo="check the version and the network, or give the archive with --archive FILE",
            )
    return present[0]


if __name__ == "__main__":
    sys.exit(main())
