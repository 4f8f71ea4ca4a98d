"""A GGUF model in one file or in splits; splits are opened through the first one, as in llama.cpp.

Input: a path. Output: `GgufModel`, with the keys of the first split and the tensors of all. The `split.*` keys are
checked for consistency first.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.output.gguf_file import GgufFile, GgufTensor
from kimi_gguf.convert.output.part_names import place_in_set
from kimi_gguf.convert.output.parts import COUNT, NUMBER, SET, TENSORS
from kimi_gguf.convert.types.tensor_types import Bytes


class GgufModel:
    """An open model; a context manager. Raises `ConvertError` for a split that is missing, damaged, or belongs to
    another model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as stack:
            first = stack.enter_context(GgufFile(path))
            files = [first]
            for number, part in enumerate(_other_parts(first), 1):
                files.append(stack.enter_context(GgufFile(part)))
                _check_part(files[-1], number, first)
            self.keys: Mapping[str, Any] = first.keys
            self.files = tuple(files)
            self._file_of = _file_of(files)
            self.tensors: Mapping[str, GgufTensor] = {
                name: tensor for file in files for name, tensor in file.tensors.items()
            }
            expected = first.keys.get(TENSORS) if len(files) > 1 else len(self.tensors)
            if len(self.tensors) != expected:
                raise ConvertError(
                    f"{path}: {TENSORS}: expected {expected!r:.40} tensors in all splits, found "
                    f"{len(self.tensors)}; the splits do not belong together"
                )
            self._stack = stack.pop_all()

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, tensor: GgufTensor, first: int = 0, count: int | None = None) -> Bytes:
        """`count` bytes of a tensor, starting at byte `first`; without a count, all remaining bytes."""
        return self._file_of[tensor.name].read(tensor, first, count)


def _other_parts(first: GgufFile) -> list[Path]:
    """The files that belong to the first one, by its keys and its name."""
    count, number = first.keys.get(COUNT, 0), first.keys.get(NUMBER, 0)
    if not isinstance(count, int) or count <= 1:
        return []
    place = place_in_set(first.path)
    if place is None or len(place[1]) != count:
        raise ConvertError(
            f"{first.path}: split of {count}: expected a name like NAME-00001-of-{count:05d}.gguf; "
            "restore its original name"
        )
    if number != 0 or place[0] != 1:
        raise ConvertError(
            f"{first.path}: is split {place[0]} of {count}; give the first one, {place[1][0].name}"
        )
    for path in place[1]:
        if not path.exists():
            raise ConvertError(
                f"{path}: not found, but the model has {count} splits; put all of them into one folder"
            )
    return place[1][1:]


def _check_part(part: GgufFile, number: int, first: GgufFile) -> None:
    """Compare a split's `split.*` keys with those of the first. llama-gguf-split does not copy SET, a key of this
    project, to the other splits."""
    wanted = {NUMBER: number, **{key: first.keys.get(key) for key in (COUNT, TENSORS)}}
    if SET in part.keys:
        wanted[SET] = first.keys.get(SET)
    for key, expected in wanted.items():
        if (found := part.keys.get(key)) != expected:
            raise ConvertError(
                f"{part.path}: {key}: expected {expected!r:.80} as in {first.path.name}, found {found!r:.80}; "
                "it is a split of another model"
            )


def _file_of(files: list[GgufFile]) -> dict[str, GgufFile]:
    found: dict[str, GgufFile] = {}
    for file in files:
        for name in file.tensors:
            if name in found:
                raise ConvertError(f"{file.path}: {name!r:.80} is also in {found[name].path.name}")
            found[name] = file
    return found
