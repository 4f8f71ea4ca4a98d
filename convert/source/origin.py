"""The origin of a checkpoint: licence, hub id, base model, hashes.

Input: the checkpoint's folder. Output: `Origin`, for the `general.*` keys. The card (README.md) is untrusted text:
only short plain values of a few keys of its front matter are used, and invalid content is not an error.
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
_COMMENT: Final = re.compile(r"[ \t]#.*")
LICENCE: Final = "general.license"  # key of GGUF files
# Keys of a card's front matter: the key of GGUF files, and what is accepted: an identifier such as apache-2.0, a name,
# a URL or the name of a file.
_LICENCE: Final = {
    "license": (LICENCE, re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}", re.ASCII | re.IGNORECASE)),
    "license_name": (f"{LICENCE}.name", re.compile(r"\w[\w .,+()-]{0,95}", re.ASCII)),
    "license_link": (
        f"{LICENCE}.link",
        re.compile(r"https?://[\w.-]+(/[\w./~%+=&?#-]*)?|\w[\w.-]*", re.ASCII),
    ),
}


@dataclass(frozen=True)
class Origin:
    """The origin; None for what is unknown."""

    repository: str | None  # the checkpoint's own id on the hub, ORG/NAME
    commit: str | None  # the revision of that repository
    base_model: str | None  # the id of its base model, according to its card
    licence: Mapping[str, str]  # as `licence_keys` returns it
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
        _licence(card),
        hashlib.sha256(config.read_bytes()).hexdigest(),
        headers_sha256,
    )


def licence_keys(folder: Path) -> Mapping[str, str]:
    """The licence that the card of a folder names, as keys of GGUF files and their values; empty if it names none."""
    return _licence(_front_matter(folder / CARD))


def _licence(card: Mapping[str, str]) -> Mapping[str, str]:
    accepted = {
        key: card[name] for name, (key, form) in _LICENCE.items() if form.fullmatch(card.get(name, ""))
    }
    return accepted if LICENCE in accepted else {}


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
    if not card.is_file():  # opening a pipe would wait
        return {}
    try:
        with card.open("rb") as file:
            text = file.read(_MAX_BYTES).decode("utf-8-sig", "replace")
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
    """The text without quotes or a comment; empty if it is long or has control characters."""
    text = _COMMENT.sub("", text).strip().strip("'\"")
    return text if text.isprintable() and len(text) <= 200 else ""
