"""The fixes as pull requests to llama.cpp: one commit each, with its test in upstream's tests/, and notes for the text.

Input: the series, and for each fix that has a test for upstream a file `fixes/NNNN-name.pr`:

    Target: the CMake target that compiles the test
    Run: the program, and its arguments; it runs in the root of the sources
    Fails: what the program prints without the fix, or the signal that ends it
    Shows: what the test does
    Measured: the effect in figures, or that it was not measured; optional, for fixes whose message has no figures

    a diff of upstream's tests/, on the pin and the fixes in `Needs:`, of files that exist: upstream takes no new ones
    without a maintainer's word

Title and message come from the header of the fix. Output: the files of a folder, for each fix a patch for `git am` and
notes for the description.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.patches import diff as unified
from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.export import mail
from kimi_gguf.patches.series import FIXES, PATCH_FOLDER, Patch, Series, header_field
from kimi_gguf.patches.tree import Tree

SUFFIX = ".pr"
_FIELDS = ("Target", "Run", "Fails", "Shows")
NO_TEST = "no upstream test yet"


@dataclass(frozen=True)
class UpstreamTest:
    """A test for upstream's tests/."""

    target: str
    run: str
    fails: str
    shows: str
    measured: str | None
    text: bytes  # the diffs
    diffs: tuple[unified.FileDiff, ...]

    @property
    def commands(self) -> str:
        """What compiles and runs it in a checkout of upstream."""
        lines = [f"cmake -B build && cmake --build build --target {self.target}", f"build/bin/{self.run}"]
        return "\n".join(f"    {line}" for line in lines)


@dataclass(frozen=True)
class PullRequest:
    """A fix, its test if it has one, and the pull requests that must precede it."""

    patch: Patch
    test: UpstreamTest | None
    needs: tuple[PullRequest, ...]  # in the order of application, with those that they need

    @property
    def name(self) -> str:
        """`NNNN-name`."""
        return self.patch.name.removesuffix(".patch")

    @property
    def title(self) -> str:
        """The subject in upstream's form, `module : what`."""
        return self.patch.subject.replace(": ", " : ", 1)

    @property
    def commit(self) -> bytes:
        """The commit as a mail."""
        return mail(
            self.patch,
            f"[PATCH] {self.title}",
            self.patch.reason + "\n",
            self.test.text if self.test else b"",
        )

    def apply(self, tree: Tree, fix: bool = True) -> None:
        """Apply what precedes it, its test and, if wanted, the fix. Raises `PatchConflictError`."""
        for each in (*self.needs, self):
            if fix or each is not self:
                each.patch.apply(tree)
            for change in each.test.diffs if each.test else ():
                unified.apply(tree, change)

    def notes(self) -> str:
        """What the text of the pull request must say."""
        parts = [
            f"# {self.title}",
            self.patch.reason,
            f"Effect without this change: {self.patch.field('Effect')}.",
        ]
        if self.test and self.test.measured:
            parts.append(f"Measured: {self.test.measured}")
        if self.needs:
            before = ", ".join(f"{each.name} ({each.title})" for each in self.needs)
            parts.append(f"Builds on: {before}.")
        parts.append("## Reproduction")
        if self.test is None:
            parts.append(f"There is {NO_TEST}. This project's test is {self.patch.field('Test')}.")
        else:
            parts += [
                self.test.shows,
                self.test.commands,
                f"Without the change to the sources, the test fails: `{self.test.fails}`.",
            ]
        return "\n\n".join(parts) + "\n"


def load_pull_requests(series: Series, folder: Path = PATCH_FOLDER / FIXES) -> list[PullRequest]:
    """A pull request for each fix. Raises `PatchError` for a test that belongs to no fix, or is malformed."""
    made: dict[str, PullRequest] = {}
    for patch in series.fixes().patches:
        path = folder / patch.name.replace(".patch", SUFFIX)
        test = load_test(path) if path.is_file() else None
        before = {each.name: each for name in patch.needs for each in (*made[name].needs, made[name])}
        made[patch.name.removesuffix(".patch")] = PullRequest(patch, test, tuple(before.values()))
    stray = [path.name for path in sorted(folder.glob(f"*{SUFFIX}")) if path.stem not in made]
    if stray:
        raise PatchError(
            f"{folder}: tests without a fix", found=", ".join(stray), todo="rename or remove them"
        )
    return list(made.values())


def load_test(path: Path) -> UpstreamTest:
    """Read the test of a pull request."""
    header, mark, rest = path.read_bytes().partition(b"diff --git ")
    head = header.decode()
    fields = {name: header_field(head, name) for name in _FIELDS}
    missing = [name for name, value in fields.items() if not value]
    text = mark + rest
    diffs = unified.parse(text, path.name)
    elsewhere = [each.path for each in diffs if each.creates or "tests" not in each.path.split("/")]
    if missing or not diffs or elsewhere:
        raise PatchError(
            f"{path}: not the test of a pull request",
            expected=f"the fields {', '.join(_FIELDS)} and a diff of files in tests/",
            found=f"no {', '.join(missing) or 'diff of tests/'}; changes of {', '.join(elsewhere) or 'nothing else'}",
        )
    target, run, fails, shows = (fields[name] or "" for name in _FIELDS)
    return UpstreamTest(target, run, fails, shows, header_field(head, "Measured"), text, diffs)


def folder_files(requests: list[PullRequest]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files that are written for the pull requests."""
    for request in requests:
        yield f"{request.name}.patch", request.commit
        yield f"{request.name}.notes.md", request.notes().encode()


def select(requests: list[PullRequest], numbers: list[str]) -> list[PullRequest]:
    """The pull requests with these numbers, such as 1 or 0001; all if there are none. Raises `PatchError`."""
    known = {int(request.name[:4]): request for request in requests}
    unknown = [number for number in numbers if not number.isdecimal() or int(number) not in known]
    if unknown:
        raise PatchError(
            f"no fix has the number {', '.join(unknown)}",
            expected=f"numbers from {min(known)} to {max(known)}",
        )
    return [known[int(number)] for number in numbers] or requests
