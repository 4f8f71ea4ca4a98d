"""The files behind a model card: which models a folder has, their reports, and what is written.

Input: a folder of GGUF files, and a `Request` for each. Output: the reports that are missing, the plots, README.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kimi_gguf.convert.card.folder import (
    MOST_REPORT,
    REPORT,
    earlier_card,
    has_pages,
    made_of,
    models_in,
)
from kimi_gguf.convert.card.text import REPORTS, file_row, made_in, stem_of
from kimi_gguf.convert.output.journal import stamp
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.source.origin import CARD, LICENCE, licence_keys
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.file_kind import kind_of
from kimi_gguf.engine.folder_lock import folder_lock
from kimi_gguf.engine.progress import Reporter
from kimi_gguf.engine.split_names import place_in_set
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.validate import provenance
from kimi_gguf.validate.card import SIZE_PLOT, CardFile, card_text, draw_plots
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.pipeline import Request, Shared, ids_of, validate
from kimi_gguf.validate.plots import PLOTS
from kimi_gguf.validate.provenance import Facts
from kimi_gguf.validate.report import check_place, remove_scratch, write
from kimi_gguf.validate.sample_text import BUILT_IN
from kimi_gguf.validate.stored import Stored, read_report
from kimi_gguf.validate.tensors import open_gguf


def models_of(folder: Path) -> list[Path]:
    """The GGUF models of a folder; of split models, the first splits. Raises `ValidateError` if there is none.

    It also raises `ValidateError` for a split whose first split is missing.
    """
    if not folder.is_dir():
        found = kind_of(folder) if folder.exists() else "nothing"
        raise ValidateError(f"{folder}: expected a folder of GGUF files", found=found)
    others = other_kinds(folder)
    models = [path for path in models_in(folder) if path not in others]
    if not models:
        todo = f"convert the checkpoint first: convert-kimi CHECKPOINT -o {folder / 'NAME.gguf'} --type Q8_0"
        raise ValidateError(f"{folder}: expected GGUF files, found none", todo=todo)
    for path in sorted(folder.glob("*.gguf")):
        place = place_in_set(path)
        if place is not None and place[1][0] not in models:
            raise ValidateError(
                f"{path}: split {place[0]} of {len(place[1])}, but {place[1][0].name} is missing",
                todo="put all splits into the folder, or remove this one",
            )
    return models


def other_kinds(folder: Path) -> dict[Path, str]:
    """GGUF files of a folder that are no models, and what they are: "imatrix", "adapter", "mmproj". Damaged files are
    not among them."""
    kinds = {}
    for path in models_in(folder) if folder.is_dir() else ():
        with suppress(KimiError, OSError), open_gguf(path) as file:
            kinds[path] = str(file.keys.get("general.type", "model"))
    return {path: kind for path, kind in kinds.items() if kind != "model"}


def stamps_in(folder: Path) -> dict[str, str]:
    """Each GGUF file of a folder, by name, with what identifies its content (`journal.stamp`)."""
    return {path.name: stamp(path) for path in folder.glob("*.gguf")}


def check_unchanged(folder: Path, found: Mapping[str, str]) -> None:
    """Raise `ValidateError` if GGUF files of the folder were added, replaced or removed since `stamps_in`."""
    changed = sorted({name for name, _ in found.items() ^ stamps_in(folder).items()})
    if changed:
        raise ValidateError(
            f"{folder / changed[0]}: was added, replaced or removed meanwhile; no card was written",
            todo="run the command again: finished reports are kept",
        )


def check_card_place(folder: Path, models: Sequence[Path], overwrite: bool, checkpoint: Path) -> None:
    """Raise `ValidateError` if the card or a report cannot be written; nothing is left there."""
    card = folder / CARD
    if folder.resolve() == checkpoint.resolve():
        raise ValidateError(
            f"{card}: is a file of the checkpoint", todo="put the GGUF files into another folder"
        )
    if card.exists() and not (overwrite and card.is_file()):
        todo = "give --force to overwrite it" if card.is_file() else "remove it"
        raise ValidateError(f"{card}: already exists", todo=todo)
    stems = [stem_of(model) for model in models]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise ValidateError(f"{folder}: two models are named {min(twice)!r}", todo="rename one of them")
    plots = [f"{name}.png" for name in (SIZE_PLOT, *PLOTS)]
    for model, stem in zip(models, stems, strict=True):
        if stem in (".", "..") or stem.casefold() in plots:
            raise ValidateError(
                f"{model}: {REPORTS}/{stem} cannot be the folder of its report", todo="rename the file"
            )
        check_place(folder / REPORTS / stem)
    for plot in plots:
        if (folder / REPORTS / plot).is_dir():
            raise ValidateError(f"{folder / REPORTS / plot}", expected="a plot or nothing", found="a folder")


def card_files(
    requests: Sequence[Request], folder: Path, engine: Engine, upstream: Engine | None, reporter: Reporter
) -> list[CardFile]:
    """Every model with its report, which is made if there is none. Raises `ValidateError`."""
    shared, files, earlier = Shared(), [], list(made_in(earlier_card(folder)))
    with open_checkpoint(requests[0].checkpoint) as checkpoint:
        hashes = [file["sha256"] for file in shared.checkpoint_facts(checkpoint, reporter)["files"]]
        licence = licence_keys(checkpoint.folder)
    for request in requests:
        name, place = request.gguf.name, folder / REPORTS / stem_of(request.gguf)
        facts = shared.gguf_facts(request.gguf, reporter)
        ids, generated = ids_of(request, engine)
        ids_sha256 = provenance.ids_facts(ids, request.source, generated)["sha256"]
        report = _kept(place)
        wanted = request, facts, hashes, ids_sha256, upstream is not None
        if report is None or not _is_of(report, *wanted):
            reporter.phase(name)
            write(validate(request, engine, upstream, reporter, shared), place)
            report = read_report(place / REPORT)
        with open_gguf(request.gguf) as model:
            each = facts["files_sha256"]
            parts = [
                file_row(file.path.name, file.size, file.tensors.values(), sha256)
                for file, sha256 in zip(model.files, each, strict=True)
            ]
            made, elements = made_of(earlier, request.gguf, each), facts["elements_by_type"]
            keys = _licensed(model.keys, licence)
        source = _source(request)
        files.append(
            CardFile(request.gguf, keys, parts, made, elements=elements, report=report, source=source)
        )
    first = files[0]
    for other in files:
        if other.report.basis.ids_sha256 != first.report.basis.ids_sha256:
            raise ValidateError(
                f"{other.path}: expected the tokens of {first.path.name} for the same text, found others",
                todo="convert both files with the same tokenizer",
            )
    return files


def check_licences(models: Sequence[Path], checkpoint: Path) -> None:
    """Raise `ValidateError` if not all files have the same licence: a card names one."""
    known = licence_keys(checkpoint)
    first: tuple[Path, tuple[str, ...]] | None = None
    for path in models:
        with open_gguf(path) as model:
            keys = _licensed(model.keys, known)
        licence = tuple(str(keys.get(f"{LICENCE}{part}", "")) for part in ("", ".name", ".link"))
        if LICENCE not in keys:
            continue
        first = first or (path, licence)
        if licence != first[1]:
            expected, found = (f"{' '.join(each)!r:.90}" for each in (first[1], licence))
            raise ValidateError(
                f"{path}: licence",
                expected=f"{expected}, as {first[0].name} has",
                found=found,
                todo="convert them with the same README.md of the checkpoint, or put them into folders of their own",
            )


def _licensed(keys: Mapping[str, object], licence: Mapping[str, str]) -> dict[str, object]:
    """The keys of a file, with the checkpoint's licence if they have none."""
    return dict(keys) if LICENCE in keys else {**keys, **licence}


