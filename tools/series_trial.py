"""Tries the series on another llama.cpp: what applies, what conflicts and where, what upstream has already.

Input: a tree and the series. Output: a `Trial` for each patch. A patch that conflicts does not end the trial: its
hunks that fit are applied, and the next patch is tried on the result.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.patches import diff as unified
from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.pin import PIN_FILE, Pin
from kimi_gguf.patches.series import Patch, Series
from kimi_gguf.patches.tree import Tree

APPLIES = "applies"
CONFLICTS = "conflicts"
IN_UPSTREAM = "upstream has it"


@dataclass(frozen=True)
class Trial:
    """A patch on the tree."""

    patch: Patch
    verdict: str
    conflicts: tuple[str, ...] = ()  # FILE:LINE: reason

    def text(self) -> str:
        """One line, and one for each conflict."""
        return "\n    ".join([f"{self.patch.name}: {self.verdict}", *self.conflicts])


def try_series(tree: Tree, series: Series) -> list[Trial]:
    """Apply to the tree what fits of each patch, in order."""
    return [try_patch(tree, patch) for patch in series.patches]


def try_patch(tree: Tree, patch: Patch) -> Trial:
    """Apply to the tree what fits of a patch. A patch whose result is there already changes nothing."""
    try:
        patch.revert(tree.fork())
    except unified.PatchConflictError:
        pass
    else:
        return Trial(patch, IN_UPSTREAM)
    found = []
    for change in patch.diffs:
        content, conflicts = unified.apply_what_fits(tree, change)
        tree.edit(change.path, content)
        for conflict in conflicts:
            there = "upstream has this change already; " if conflict.is_there else ""
            where = f"{change.path}:{conflict.line}" if conflict.line else change.path
            found.append(f"{where}: {there}{conflict.reason}")
    for overlay in patch.overlays:
        if tree.read(overlay.dest) is not None:
            found.append(f"{overlay.dest}: {overlay.source} would replace a file of upstream")
        tree.edit(overlay.dest, overlay.content)
    return Trial(patch, CONFLICTS if found else APPLIES, tuple(found))


def folders_in(archive: Path) -> tuple[str, str]:
    """The folders of llama.cpp and of the Python package in a source archive of llama-cpp-python."""
    try:
        with tarfile.open(archive) as tar:
            names = set(tar.getnames())
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise PatchError(
            f"{archive}: not a source archive", found=str(error), todo="give a .tar.gz"
        ) from error
    sources = [name for name in names if re.fullmatch(r"[\w.+-]+/vendor/llama\.cpp/CMakeLists\.txt", name)]
    packages = [name for name in names if re.fullmatch(r"[\w.+-]+/llama_cpp/__init__\.py", name)]
    if len(sources) != 1 or len(packages) != 1:
        raise PatchError(
            f"{archive}: not a source archive of llama-cpp-python",
            expected="one vendor/llama.cpp/CMakeLists.txt and one llama_cpp/__init__.py",
            found=", ".join(sorted(sources + packages)) or "none",
        )
    return str(Path(sources[0]).parent), str(Path(packages[0]).parent)


def ggml_version(tree: Tree) -> str:
    """ggml's version in the tree."""
    text = (tree.read("ggml/CMakeLists.txt") or b"").decode()
    numbers = [re.search(rf"set\(GGML_VERSION_{part} (\d+)\)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    found = [number[1] for number in numbers if number]
    if len(found) != 3:
        raise PatchError(f"{tree.root}/ggml/CMakeLists.txt: no GGML_VERSION_MAJOR, _MINOR and _PATCH")
    return ".".join(found)


def write_pin(pin: Pin, path: Path = PIN_FILE) -> None:
    """Write the pin to the file; its comments are unchanged."""
    text = path.read_text(encoding="utf-8")
    for name, value in vars(pin).items():
        text, count = re.subn(rf'(?m)^({name} = ")[^"]*"', rf'\g<1>{value}"', text)
        if count != 1:
            raise PatchError(f"{path}: no single line '{name} = ...' to write to")
    path.write_text(text, encoding="utf-8")
