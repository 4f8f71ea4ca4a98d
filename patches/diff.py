"""Unified diffs, read and applied without other programs.

Input: the text of a patch and a `Tree`. Output: the edited tree, or an error that names the file, the
hunk, the line expected and the line found. Context must match exactly; a hunk may have moved to another
line, as `git apply` allows. Renames, mode changes and binary diffs are refused: the series has none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.tree import Tree

_HUNK = re.compile(rb"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_UNSUPPORTED = (b"rename ", b"copy ", b"old mode ", b"new mode ", b"GIT binary patch", b"Binary files ")


class PatchConflictError(Exception):
    """A hunk that does not apply; the message gives the details."""


@dataclass(frozen=True)
class Hunk:
    """One block of a diff: the lines it expects, with line ends, and the lines that replace them."""

    start: int  # line number in the old file, from 1; 0 for a file that does not exist
    new_start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]

    def reversed(self) -> Hunk:
        """The hunk that reverts this one."""
        return Hunk(self.new_start, self.start, self.new, self.old)


@dataclass(frozen=True)
class FileDiff:
    """All changes to one file."""

    path: str
    creates: bool
    deletes: bool
    hunks: tuple[Hunk, ...]

    def reversed(self) -> FileDiff:
        """The diff that reverts this one."""
        return FileDiff(self.path, self.deletes, self.creates, tuple(hunk.reversed() for hunk in self.hunks))


def split_lines(content: bytes) -> list[bytes]:
    """Lines with their ends; only a line feed ends a line, as for git."""
    return re.findall(rb"[^\n]*\n|[^\n]+", content)


def parse(text: bytes, name: str) -> tuple[FileDiff, ...]:
    """The diffs in the patch `name`, without mail header and signature. Raises `PatchError` on anything invalid."""
    lines = split_lines(text)
    starts = [i for i, line in enumerate(lines) if line.startswith(b"diff --git ")]
    borders = itertools.pairwise([*starts, len(lines)] if starts else [])
    diffs = [_parse_file(lines[begin:end], name) for begin, end in borders]
    twice = {diff.path for diff in diffs if sum(other.path == diff.path for other in diffs) > 1}
    if twice:
        raise PatchError(f"{name}: more than one diff for {', '.join(sorted(twice))}")
    return tuple(diffs)


def apply(tree: Tree, diff: FileDiff) -> None:
    """Apply one file's diff to the tree. Raises `PatchConflictError` if it does not apply."""
    content, conflicts = apply_what_fits(tree, diff)
    if conflicts:
        raise PatchConflictError(f"{diff.path}: {conflicts[0]}")
    tree.edit(diff.path, content)


@dataclass(frozen=True)
class Conflict:
    """A hunk that does not fit."""

    line: int  # in the file found, from 1; 0 if the conflict concerns the whole file
    reason: str
    is_there: bool = False  # the file has the lines that the hunk would write

    def __str__(self) -> str:
        return f"line {self.line} {self.reason}" if self.line else self.reason


def apply_what_fits(tree: Tree, diff: FileDiff) -> tuple[bytes | None, list[Conflict]]:
    """The file with the hunks of the diff that fit, and the others; the tree is not changed."""
    before = tree.read(diff.path)
    if diff.creates:
        if before is not None:
            same = tuple(split_lines(before)) == diff.hunks[0].new
            return before, [Conflict(0, "the file to be created exists already", same)]
        before = b""
    elif before is None:
        return None, [Conflict(0, "the file to be changed is not there", diff.deletes)]
    lines = split_lines(before)
    shift = 0  # how far earlier hunks moved the following lines
    conflicts = []
    for hunk in diff.hunks:
        wanted = max(hunk.start - 1, 0) + shift if hunk.old else hunk.start + shift
        place = _find(lines, hunk.old, wanted)
        if place is None:
            conflicts.append(_conflict(lines, hunk, wanted))
            continue
        lines[place : place + len(hunk.old)] = hunk.new
        shift = place - wanted + shift + len(hunk.new) - len(hunk.old)
    if diff.deletes and lines and not conflicts:
        conflicts.append(Conflict(0, "the file to be removed holds more lines than expected"))
    return None if diff.deletes and not conflicts else b"".join(lines), conflicts


def new_file(path: str, content: bytes) -> bytes:
    """The diff, as git writes it, that creates a file with this content."""
    lines = split_lines(content)
    if not lines or not lines[-1].endswith(b"\n"):
        raise PatchError(f"{path}: an operator source must have lines and end with a line end")
    head = f"diff --git a/{path} b/{path}\nnew file mode 100644\n--- /dev/null\n+++ b/{path}\n"
    return head.encode() + b"@@ -0,0 +1,%d @@\n" % len(lines) + b"".join(b"+" + line for line in lines)


