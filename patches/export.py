"""The series as mail, which `git am` accepts on a checkout of the pinned llama.cpp.

Input: the series, or its fixes alone. Output: one file per patch, including its sources, so that the checkout
is then exactly the tree that the engine builds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from kimi_gguf.patches.diff import new_file
from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.series import Patch, Series

_AUTHOR = "kimi-gguf <kimi-gguf@localhost>"
_DATE = "Thu, 1 Jan 2026 00:00:00 +0000"  # one date, so that equal series give equal files


def export_patches(series: Series, folder: Path) -> list[Path]:
    """Write the series to `folder`, a new or empty one; return the files in the order of application.

    The kind comes first in a name, so that the shell's order of `*.patch` is the order of application.
    """
    total = len(series.patches)
    mails = (
        (f"{patch.kind}-{patch.name}", as_mail(patch, number, total))
        for number, patch in enumerate(series.patches, 1)
    )
    return write_folder(folder, mails)


def write_folder(folder: Path, files: Iterable[tuple[str, bytes]]) -> list[Path]:
    """Write the files to `folder`, a new or empty one; return their paths in the order given.

    The folder gets its name when all files are in it. Raises `PatchError` if it has files already: `git am *.patch`
    would also apply other patches, and files of an earlier export may have been changed.
    """
    folder = folder.absolute()
    if (
        folder.is_symlink()
        or (folder.exists() and not folder.is_dir())
        or (folder.exists() and any(folder.iterdir()))
    ):
        raise PatchError(
            f"{folder}: exists already",
            expected="a new or empty folder",
            todo="name another folder, or remove it if it is an earlier export",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    names = []
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        scratch = Path(temporary, "files")
        scratch.mkdir()
        for name, content in files:
            (scratch / name).write_bytes(content)
            names.append(name)
        scratch.replace(folder)
    return [folder / name for name in names]


def as_mail(patch: Patch, number: int, total: int) -> bytes:
    """One patch in the form of `git format-patch`."""
    return mail(patch, f"[PATCH {number}/{total}] {patch.subject}", _reason(patch.header))


def mail(patch: Patch, subject: str, message: str, further: bytes = b"") -> bytes:
    """The changes of a patch, and further diffs, as a mail with this subject and message."""
    head = [
        f"From {'0' * 40} Mon Sep 17 00:00:00 2001",
        f"From: {_AUTHOR}",
        f"Date: {_DATE}",
        f"Subject: {subject}",
        "MIME-Version: 1.0",
        "Content-Type: text/plain; charset=UTF-8",
        "Content-Transfer-Encoding: 8bit",
        "",
        message,
        "---",
        "",
    ]
    brought = b"".join(new_file(overlay.dest, overlay.content) for overlay in patch.overlays)
    diffs = _without_signature(patch.text[len(patch.header.encode()) :])
    return "\n".join(head).encode() + brought + diffs + further + b"-- \nkimi-gguf\n"


def _reason(header: str) -> str:
    """The text after the mail fields, without the diffstat that follows its `---`."""
    text = header.partition("\n\n")[2].partition("\n---\n")[0]
    return text.strip("\n") + "\n"


def _without_signature(diffs: bytes) -> bytes:
    """Remove the version line that git writes after the last diff."""
    return diffs.rsplit(b"\n-- \n", 1)[0] + b"\n" if b"\n-- \n" in diffs else diffs
