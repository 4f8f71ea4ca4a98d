"""The origin of a checkpoint: licence, hub id, base model, hashes.

Input: the checkpoint's folder. Output: `Origin`, for the `general.*` keys. The card (README.md) is untrusted text:
only plain values of a few keys of its front matter are used, and invalid content is not an error.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CARD: Final = "README.md"
_MAX_BYTES: Final = 1 << 16
_HUB_ID: Final = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
COMMIT: Final = re.compile(r"[0-9a-f]{40}", re.ASCII)
_LINE: Final = re.compile(r"(\w+):[ \t]*(.*)")
_ITEM: Final = re.compile(r"[ \t]*-[ \t]+(.*)")


@dataclass(frozen=True)
class Origin:
    """The origin; None for what is unknown."""

    repository: str | None  # the checkpoint's own id on the hub, ORG/NAME
    commit: str | None  # the revision of that repository
    base_model: str | None  # the id of its base model, according to its card
    license: str | None
    license_name: str | None  # of a licence without a standard identifier
    license_link: str | None
    config_sha256: str
    headers_sha256: str  # of the shards' headers: every tensor's name, type, shape and offsets


def read_origin(folder: Path, config: Path, headers_sha256: str) -> Origin:
    """The origin according to the folder and its card. Reads small files only."""
    card = _front_matter(folder / CARD)
    base = card.get("base_model", "")
    return Origin(
        hub_id(folder),
        _commit(folder),
        base if _HUB_ID.fullmatch(base) else None,
        card.get("license") or None,
        card.get("license_name") or None,
        card.get("license_link") or None,
        hashlib.sha256(config.read_bytes()).hexdigest(),
        headers_sha256,
    )


def hub_id(folder: Path) -> str | None:
    """ORG/NAME of a snapshot in a Hugging Face cache (`models--ORG--NAME/snapshots/...`)."""
    folder = folder.absolute()
    for parent in (folder, *folder.parents):
        parts = parent.name.split("--")
        if len(parts) == 3 and parts[0] == "models" and _HUB_ID.fullmatch("/".join(parts[1:])):
            return "/".join(parts[1:])
    return None


def _commit(folder: Path) -> str | None:
    """The commit of a snapshot in a Hugging Face cache (`models--ORG--NAME/snapshots/COMMIT`)."""
    folder = folder.absolute()
    found = folder.parent.name == "snapshots" and hub_id(folder) and COMMIT.fullmatch(folder.name)
    return folder.name if found else None


def model_name(folder: Path) -> str:
    """A name from a checkpoint's folder; in a Hugging Face cache (`models--ORG--NAME/...`), NAME."""
    found = hub_id(folder)
    return found.split("/")[1] if found else folder.absolute().name


def _front_matter(card: Path) -> Mapping[str, str]:
    """Plain `key: value` lines between two `---`; the first item of a list."""
    try:
        with card.open("rb") as file:
            text = file.read(_MAX_BYTES).decode("utf-8", "replace") if card.is_file() else ""
    except OSError:
        return {}
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, str] = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return found
        if match := _LINE.fullmatch(line):
            key = match[1]
            found.setdefault(key, _plain(match[2]))
        elif (match := _ITEM.fullmatch(line)) and not found.get(key):
            found[key] = _plain(match[1])
    return {}


def _plain(text: str) -> str:
    text = text.strip().strip("'\"")
    return text if text.isprintable() and len(text) <= 200 else ""
