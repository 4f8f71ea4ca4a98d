"""One hash of several parts."""

from __future__ import annotations

import hashlib


def digest(*parts: bytes) -> str:
    """SHA-256 in hexadecimal of parts, each with its length, so that no two lists of parts hash alike."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()
