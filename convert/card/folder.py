"""The folder of a model card: its GGUF models, and what is known about each.

Input: a folder of GGUF files, with an earlier card and with reports of validate-kimi if there are any. Output: `Listed`
for each model. A file is recognized by its SHA-256: a command in an earlier card, or a report, counts for a file only
while the file has the bytes that they are of. Card and reports may have any content.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from kimi_gguf.convert.card.text import (
    REPORTS,
    Basis,
    Figures,
    Listed,
    Made,
    file_row,
    made_in,
    merged_adapters,
    stem_of,
)
from kimi_gguf.convert.output.journal import stamp
from kimi_gguf.convert.source.origin import CARD
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.file_hash import FileHashes, hash_files
from kimi_gguf.engine.gguf import GgufModel
from kimi_gguf.engine.progress import Reporter
from kimi_gguf.engine.split_names import place_in_set

SOURCE_KEYS: Final = ("kimi_gguf.source.config_sha256", "kimi_gguf.source.headers_sha256")
HUB_KEYS: Final = (
    "general.source.huggingface.repository",
    "kimi_gguf.source.commit",
)  # of a checkpoint of the hub
_MOST_CARD: Final = 1 << 20  # bytes that are read of an earlier card
MOST_REPORT: Final = 1 << 28  # bytes of the largest report that is read
MOST_KLD: Final = 1e39  # nats; logits are float32, and a KLD is at most twice the largest
REPORT: Final = "report.json"  # in the folder of a report; it is written last
PAGES: Final = ("report.md", "report.html")  # next to it, for people


def models_in(folder: Path) -> list[Path]:
    """The GGUF models of a folder by name; of split models, the first splits. Left out are names that are not UTF-8,
    and links to other files of the folder."""
    found = sorted(path for path in folder.iterdir() if path.suffix == ".gguf" and path.is_file())
    return [
        path
        for path in found
        if (place_in_set(path) or (1, []))[0] == 1 and is_utf8(path.name) and not _is_second_name(path)
    ]


def is_utf8(text: str) -> bool:
    """Whether a file name or an argument can be written to a card; Python keeps other bytes as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _is_second_name(path: Path) -> bool:
    """Whether the path is a link to a file of the same folder; caches of a hub link to other folders."""
    return path.is_symlink() and path.resolve().parent == path.parent.resolve()


def earlier_card(folder: Path) -> str:
    """The card that will be overwritten, which may be any text; empty if there is none that can be read."""
    card = folder / CARD
    if not card.is_file():
        return ""
    try:
        with card.open("rb") as file:
            text = file.read(_MOST_CARD).decode("utf-8", "replace")
    except OSError:
        return ""
    checked_out = text.count("\r\n") == text.count("\n")  # with the line ends of Windows
    return text.replace("\r\n", "\n") if checked_out else text


def made_of(earlier: Iterable[Made], path: Path, hashes: Sequence[str]) -> Made | None:
    """How convert-kimi made the model `path`, if an earlier card says so of files with exactly its SHA-256; the files
    may have had another name, and the command gets today's."""
    made = next((made for made in earlier if made.files == tuple(hashes)), None)
    return made and made.named(path.name if len(hashes) == 1 else f"{stem_of(path)}.gguf")


def figures_of(folder: Path, path: Path, hashes: Sequence[str]) -> Figures | None:
    """The main figures of the report about the model `path`, if there is one about the same bytes (`hashes`: SHA-256 of
    each file)."""
    file = folder / REPORTS / stem_of(path) / REPORT
    try:
        if not file.is_file() or file.stat().st_size > MOST_REPORT:
            return None
        report = json.loads(file.read_text(encoding="utf-8"))
        gguf, kld = report["gguf"], report["runs"][0]["all"]["kld_mean"]
        if (
            gguf.get("files_sha256", [gguf["sha256"]]) != list(hashes)
            or type(kld) not in (int, float)
            or not 0 <= kld <= MOST_KLD
            or not has_pages(file, gguf["sha256"], report["created"])
        ):
            return None
        return Figures(float(kld), passed_of(report), basis_of(report))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None  # not a report


