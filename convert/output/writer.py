"""Writes GGUF v3 files as a stream; the files are renamed to their names when all are complete.

Input: a `Plan` and its encoded chunks in order. Output: the files, or an unfinished output that can be resumed (see
`unfinished`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.output.files import PlannedFile
from kimi_gguf.convert.output.gguf_header import aligned
from kimi_gguf.convert.output.unfinished import Identity, Layout, Unfinished, unfinished
from kimi_gguf.convert.plan import Plan
from kimi_gguf.convert.source.origin import CARD
from kimi_gguf.engine.file_hash import CHUNK, Digest
from kimi_gguf.engine.file_kind import kind_of
from kimi_gguf.engine.folder_lock import folder_lock
from kimi_gguf.engine.tensor_types import Bytes

Chunks = Iterator[tuple[PlannedTensor, Bytes]]
ProgressCallback = Callable[[PlannedTensor, int], None]  # a tensor, and how many of its bytes were written
Check = Callable[[PlannedTensor | None], None]
SmallFiles = Callable[[Sequence[str]], Sequence[tuple[str, bytes]]]
_SMALL: Final = 1 << 20  # bytes that are kept free for the small files


def write(
    plan: Plan,
    chunks: Callable[[Sequence[PlannedTensor]], Chunks],
    path: Path,
    overwrite: bool,
    identity: Identity,
    resume: bool,
    report: ProgressCallback,
    check: Check,
    small_files: SmallFiles | None = None,
) -> None:
    """Write the plan's files. Raises `ConvertError` if the disk is too small or fails, or if `check` raises it.

    chunks: returns the bytes of the given tensors, in order.
    check: called with each finished tensor, and with None at the end.
    small_files: from the SHA-256 of each file, the names and contents of small files to write to the same folder;
        called when the files are complete, by one process at a time for a folder, until the files are renamed. None:
        the files are not hashed.
    """
    hashes = [hashlib.sha256() for _ in plan.files] if small_files else []
    with ExitStack() as after, unfinished(path, _layout(plan, path), identity, resume, overwrite) as work:
        _check_space(path, work.missing + (_SMALL if small_files else 0))
        if small_files:
            _hash_kept(work, plan.files, hashes, report)
        else:
            for tensor in plan.tensors[: work.done]:
                report(tensor, tensor.nbytes)
        stream = chunks(plan.tensors[work.done :])
        first = 0
        for number, file in enumerate(plan.files):
            if work.done < first + len(file.tensors):
                _write_file(
                    work, number, file, first, stream, report, check, hashes[number] if hashes else None
                )
            first += len(file.tensors)
        check(None)
        if small_files:
            after.enter_context(folder_lock(path.parent, wait=True))
            for name, content in small_files([each.hexdigest() for each in hashes]):
                work.add(name, content)


def _hash_kept(
    work: Unfinished, files: Sequence[PlannedFile], hashes: Sequence[Digest], report: ProgressCallback
) -> None:
    """Hash the tensors that an earlier run wrote, and report them. Raises `ConvertError` if they were changed."""
    left = work.done
    for number, (file, digest) in enumerate(zip(files, hashes, strict=True)):
        kept = file.tensors[:left]
        left -= len(kept)
        if not kept:
            return
        with work.kept(number).open("rb") as stream:
            for tensor, offset in zip(kept, file.offsets[1:], strict=False):
                while size := min(len(file.header) + offset - stream.tell(), CHUNK):
                    if not (data := stream.read(size)):
                        raise OSError(f"{stream.name}: was truncated by another program")
                    digest.update(data)
                report(tensor, tensor.nbytes)
        if (noted := work.noted_hash(work.done - left)) and noted != digest.hexdigest():
            what = f"expected SHA-256 {noted} of what an earlier run wrote, found {digest.hexdigest()}"
            raise ConvertError(f"{work.kept(number)}: {what}; it is removed: start again, and check the disk")


def _layout(plan: Plan, output: Path) -> Layout:
    """Names and sizes of the files, and where each tensor begins: a file's first with its header."""
    places = [
        (number, len(file.header) + offset if offset else 0)
        for number, file in enumerate(plan.files)
        for offset in file.offsets[:-1]
    ]
    files = [(path.name, file.nbytes) for path, file in zip(plan.paths(output), plan.files, strict=True)]
    return Layout(tuple(files), (*places, (len(plan.files), 0)))


def _write_file(
    work: Unfinished,
    number: int,
    file: PlannedFile,
    first: int,
    stream: Chunks,
    report: ProgressCallback,
    check: Check,
    digest: Digest | None,
) -> None:
    """Write one file; `first` is the index of its first tensor in the plan. `digest` is updated with what is
    written."""
    head, skip = file.header, max(work.done - first, 0)
    work.begin(number)

    def append(data: Bytes) -> None:
        work.write(data)
        if digest is not None:
            digest.update(data)

    if work.at == 0:
        append(np.frombuffer(head, np.uint8))
    for i, (tensor, offset) in enumerate(zip(file.tensors, file.offsets, strict=False)):
        if i < skip:
            continue
        start = len(head) + offset
        while work.at < start + tensor.nbytes:
            found, chunk = next(stream)
            append(chunk)
            report(found, chunk.nbytes)
        if found is not tensor or work.at != start + tensor.nbytes:
            raise AssertionError(f"{tensor.name}: planned {tensor.nbytes} bytes, got {work.at - start}")
        append(np.zeros(aligned(tensor.nbytes) - tensor.nbytes, np.uint8))
        check(tensor)
        if tensor is not file.tensors[-1]:  # the last tensor is finished when its file is complete
            work.finished(first + i + 1, digest)
    work.end(first + len(file.tensors), digest)


# What to do about an output path that is a file of the checkpoint, no file, or there already. A card has its own name.
_REMEDIES = (
    "choose another name for the output",
    "choose another name",
    "remove it, choose another name, or use --force",
)
_REMEDIES_OF_CARD = (
    "write to another folder, or omit --model-card",
    "remove it, or omit --model-card",
    "--force replaces it and keeps only what a card says of the folder's GGUF files; move it away, or omit "
    "--model-card, to keep other text",
)


def check_outputs(
    paths: Iterable[Path], overwrite: bool, sources: Sequence[Path], ours: Iterable[Path] = ()
) -> None:
    """Raise `ConvertError` for output paths that cannot or must not be written; `ours` are files of an unfinished
    run, which may be overwritten."""
    for path in paths:
        if_source, if_no_file, if_there = _REMEDIES_OF_CARD if path.name == CARD else _REMEDIES
        if not path.parent.is_dir():
            raise ConvertError(f"{path}: its folder does not exist; create it first")
        for source in sources:
            if path.exists() and source.exists() and path.samefile(source):
                raise ConvertError(f"{path}: is a file of the checkpoint; {if_source}")
        if path.suffix == ".safetensors":
            raise ConvertError(
                f"{path}: expected a name for a GGUF file, found one of safetensors; use NAME.gguf"
            )
        if not path.exists():
            continue
        if not path.is_file():
            raise ConvertError(f"{path}: expected a file, found {kind_of(path)}; {if_no_file}")
        if not overwrite and path not in ours:
            raise ConvertError(f"{path}: already exists; {if_there}")


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ConvertError(
            f"{path}: needs {size:,} bytes, but its disk has {free:,} bytes free; "
            "free disk space, or choose another disk or a smaller --type"
        )
