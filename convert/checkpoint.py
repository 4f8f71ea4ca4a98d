"""A checkpoint on disk as one namespace of canonical hub names, whatever its layout and number of files.

Flows in: a folder, an index file or a single safetensors file. Flows out: `Checkpoint`: the config, and each
canonical tensor's values. Opening reads headers only and settles everything about names, shapes, dtypes and
files; values are read range by range, so a caller decides how much lies in memory.

Nothing of the checkpoint is ever run: no pickle, no Python beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .config import KimiConfig
from .digest import digest
from .errors import ConvertError
from .json_file import read_object
from .layouts import Place, places
from .safetensors_file import Dtype, SafetensorsFile
from .tensors import hub_shapes

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Checkpoint:
    """An open, checked checkpoint; made by `open_checkpoint`. Names are canonical hub names."""

    def __init__(
        self,
        folder: Path,
        config: KimiConfig,
        files: Mapping[Path, SafetensorsFile],
        where: Mapping[str, Path],
    ) -> None:
        self.folder = folder
        self.config = config
        self.files = (*files, *(folder / name for name in (CONFIG, INDEX)))
        self.shapes: Mapping[str, tuple[int, ...]] = hub_shapes(config)
        self._files = files
        self._file_of = where
        self._place = _resolve(folder, config, self.shapes, files, where)

    def names(self) -> list[str]:
        """Every canonical name, in the order of the GGUF file."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> Dtype:
        """The type the tensor is stored in."""
        place = self._place[name]
        return Dtype(self._files[self._file_of[place.stored]].tensors[place.stored].dtype)

    def source(self, name: str) -> tuple[Path, str]:
        """The file and the stored name that hold the tensor."""
        place = self._place[name]
        return self._file_of[place.stored], place.stored

    def locate(self, name: str, element: int) -> tuple[Path, str, tuple[int, ...]]:
        """The file, the stored name and the index there of the tensor's `element` in row-major order."""
        place = self._place[name]
        index = np.unravel_index(place.first + element, place.stored_shape)
        return *self.source(name), tuple(int(i) for i in index)

    def elements(self, name: str, first: int, count: int) -> npt.NDArray[Any]:
        """Elements `first .. first+count` in row-major order, 1-D, as stored (BF16 as uint16)."""
        place = self._place[name]
        return self._files[self._file_of[place.stored]].read(place.stored, place.first + first, count)

    def identity(self) -> str:
        """A hash of what the weights stand in: names, sizes, times and headers of the files."""
        return digest(*(file.identity() for file in self._files.values()))

    def headers_hash(self) -> str:
        """A hash of all headers, the same wherever and whenever the files are."""
        return digest(*(file.header_hash.encode() for file in self._files.values()))

    def check_unchanged(self, names: Iterable[str] | None = None) -> None:
        """Raise `ConvertError` if a file that holds one of the tensors `names` is no longer what was opened;
        without names, look at every file, and read the headers again."""
        if names is None:
            for file in self._files.values():
                file.check_unchanged(thoroughly=True)
            return
        for path in {self._file_of[self._place[name].stored] for name in names}:
            self._files[path].check_unchanged()

    def read(self, name: str) -> npt.NDArray[Any]:
        """The whole tensor in its canonical shape, as stored (BF16 as uint16; see `dtype`)."""
        shape = self.shapes[name]
        return self.elements(name, 0, math.prod(shape)).reshape(shape)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The whole tensor in its canonical shape, exactly, as float32."""
        return to_float32(self.read(name), self.dtype(name))


def to_float32(values: npt.NDArray[Any], dtype: Dtype) -> npt.NDArray[np.float32]:
    """Stored elements as float32, exactly: every F16 and BF16 number is one."""
    if dtype is Dtype.BF16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Open a checkpoint folder, its index, or its single safetensors file, with `config.json` beside it.

    Raises `ConvertError`, naming file and tensor, for whatever is missing, damaged, doubled or unexpected.
    """
    folder, weight_map, single = _find(path)
    config_file = folder / CONFIG
    config = KimiConfig.from_json(read_object(config_file), str(config_file))
    with ExitStack() as stack:
        paths = [single] if single else sorted({folder / file for file in weight_map.values()})
        files = {path: stack.enter_context(SafetensorsFile(path)) for path in paths}
        where: dict[str, Path] = {}
        for file_path, file in files.items():
            for name in file.tensors:
                if name in where:
                    raise ConvertError(
                        f"{file_path}: {name!r} stands in {where[name].name} too; "
                        "each tensor belongs in one file, fetch the checkpoint again"
                    )
                where[name] = file_path
        if not single:
            _check_index(folder, weight_map, where)
        yield Checkpoint(folder, config, files, where)