def has_pages(report: Path, sha256: str, created: str) -> bool:
    """Whether the pages next to a report.json are of the same run: both name its file's SHA-256 and its time. Raises
    `OSError`."""
    pages = [report.with_name(name) for name in PAGES]
    return all(
        page.is_file()
        and page.stat().st_size <= MOST_REPORT
        and all(text.encode() in page.read_bytes() for text in (sha256, created))
        for page in pages
    )


def passed_of(report: Mapping[str, Any]) -> bool:
    """The verdict of a report.json of any schema. Raises `ValueError` if it is not that of the gates, `LookupError` or
    `TypeError` for other data."""
    passed, gates = report["passed"], [gate["passed"] for gate in report["gates"]]
    if not gates or not all(isinstance(each, bool) for each in gates) or passed is not all(gates):
        raise ValueError(f"passed: expected the verdict of the gates {gates!r:.40}, found {passed!r:.40}")
    return all(gates)


def basis_of(report: Mapping[str, Any]) -> Basis:
    """The basis of a report.json of any schema. Raises `LookupError` or `TypeError` for other data."""
    basis = Basis(
        schema=report["schema"],
        ids_sha256=report["ids"]["sha256"],
        precision=report["reference"]["precision"],
        cache_type=report["options"]["cache_type"],
        checkpoint_sha256=tuple(file["sha256"] for file in report["checkpoint"]["files"]),
    )
    for text in (*basis.checkpoint_sha256, basis.schema, basis.ids_sha256, basis.precision, basis.cache_type):
        if not isinstance(text, str):
            raise TypeError(f"expected a text, found {text!r:.40}")
    return basis


def may_be_of(keys: Mapping[str, object], others: Mapping[str, object]) -> bool:
    """Whether the keys of two models name the same config, headers and merged adapters and, if both name one, the
    same commit. The weights may differ nevertheless."""
    same = all(key in keys and keys[key] == others.get(key) for key in SOURCE_KEYS)
    same = same and list(merged_adapters(keys)) == list(merged_adapters(others))
    return same and all(keys[key] == others[key] for key in HUB_KEYS if key in keys and key in others)


class Hashed:
    """The hashes of models' files; each file is read once, and again only after it was changed or replaced."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], FileHashes] = {}

    def hashes(self, files: Sequence[Path], reporter: Reporter) -> FileHashes:
        """Raises `OSError`."""
        stamps = tuple(map(stamp, files))
        if stamps not in self._known:
            reporter.phase(f"{files[0].name}: hashing")
            self._known[stamps] = hash_files(files, reporter.step)
        return self._known[stamps]


def others_of(
    folder: Path, new: Sequence[Path], keys: Mapping[str, object], reporter: Reporter, known: Hashed
) -> list[Listed]:
    """The models of the folder that may be of the same checkpoint, without those whose files are `new`.

    `keys`: of the new model. Reads and hashes those of their bytes that are not `known`. Other models, and files that
    are damaged, cannot be read or are removed meanwhile, are left out.
    """
    earlier, found = list(made_in(earlier_card(folder))), []
    for path in models_in(folder):
        try:
            if path in new:
                continue
            with GgufModel(path) as model:
                listed = Listed(path, dict(model.keys))
                if not may_be_of(listed.keys, keys):
                    continue
                files = [(file.path, file.size, file.tensors.values()) for file in model.files]
            hashes = known.hashes([file for file, _, _ in files], reporter)
        except (EngineError, OSError):
            continue
        parts = [
            file_row(file.name, size, tensors, sha256)
            for (file, size, tensors), sha256 in zip(files, hashes.each, strict=True)
        ]
        found.append(
            replace(
                listed,
                parts=parts,
                made=made_of(earlier, path, hashes.each),
                nbytes=sum(size for _, size, _ in files),
                figures=figures_of(folder, path, hashes.each),
            )
        )
    return found
