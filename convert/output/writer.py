"""Writes GGUF v3 files as a stream; the files are renamed to their names when all are complete.

Input: a `Plan` and its encoded chunks in order. Output: the files, or an unfinished output that can be resumed (see
`unfinished`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.output.gguf_header import aligned
from kimi_gguf.convert.output.unfinished import Identity, Layout, Unfinished, unfinished
from kimi_gguf.convert.plan import Plan
from kimi_gguf.convert.source.origin import CARD
from kimi_gguf.engine.file_hash import CHUNK, Digest
from kimi_gguf.engine.file_kind import kind_of
from kimi_gguf.engine.tensor_types import Bytes

ProgressCallback = Callable[[PlannedTensor, int], None]  # a tensor, and how many of its bytes were written
_SMALL: Final = 1 << 20  # bytes that are kept free for the model card


@contextmanager
def writing(
    plan: Plan, path: Path, identity: Identity, *, overwrite: bool, resume: bool, hashed: bool
) -> Iterator[Writer]:
    """Write the plan's files; they are renamed when the block ends without an error (see `unfinished`).

    hashed: compute the SHA-256 of each file. Raises `ConvertError` if the disk is too small or fails.
    """
    with unfinished(path, _layout(plan, path), identity, resume, overwrite) as work:
        _check_space(path, work.missing + (_SMALL if hashed else 0))
        yield Writer(plan, work, hashed)


class Writer:
    """The files of a plan while their tensors are written in order; made by `writing`."""

    def __init__(self, plan: Plan, work: Unfinished, hashed: bool) -> None:
        self._plan = plan
        self._work = work
        self._digests: list[Digest] = [hashlib.sha256() for _ in plan.files] if hashed else []
        self._starts = [
            (number, len(file.header) + offset)
            for number, file in enumerate(plan.files)
            for offset in file.offsets[:-1]
        ]
        self._next = work.done  # index of the tensor that is written
        self._file: int | None = None  # number of the file that is written

    @property
    def remaining(self) -> Sequence[PlannedTensor]:
        """The tensors that are not finished, in order."""
        return self._plan.tensors[self._next :]

    @property
    def hashes(self) -> list[str]:
        """The SHA-256 of each complete file, in hexadecimal."""
        return [digest.hexdigest() for digest in self._digests]

    def read_finished(self, report: ProgressCallback) -> None:
        """Report the tensors that an earlier run wrote. If files are hashed, hash them too, and raise `ConvertError`
        if they were changed."""
        if not self._digests:
            for tensor in self._plan.tensors[: self._work.done]:
                report(tensor, tensor.nbytes)
            return
        work, left = self._work, self._work.done
        for number, (file, digest) in enumerate(zip(self._plan.files, self._digests, strict=True)):
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
                raise ConvertError(
                    work.kept(number),
                    expected=f"SHA-256 {noted} of what an earlier run wrote",
                    found=digest.hexdigest(),
                    todo="it is removed: start again, and check the disk",
                )

    def append(self, tensor: PlannedTensor, chunk: Bytes) -> bool:
        """Write the next bytes of the first remaining tensor; whether they complete it. Raises `OSError`."""
        number, start = self._starts[self._next]
        if self._file != number:
            self._file = number
            self._work.begin(number)
            if self._work.at == 0:
                self._write(np.frombuffer(self._plan.files[number].header, np.uint8))
        missing = start + tensor.nbytes - self._work.at
        if tensor is not self._plan.tensors[self._next] or chunk.nbytes > missing:
            raise AssertionError(f"{tensor.name}: {chunk.nbytes} bytes, but {missing} are missing")
        self._write(chunk)
        return chunk.nbytes == missing

    def finish_tensor(self) -> None:
        """Pad the complete tensor and enter it in the journal; with its last tensor, a file is complete."""
        number, _ = self._starts[self._next]
        tensor = self._plan.tensors[self._next]
        self._write(np.zeros(aligned(tensor.nbytes) - tensor.nbytes, np.uint8))
        self._next += 1
        digest = self._digests[number] if self._digests else None
        if tensor is self._plan.files[number].tensors[-1]:
            self._work.end(self._next, digest)
        else:
            self._work.finished(self._next, digest)

    def add(self, name: str, content: bytes) -> None:
        """Add a small file to the same folder; it is renamed together with the others. Raises `OSError`."""
        self._work.add(name, content)

    def _write(self, data: Bytes) -> None:
        self._work.write(data)
        if self._digests and self._file is not None:
            self._digests[self._file].update(data)


def _layout(plan: Plan, output: Path) -> Layout:
    """Names and sizes of the files, and where each tensor begins: a file's first with its header."""
    places = [
        (number, len(file.header) + offset if offset else 0)
        for number, file in enumerate(plan.files)
        for offset in file.offsets[:-1]
    ]
    files = [(path.name, file.nbytes) for path, file in zip(plan.paths(output), plan.files, strict=True)]
    return Layout(tuple(files), (*places, (len(plan.files), 0)))


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
            raise ConvertError(f"{path}: its folder does not exist", todo="create it first")
        for source in sources:
            if path.exists() and source.exists() and path.samefile(source):
                raise ConvertError(f"{path}: is a file of the checkpoint", todo=if_source)
        if path.suffix == ".safetensors":
            raise ConvertError(
                path, expected="a name for a GGUF file", found="one of safetensors", todo="use NAME.gguf"
            )
        if not path.exists():
            continue
        if not path.is_file():
            raise ConvertError(path, expected="a file", found=kind_of(path), todo=if_no_file)
        if not overwrite and path not in ours:
            raise ConvertError(f"{path}: already exists", todo=if_there)


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ConvertError(
            f"{path}: needs {size:,} bytes, but its disk has {free:,} bytes free",
            todo="free disk space, or choose another disk or a smaller --type",
        )
