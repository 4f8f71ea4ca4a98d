"""`upstream.toml`: the llama.cpp that this project is built on, as one checked dataclass.

Input: the pin file. Output: `Pin`, read by everything that fetches, verifies or names upstream.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from kimi_gguf.patches.errors import PatchError

PIN_FILE = Path(__file__).with_name("upstream.toml")


@dataclass(frozen=True)
class Pin:
    """The upstream source and the hashes that verify it; hashes are sha256 in lower-case hex."""

    package: str  # name on the Python package index
    version: str
    archive: str  # file name of the source archive
    archive_sha256: str
    source_folder: str  # llama.cpp inside the archive
    python_folder: str  # the Python package inside the archive
    llama_cpp_commit: str
    ggml_version: str
    upstream_tree_sha256: str  # of llama.cpp as stored in the archive (see `tree.tree_hash`)
    patched_tree_sha256: str  # of the same tree with the whole series and all operator sources

    @property
    def short_commit(self) -> str:
        """The commit as upstream abbreviates it."""
        return self.llama_cpp_commit[:7]


def load_pin(path: Path = PIN_FILE) -> Pin:
    """Read the pin. Raises `PatchError` if a key is missing, unknown or not a string."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    names = {field.name for field in fields(Pin)}
    if set(table) != names or not all(isinstance(value, str) for value in table.values()):
        raise PatchError(
            f"{path}: wrong keys, or a value that is not a string",
            expected=", ".join(sorted(names)),
            found=", ".join(sorted(table)),
        )
    return Pin(**table)


def record_patched_tree(digest: str, path: Path = PIN_FILE) -> None:
    """Write `digest` as the patched tree's hash; all other lines are unchanged."""
    text = path.read_text(encoding="utf-8")
    text, count = re.subn(r'(?m)^(patched_tree_sha256 = ")[^"]*"', rf'\g<1>{digest}"', text)
    if count != 1:
        raise PatchError(f"{path}: no single line 'patched_tree_sha256 = ...' to write to")
    path.write_text(text, encoding="utf-8")