def _parse_file(lines: list[bytes], name: str) -> FileDiff:
    head, rest = [], iter(lines)
    for line in rest:
        if line.startswith(_UNSUPPORTED):
            raise PatchError(
                f"{name}: {lines[0].decode(errors='replace').strip()}",
                expected="a plain change of text, a new file or a removed file",
                found=line.decode(errors="replace").strip(),
            )
        head.append(line)
        if line.startswith(b"+++ "):
            break
    old = [line[4:].split(b"\t")[0].strip() for line in head if line.startswith(b"--- ")]
    new = [line[4:].split(b"\t")[0].strip() for line in head if line.startswith(b"+++ ")]
    if len(old) != 1 or len(new) != 1:
        raise PatchError(f"{name}: {lines[0].decode(errors='replace').strip()} has no '---' and '+++' lines")
    creates, deletes = old == [b"/dev/null"], new == [b"/dev/null"]
    path = _checked_path((old if deletes else new)[0], name)
    if not creates and not deletes and _checked_path(old[0], name) != path:
        raise PatchError(f"{name}: {path} would be renamed; the series has no renames")
    hunks = tuple(_parse_hunks(rest, name, path))
    if not hunks:
        raise PatchError(f"{name}: no hunk for {path}")
    return FileDiff(path, creates, deletes, hunks)


def _parse_hunks(lines: Iterator[bytes], name: str, path: str) -> Iterator[Hunk]:
    pending: bytes | None = next(lines, None)
    while pending is not None and (match := _HUNK.match(pending)):
        start, old_count, new_start, new_count = (int(g) if g else 1 for g in match.groups())
        old: list[bytes] = []
        new: list[bytes] = []
        pending = next(lines, None)
        last: list[list[bytes]] = []
        while pending is not None:
            if pending.startswith(b"\\"):
                for side in last:
                    side[-1] = side[-1].removesuffix(b"\n")
            elif len(old) < old_count or len(new) < new_count:
                sides = {b" ": [old, new], b"-": [old], b"+": [new], b"\n": [old, new]}.get(pending[:1])
                if sides is None:
                    raise PatchError(f"{name}: {path}: a line inside a hunk starts with {pending[:1]!r}")
                for side in sides:
                    side.append(pending[1:] or b"\n")
                last = sides
            else:
                break
            pending = next(lines, None)
        if len(old) != old_count or len(new) != new_count:
            raise PatchError(
                f"{name}: {path}: the hunk at line {start} is cut short or miscounted",
                expected=f"{old_count} old and {new_count} new lines",
                found=f"{len(old)} and {len(new)}",
            )
        yield Hunk(start, new_start, tuple(old), tuple(new))


def _checked_path(raw: bytes, name: str) -> str:
    text = raw.decode(errors="replace")
    path = PurePosixPath(text[2:])
    if text[:2] not in ("a/", "b/") or path.is_absolute() or ".." in path.parts or not path.parts:
        raise PatchError(f"{name}: unfit path {text!r}", expected="a/... or b/... inside the tree")
    return str(path)


def _find(lines: list[bytes], old: tuple[bytes, ...], wanted: int) -> int | None:
    """The position nearest to `wanted` at which the lines `old` are found."""
    if not old:
        return wanted if wanted <= len(lines) else None
    last = len(lines) - len(old)
    for place in sorted(range(last + 1), key=lambda place: abs(place - wanted)):
        if lines[place] == old[0] and tuple(lines[place : place + len(old)]) == old:
            return place
    return None


def _conflict(lines: list[bytes], hunk: Hunk, wanted: int) -> Conflict:
    """What differs at the place where most lines of the hunk are found; of several, the one nearest to `wanted`."""

    def fitting(place: int) -> tuple[int, int]:
        found = lines[place : place + len(hunk.old)]
        same = sum(a == b for a, b in zip(found, hunk.old, strict=False) if a.strip())
        return -same, abs(place - wanted)

    is_there = _find(lines, hunk.new, wanted) is not None
    place = min(range(max(len(lines), wanted) + 1), key=fitting)
    for offset, expected in enumerate(hunk.old):
        at = place + offset
        found = lines[at] if at < len(lines) else b"(end of file)"
        if found != expected:
            reason = (
                f"should be {expected.decode(errors='replace').strip()!r}, "
                f"but it is {found.decode(errors='replace').strip()!r}, "
                "and the file has the lines around it nowhere else"
            )
            return Conflict(at + 1, reason, is_there)
    return Conflict(hunk.start, "starts a hunk that fits nowhere in the file", is_there)
