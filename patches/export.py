"""The series as mail, which `git am` accepts on a checkout of the pinned llama.cpp.

Input: the series, or its fixes alone. Output: one file per patch, including its sources, so that the checkout
is then exactly the tree that the engine builds.
"""

from __future__ import annotations

from pathlib import Path

from kimi_gguf.patches.diff import new_file
from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.series import Patch, Series

_AUTHOR = "kimi-gguf <kimi-gguf@localhost>"
_DATE = "Thu, 1 Jan 2026 00:00:00 +0000"  # for a patch without a date, so that equal series give equal files


def export_patches(series: Series, folder: Path) -> list[Path]:
    """Write the series to `folder`, creating it if needed; return the files in the order of application.

    Raises `PatchError` if the folder has other patches, which `git am *.patch` would also apply.
    """
    folder.mkdir(parents=True, exist_ok=True)
    strangers = {path.name for path in folder.glob("*.patch")} - {patch.name for patch in series.patches}
    if strangers:
        raise PatchError(
            f"{folder} holds other patches",
            expected="an empty or new folder",
            found=", ".join(sorted(strangers)),
            todo="remove them or name another folder",
        )
    for number, patch in enumerate(series.patches, 1):
        (folder / patch.name).write_bytes(as_mail(patch, number, len(series.patches)))
    return [folder / patch.name for patch in series.patches]


def as_mail(patch: Patch, number: int, total: int) -> bytes:
    """One patch in the form of `git format-patch`."""
    head = [
        f"From {'0' * 40} Mon Sep 17 00:00:00 2001",
        f"From: {patch.field('From') or _AUTHOR}",
        f"Date: {patch.field('Date') or _DATE}",
        f"Subject: [PATCH {number}/{total}] {patch.subject}",
        "MIME-Version: 1.0",
        "Content-Type: text/plain; charset=UTF-8",
        "Content-Transfer-Encoding: 8bit",
        "",
        _reason(patch.header),
        "---",
        "",
    ]
    brought = b"".join(new_file(overlay.dest, overlay.content) for overlay in patch.overlays)
    diffs = patch.text[len(patch.header.encode()) :]
    return "\n".join(head).encode() + brought + _without_signature(diffs) + b"-- \nkimi-gguf\n"


def _reason(header: str) -> str:
    """The text after the mail fields, without the diffstat that follows its `---`."""
    text = header.partition("\n\n")[2].partition("\n---\n")[0]
    return text.strip("\n") + "\n"


def _without_signature(diffs: bytes) -> bytes:
    """Remove the version line that git writes after the last diff."""
    return diffs.rsplit(b"\n-- \n", 1)[0] + b"\n" if b"\n-- \n" in diffs else diffs