def _find(path: Path) -> tuple[Path, dict[str, str], Path | None]:
    """The folder, the index's weight map (empty for a single file), and the single file if it is one."""
    if path.is_dir():
        single, index = path / SINGLE, path / INDEX
        if single.exists() and index.exists():
            raise ConvertError(
                f"{path}: holds both {SINGLE} and {INDEX}; give the path of the one that is meant"
            )
        if single.exists():
            return path, {}, single
        if index.exists():
            return path, _weight_map(index), None
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise ConvertError(
                f"{path / pickles[0]}: pickled weights run code when they are read, so they are refused; "
                "save the checkpoint as safetensors"
            )
        raise ConvertError(f"{path}: holds neither {SINGLE} nor {INDEX}; expected a checkpoint folder")
    if not path.exists():
        raise ConvertError(f"{path}: not found; expected a checkpoint folder or a safetensors file")
    if path.name.endswith(".index.json"):
        return path.parent, _weight_map(path), None
    if path.suffix in _PICKLES:
        raise ConvertError(
            f"{path}: pickled weights run code when they are read, so they are refused; save as safetensors"
        )
    if path.suffix != ".safetensors":
        raise ConvertError(f"{path}: expected a checkpoint folder or a .safetensors file")
    return path.parent, {}, path


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of a shard index; file names stay inside the index's folder."""
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ConvertError(f"{index}: weight_map: expected an object of tensor and file names")
    for name, file in found.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or not file.isprintable():
            raise ConvertError(f"{index}: {name!r}: expected a .safetensors file name, found {file!r:.80}")
        posix, windows = PurePosixPath(file), PureWindowsPath(file)
        if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
            raise ConvertError(
                f"{index}: {name!r}: {file!r:.80} leads out of the checkpoint's folder; "
                "expected the name of a file beside the index"
            )
    return found


def _check_index(folder: Path, weight_map: Mapping[str, str], where: Mapping[str, Path]) -> None:
    """The index and the shards must tell the same."""
    for name, file in weight_map.items():
        if name not in where:
            raise ConvertError(
                f"{folder / file}: {name!r} is missing, though {INDEX} says it is there; fetch the file again"
            )
        if where[name] != folder / file:
            raise ConvertError(
                f"{folder / INDEX}: {name!r}: expected in {file}, found in {where[name].name}; "
                "index and files do not belong together, fetch the checkpoint again"
            )
    for name, path in where.items():
        if name not in weight_map:
            raise ConvertError(
                f"{path}: unexpected tensor {name!r}, which {INDEX} does not list; "
                "index and files do not belong together, fetch the checkpoint again"
            )


def _resolve(
    folder: Path,
    config: KimiConfig,
    shapes: Mapping[str, tuple[int, ...]],
    files: Mapping[Path, SafetensorsFile],
    where: Mapping[str, Path],
) -> dict[str, Place]:
    """The one place of each canonical tensor; every stored tensor must serve."""
    resolved: dict[str, Place] = {}
    for name, shape in shapes.items():
        candidates = places(name, shape, config.num_experts)
        found = [place for place in candidates if place.stored in where]
        if not found and name == _HEAD and config.tie_word_embeddings:
            found = [Place(_EMBEDDING, shape, 0)]
        if not found:
            also = ", ".join(repr(place.stored) for place in candidates[1:])
            raise ConvertError(
                f"{folder}: missing tensor {name!r} of shape {list(shape)}"
                f"{f' (also looked for {also})' if also else ''}; the checkpoint is incomplete, "
                f"or {CONFIG} describes another model"
            )
        if len(found) > 1:
            raise ConvertError(
                f"{where[found[1].stored]}: {found[1].stored!r} is a duplicate of {found[0].stored!r} "
                f"in {where[found[0].stored].name}; keep one of the two"
            )
        resolved[name] = found[0]
    used = {place.stored: place for place in resolved.values()}
    for stored, path in where.items():
        if stored not in used:
            raise ConvertError(
                f"{path}: unexpected tensor {stored!r}; {CONFIG} describes a model without it, "
                "and leaving it out could change what the model computes"
            )
        tensor, expected = files[path].tensors[stored], used[stored].stored_shape
        if tensor.shape != expected:
            raise ConvertError(
                f"{path}: {stored!r}: expected shape {list(expected)} by {CONFIG}, "
                f"found {list(tensor.shape)}; file and config do not belong together"
            )
        if tensor.dtype not in Dtype.__members__:
            raise ConvertError(
                f"{path}: {stored!r}: expected dtype {', '.join(Dtype.__members__)}, found {tensor.dtype}; "
                "save the checkpoint in one of those"
            )
    return resolved
