"""The series: the patches in order, the sources of each, and how they are applied to a tree.

Input: `fixes/` and `ops/` next to this file, with `NNNN-*.patch`, and the sources in ggml_ops. Output: `Series`, which
applies itself to a `Tree` (patches that are already applied are skipped) and knows its own digest.

The header of a patch lists the folders of ggml_ops with its sources in the line `Sources:`, and the earlier patches
that it needs, if any, in the line `Needs:`. The folder of a source determines its place in the llama.cpp tree:

    OP/ggml-*.h           ggml/include/
    OP/ggml-*.c, .cpp     ggml/src/kimi/
    OP/cpu/*              ggml/src/ggml-cpu/kimi/
    OP/cuda/*             ggml/src/ggml-cuda/kimi/
    OP/metal/*.metal      ggml/src/ggml-metal/kernels/
    OP/metal/*            ggml/src/ggml-metal/kimi/
    OP/graph/*            src/kimi/
    OP/program/*          ggml/src/kimi/program/       a program of its own
    OP/rpc/*              ggml/src/ggml-rpc/kimi/
    OP/server/*           tools/server/kimi/
    OP/tests/*            tests/kimi/
    llama/NAME/*          src/                        sources of a fix, independent of the operators

CMake compiles all sources in these folders that have the suffixes of the folder (SUFFIXES), so a new file needs no
further change. Sources elsewhere, or with other suffixes, are an error; `*-oracle.h` belongs to the tests. Two kinds
are listed by their patches: kernels for Metal, which ggml-metal finds in kernels/ only (METALLIB_KERNEL_SOURCES in
CMakeLists.txt, GGML_METAL_LIBS in ggml-metal-device.m), and the sources of a fix (src/CMakeLists.txt).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kimi_gguf.patches import diff as unified
from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.tree import Tree

PATCH_FOLDER = Path(__file__).resolve().parent
OVERLAY_FOLDER = PATCH_FOLDER.parent / "ggml_ops"
FIXES = "fixes"  # corrections of upstream: each needs only the pinned tree and the fixes that it names
OPS = "ops"  # call sites of the operators; changes to batches, memory, server, RPC; they need all fixes

PLACES = {
    "cpu": "ggml/src/ggml-cpu/kimi",
    "cuda": "ggml/src/ggml-cuda/kimi",
    "metal": "ggml/src/ggml-metal/kimi",
    "graph": "src/kimi",
    "program": "ggml/src/kimi/program",
    "rpc": "ggml/src/ggml-rpc/kimi",
    "server": "tools/server/kimi",
    "tests": "tests/kimi",
}
KERNELS = "ggml/src/ggml-metal/kernels"
HEADERS = (".h", ".cuh")
C = (".h", ".c", ".cpp")
SUFFIXES = {
    "cpu": C,
    "cuda": (".h", ".cuh", ".cu"),
    "metal": (".h", ".cpp", ".m", ".metal"),
    "graph": (".h", ".cpp"),
    "program": (".h", ".cpp"),
    "rpc": (".h",),  # sections of ggml-rpc.cpp and transport.cpp, which include them
    "server": (".h", ".cpp"),
    "tests": (".h", ".cpp"),
}
CODE = (
    *C,
    ".cuh",
    ".cu",
    ".m",
    ".metal",
    ".hpp",
    ".hh",
    ".cc",
    ".cxx",
    ".inc",
    ".s",
    ".mm",
    ".cl",
    ".comp",
    ".glsl",
)
ORACLE = "-oracle.h"


@dataclass(frozen=True)
class Overlay:
    """An operator source and its place in the llama.cpp tree."""

    source: PurePosixPath  # in ggml_ops
    dest: str
    content: bytes


@dataclass(frozen=True)
class Patch:
    """One capability: the call sites it changes and the files it adds."""

    name: str  # file name
    kind: str  # FIXES or OPS
    text: bytes  # header and diffs as stored in the file
    diffs: tuple[unified.FileDiff, ...]
    overlays: tuple[Overlay, ...]

    @property
    def header(self) -> str:
        """Everything before the first diff: subject, reason, upstream status, when it may be dropped."""
        return self.text.split(b"diff --git ", 1)[0].decode()

    @property
    def subject(self) -> str:
        """The one-line summary from the header, without a `[PATCH n/m]` mark."""
        joined = self.field("Subject") or self.name
        return joined.split("] ", 1)[1] if joined.startswith("[PATCH") else joined

    def field(self, name: str) -> str | None:
        """The value of a line `NAME: value` of the header, with its indented continuation lines."""
        return header_field(self.header, name)

    @property
    def reason(self) -> str:
        """The prose of the header: what is wrong and how it is corrected, without subject and fields."""
        text = self.header.partition("\n\n")[2].partition("\n---\n")[0]
        return re.split(r"(?m)^(?:Effect|Test|Needs|Sources|Upstream|Drop when):", text)[0].strip("\n")

    @property
    def needs(self) -> tuple[str, ...]:
        """The names, without `.patch`, of the earlier patches that the header names in `Needs:`."""
        return tuple(name.strip() for name in (self.field("Needs") or "").split(",") if name.strip())

    def apply(self, tree: Tree) -> None:
        """Apply to the tree. Raises `PatchConflictError` if the patch does not apply."""
        for overlay in self.overlays:
            if tree.read(overlay.dest) is not None:
                raise unified.PatchConflictError(f"{overlay.dest}: the file to be added exists already")
            tree.edit(overlay.dest, overlay.content)
        for change in self.diffs:
            unified.apply(tree, change)

    def revert(self, tree: Tree) -> None:
        """Revert the patch. Raises `PatchConflictError` if the tree does not have it."""
        for change in reversed(self.diffs):
            unified.apply(tree, change.reversed())
        for overlay in self.overlays:
            if tree.read(overlay.dest) != overlay.content:
                raise unified.PatchConflictError(f"{overlay.dest}: the added file is missing or altered")
            tree.edit(overlay.dest, None)


@dataclass(frozen=True)
class Series:
    """The patches in order."""

    patches: tuple[Patch, ...]

    def fixes(self) -> Series:
        """The corrections of upstream alone."""
        return Series(tuple(patch for patch in self.patches if patch.kind == FIXES))

    def digest(self) -> str:
        """sha256 in hex over patches, without their headers, and operator sources: equal digests mean equal trees."""
        total = hashlib.sha256()
        for patch in self.patches:
            parts = [patch.name.encode(), patch.text.removeprefix(patch.header.encode())]
            for overlay in patch.overlays:
                parts += [overlay.dest.encode(), overlay.content]
            for part in parts:
                total.update(hashlib.sha256(part).digest())
        return total.hexdigest()

    def applied(self, tree: Tree) -> int:
        """The number of patches, counted from the first, that the tree already has."""
        for count in range(len(self.patches), 0, -1):
            trial = tree.fork()
            try:
                for patch in reversed(self.patches[:count]):
                    patch.revert(trial)
            except unified.PatchConflictError:
                continue
            return count
        return 0

    def apply(self, tree: Tree) -> int:
        """Apply the patches that the tree does not have yet; return their number.

        `PatchError` names the patch, the file and the lines; the tree then has the patches before that one,
        in memory only: nothing is written to the folder.
        """
        done = self.applied(tree)
        for patch in self.patches[done:]:
            try:
                patch.apply(tree)
            except unified.PatchConflictError as conflict:
                raise PatchError(
                    f"{patch.name} does not apply to {tree.root}",
                    found=str(conflict),
                    todo="use the pinned llama.cpp revision (patches/upstream.toml), "
                    "or carry the patch over to this one",
                ) from conflict
        return len(self.patches) - done


def header_field(header: str, name: str) -> str | None:
    """The value of a line `NAME: value`, with its indented continuation lines; None if there is no such line."""
    match = re.search(rf"^{name}:(.*(?:\n .*)*)", header, re.MULTILINE)
    return match and " ".join(line.strip() for line in match[1].split("\n"))


def load_series(patch_folder: Path = PATCH_FOLDER, overlay_folder: Path = OVERLAY_FOLDER) -> Series:
    """Read the series, and check that every patch and every operator source belongs to it exactly once."""
    sources = _all_sources(overlay_folder)
    brought: dict[str, Overlay] = {}  # by place in the tree
    patches = []
    for kind in (FIXES, OPS):
        for path in sorted((patch_folder / kind).glob("[0-9][0-9][0-9][0-9]-*.patch")):
            text = path.read_bytes()
            header = text.split(b"diff --git ", 1)[0].decode()
            overlays = []
            for folder in (header_field(header, "Sources") or "").split():
                inside = [overlay for overlay in sources if overlay.source.parent == PurePosixPath(folder)]
                if not inside:
                    raise PatchError(f"{path.name}: the folder {folder} of ggml_ops holds no sources")
                for overlay in inside:
                    if other := brought.get(overlay.dest):
                        raise PatchError(
                            f"{path.name}: {overlay.source} and {other.source} would both be {overlay.dest}",
                            expected="each source brought by one patch, and one file name for each source of a kind",
                        )
                    brought[overlay.dest] = overlay
                overlays += inside
            diffs = unified.parse(text, path.name)
            if not diffs and not overlays:
                raise PatchError(f"{path}: the patch changes nothing")
            patches.append(Patch(path.name, kind, text, diffs, tuple(overlays)))
    unused = [str(overlay.source) for overlay in sources if brought.get(overlay.dest) is not overlay]
    if unused:
        raise PatchError(
            f"{overlay_folder} holds sources that no patch brings",
            found=", ".join(unused),
            todo="name their folder on the line 'Sources:' of a patch",
        )
    return Series(tuple(patches))


def destination(source: PurePosixPath) -> str | None:
    """The place in the llama.cpp tree of a file of ggml_ops, by the rule above; None if it is not copied there."""
    folder, name = source.parent, source.name
    if name.startswith("."):
        return None
    if folder.parts[:1] == ("llama",):
        return f"src/{name}" if len(folder.parts) == 2 and source.suffix in C else None
    if len(folder.parts) == 2 and source.suffix in SUFFIXES.get(folder.name, ()):
        return f"{KERNELS if source.suffix == '.metal' else PLACES[folder.name]}/{name}"
    if len(folder.parts) == 1 and name.startswith("ggml-") and source.suffix in C:
        return f"ggml/include/{name}" if source.suffix in HEADERS else f"ggml/src/kimi/{name}"
    return None


def _all_sources(root: Path) -> list[Overlay]:
    """All sources in ggml_ops that belong to a patch, sorted by path. Raises `PatchError` for any other source."""
    found = []
    for path in sorted(root.rglob("*")):
        source = PurePosixPath(path.relative_to(root).as_posix())
        dest = destination(source)
        if dest is not None and path.is_file():
            found.append(Overlay(source, dest, path.read_bytes()))
        elif path.suffix.lower() in CODE and not path.name.startswith(".") and not path.name.endswith(ORACLE):
            raise PatchError(
                f"{path}: a source that no rule copies to llama.cpp",
                expected="a folder and a suffix of the rule in patches/series.py",
                todo="move or rename it",
            )
    return found