def _source(request: Request) -> tuple[str, ...]:
    """The option that gives the tokens, with the name of its file; none for the built-in text."""
    if request.source == BUILT_IN:
        return ()
    return ("--text" if request.ids is None else "--ids", request.source)


def _kept(place: Path) -> Stored | None:
    """The report of an earlier run in the folder `place`; None if it cannot be read, or if its pages are missing or of
    another run. A pipe would never end. Removes what a run that was killed left there."""
    path = place / REPORT
    try:
        if not path.is_file() or path.stat().st_size > MOST_REPORT:
            return None
        report = read_report(path)
        if not has_pages(path, report.sha256, report.created):
            return None
        with folder_lock(place, wait=True):
            remove_scratch(place)
    except (ValidateError, OSError):
        return None
    return report


def _is_of(
    report: Stored, request: Request, facts: Facts, checkpoint: list[str], ids_sha256: str, upstream: bool
) -> bool:
    """Whether the report is of the same bytes, checkpoint, tokens and options, and compares with upstream llama.cpp if
    this is wanted."""
    same = (
        (report.sha256, facts["sha256"]),
        (report.bytes, facts["bytes"]),
        (report.basis.checkpoint_sha256, tuple(checkpoint)),
        (report.basis.ids_sha256, ids_sha256),
        (report.basis.cache_type, request.options.cache_type),
        (report.basis.precision, str(request.dtype).removeprefix("torch.")),
    )
    return all(found == expected for found, expected in same) and (report.upstream or not upstream)


def write_card(files: Sequence[CardFile], folder: Path, notes: Sequence[str]) -> Path:
    """Write the plots, then the card; return its path."""
    plots = draw_plots(files)
    for name, image in plots.items():
        _atomically(folder / REPORTS / f"{name}.png", image)
    _atomically(folder / CARD, card_text(files, list(plots), notes).encode())
    return folder / CARD


def _atomically(file: Path, content: bytes) -> None:
    """Write a file of the card. The name of its part is fixed, so that none stays after a run that was killed."""
    part = file.with_name(f".{file.name}.unfinished")
    try:
        part.write_bytes(content)
        part.replace(file)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
