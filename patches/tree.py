"""A source tree as relative paths and bytes: listing, hashing, and edits that stay in memory until they are written.

Input: a folder. Output: its hash, or a `Tree` for trying patches without changing the folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from kimi_gguf.patches.errors import PatchError


def list_files(root: Path) -> list[str]:
    """Relative POSIX paths of all files under `root`, sorted; git's own folders and files are left out."""
    found: list[str] = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name != ".git"]
        base = Path(folder)
        for name in files:
            if name == ".git":
                continue
            path = base / name
            if path.is_symlink():
                raise PatchError(
                    f"{path}: is a symbolic link; the source tree must contain only regular files"
                )
            found.append(path.relative_to(root).as_posix())
    return sorted(found)


def hash_files(contents: Iterable[tuple[str, bytes]]) -> str:
    """sha256 in hex over each (relative path, NUL, sha256 of the content), in the order given."""
    total = hashlib.sha256()
    for path, content in contents:
        total.update(path.encode() + b"\0" + hashlib.sha256(content).digest())
    return total.hexdigest()


def tree_hash(root: Path) -> str:
    """The hash of a folder: `hash_files` over its files in sorted order."""
    return hash_files((path, (root / path).read_bytes()) for path in list_files(root))


def expect_tree(
    found: str, expected: str, what: str, todo: str, problem: str = "the source tree is not the pinned one"
) -> None:
    """Raise `PatchError` unless the two tree hashes are equal; `what` names the tree."""
    if found != expected:
        hashes = {"expected": f"tree hash {expected}", "found": f"tree hash {found}"}
        raise PatchError(f"{what}: {problem}", **hashes, todo=todo)


class Tree:
    """A folder with edits in memory; nothing is written until `write_to`."""

    def __init__(self, root: Path, files: Iterable[str] | None = None) -> None:
        self.root = root
        self._files = set(list_files(root) if files is None else files)
        self._edits: dict[str, bytes | None] = {}

    def fork(self) -> Tree:
        """A copy whose edits do not affect this one."""
        copy = Tree(self.root, self._files)
        copy._edits = dict(self._edits)
        return copy

    def read(self, path: str) -> bytes | None:
        """A file's bytes, or None if the tree has no such file."""
        if path in self._edits:
            return self._edits[path]
        return (self.root / path).read_bytes() if path in self._files else None

    def edit(self, path: str, content: bytes | None) -> None:
        """Set a file's bytes; None removes it."""
        self._edits[path] = content

    def paths(self) -> list[str]:
        """All paths of the tree including its edits, sorted."""
        gone = {path for path, content in self._edits.items() if content is None}
        return sorted((self._files | set(self._edits)) - gone)

    def changed(self) -> Mapping[str, bytes | None]:
        """The edits that differ from the folder: path to new bytes, or None for a removed file."""
        folder = Tree(self.root, self._files)
        return {path: new for path, new in self._edits.items() if new != folder.read(path)}

    def without(self, folders: tuple[str, ...]) -> Tree:
        """A copy without the files below these folders, each given with a slash at its end."""
        copy = self.fork()
        copy._files = {path for path in self._files if not path.startswith(folders)}
        copy._edits = {path: new for path, new in self._edits.items() if not path.startswith(folders)}
        return copy

    def hash(self) -> str:
        """`tree_hash` of the folder with the edits applied."""
        return hash_files((path, self._bytes(path)) for path in self.paths())

    def write_to(self, target: Path) -> list[str]:
        """Make `target` equal to this tree: write files that differ, remove files that this tree does not have.

        Equal files are not touched: they keep their modification times, so that a build in `target`
        compiles only what changed. Returns the paths written or removed.
        """
        wanted = self.paths()
        present = set(list_files(target)) if target.exists() else set()
        touched = sorted(present - set(wanted))
        for path in touched:
            (target / path).unlink()
        for path in wanted:
            content, place = self._bytes(path), target / path
            if path in present and place.read_bytes() == content:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            if os.access(self.root / path, os.X_OK):
                place.chmod(0o755)
            touched.append(path)
        return touched

    def _bytes(self, path: str) -> bytes:
        content = self.read(path)
        assert content is not None, path
        return content
