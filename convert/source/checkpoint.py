"""A checkpoint of any layout as one namespace of canonical hub names.

Input: a folder, an index file, a single safetensors file, or a hub id. Output: `Checkpoint`: the config, and the
values of each canonical tensor. Opening reads headers only and checks names, shapes, dtypes and files. Values are
read in ranges, so that the caller limits the memory.

No code of the checkpoint is run: no pickle, and no Python file in its folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.families import family_of, hub_shapes, places_of, read_config
from kimi_gguf.convert.model.generation import GENERATION
from kimi_gguf.convert.model.layouts import Place
from kimi_gguf.convert.model.stored_forms import CONFIG as QUANTIZATION
from kimi_gguf.convert.model.stored_forms import Form
from kimi_gguf.convert.model.vocab_files import TOKENIZER
from kimi_gguf.convert.output.digest import digest
from kimi_gguf.convert.source import mxfp4
from kimi_gguf.convert.source.byte_source import LocalFile, Source
from kimi_gguf.convert.source.decoded import DecodedFile, decoded
from kimi_gguf.convert.source.hub import PREFIX, HubId, cached_folder, is_offline, open_repository
from kimi_gguf.convert.source.json_file import MAX_INDEX_BYTES, read_object
from kimi_gguf.convert.source.origin import CARD
from kimi_gguf.convert.source.read_ahead import MOST_BYTES, Range, ReadAhead
from kimi_gguf.convert.source.remote import RemoteFile
from kimi_gguf.convert.source.safetensors_file import (
    DOUBLE,
    FLOATS,
    PACKED,
    SCALES,
    Dtype,
    SafetensorsFile,
    plain_name,
    to_float32,
)
from kimi_gguf.engine.path_check import shortened

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
MODELOPT: Final = "hf_quant_config.json"  # of ModelOpt; see `_config`
_FEW_TENSORS: Final = 21_000  # whose memory is not counted
_TENSOR_BYTES: Final = 1200  # memory of each further one, measured with half a million
WINDOW_BYTES: Final = 7 << 20  # of a tensor in MXFP4 that are prefetched together; less than a request
_BUFFERS: Final = (".rotary_emb.inv_freq",)  # that models compute, and some checkpoints have
_OF_PEFT: Final = re.compile(r"\.(base_layer|lora_[AB])\.")
_INDEX_END: Final = ".safetensors.index.json"
_NO_PICKLES: Final = (
    "pickled weights run code when they are read, so they are refused; save the checkpoint as safetensors"
)
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


StoredFile = SafetensorsFile | DecodedFile
Addition = Callable[[npt.NDArray[np.float32], int], None]  # adds to elements, 1-D, from this one on


@dataclass(frozen=True)
class Merged:
    """An adapter that is merged into a checkpoint."""

    name: str
    sha256: str
    scale: float


class Checkpoint:
    """An open, checked checkpoint; made by `open_checkpoint`. Names are canonical hub names."""

    def __init__(
        self,
        root: _Root,
        config: ModelConfig,
        files: Mapping[PurePath, StoredFile],
        where: Mapping[str, PurePath],
    ) -> None:
        self.folder = root.folder  # of the config and the tokenizer
        self.config = config
        self.files = (  # that are on this machine
            *(path for path in files if isinstance(path, Path)),
            *(self.folder / name for name in (CONFIG, INDEX)),
        )
        self.shapes: Mapping[str, tuple[int, ...]] = hub_shapes(config)  # in the order of the GGUF file
        self._files = files
        self._file_of = where
        self._ahead = root.ahead
        self._place = _resolve(root.path, config, self.shapes, files, where)
        self.merged: tuple[Merged, ...] = ()
        self._additions: dict[str, list[Addition]] = {}
        self._addition_bytes = 0

    def merge(self, adapter: Merged, additions: Mapping[str, Addition], nbytes: int) -> None:
        """Merge an adapter: from now on these tensors are float32, with what it adds to their rows. nbytes: the memory
        that this takes."""
        self.merged += (adapter,)
        self._addition_bytes += nbytes
        for name, addition in additions.items():
            self._additions.setdefault(name, []).append(addition)

    def _stored(self, name: str) -> tuple[StoredFile, Place]:
        place = self._place[name]
        return self._files[self._file_of[place.stored]], place

    def dtype(self, name: str) -> Dtype:
        """The type of the tensor's elements: the stored one, or F32 if an adapter is merged into it."""
        return Dtype.F32 if name in self._additions else self.stored_dtype(name)

    def stored_dtype(self, name: str) -> Dtype:
        """The type the tensor is stored in."""
        file, place = self._stored(name)
        dtype = file.tensors[place.stored].dtype
        return Dtype.MXFP4 if place.scales else Dtype.F32 if dtype == DOUBLE else Dtype(dtype)

    @property
    def packed(self) -> bool:
        """Whether any tensor is stored in MXFP4."""
        return any(self.stored_dtype(name) is Dtype.MXFP4 for name in self._place)

    def form(self, name: str) -> tuple[Form, int] | None:
        """The form of a quantized tensor that is decoded while it is read, and the bytes that it takes as stored."""
        file, place = self._stored(name)
        found = file.form(place.stored) if isinstance(file, DecodedFile) else None
        if found is None:
            return None
        form, nbytes = found
        return form, nbytes * math.prod(self.shapes[name]) // math.prod(place.stored_shape)

    @property
    def doubles(self) -> int:
        """How many tensors are stored in F64, and rounded to float32 when they are read."""
        stored = (self._stored(name) for name in self._place)
        return sum(file.tensors[place.stored].dtype == DOUBLE for file, place in stored)

    @property
    def has_unused_head(self) -> bool:
        """Whether an output matrix is stored although the config ties it to the embedding."""
        return self.config.tie_word_embeddings and family_of(self.config).table.head.hub in self._file_of

    def locate(self, name: str, element: int) -> tuple[PurePath, str, tuple[int, ...]]:
        """The file, the stored name and the index there of the tensor's `element` in row-major order (in MXFP4 the
        index of the element, not of its byte)."""
        file, place = self._stored(name)
        index = np.unravel_index(place.first + element, place.stored_shape)
        return file.path, place.stored, tuple(int(i) for i in index)

    def locate_scale(self, name: str, element: int) -> tuple[PurePath, str, tuple[int, ...]]:
        """The same for the scale of an element in MXFP4."""
        (file, place), (*row, column) = self._stored(name), self.locate(name, element)[2]
        if place.scales is not None:
            path, stored = self._files[self._file_of[place.scales]].path, place.scales
        elif isinstance(file, DecodedFile):
            path, stored = file.scales(place.stored)
        else:
            raise ValueError(f"{name}: is not in MXFP4")
        return path, stored, (*row, column // mxfp4.GROUP)

    def elements(self, name: str, first: int, count: int) -> npt.NDArray[Any]:
        """Elements `first .. first+count` in row-major order, 1-D, as `dtype` says: BF16 as uint16, MXFP4 as blocks of
        bytes (there `first` and `count` must be whole groups)."""
        found = [file.read(stored, at, size) for file, stored, at, size in self._parts(name, first, count)]
        stored = found[0] if len(found) == 1 else mxfp4.blocks(*found)
        if name not in self._additions:
            return stored
        values = np.array(to_float32(stored, self.stored_dtype(name)), np.float32).reshape(-1)
        for add in self._additions[name]:
            add(values, first)
        return values

    def packed_bytes(self, name: str, first: int, count: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The bytes of a range of a tensor in MXFP4 as stored: elements, two per byte, and scales, one per group."""
        packed, scales = (
            file.read(stored, at, size) for file, stored, at, size in self._parts(name, first, count)
        )
        return packed, scales

    def _parts(self, name: str, first: int, count: int) -> Iterator[tuple[StoredFile, str, int, int]]:
        """The stored ranges that hold a range of a canonical tensor: file, tensor, first element, number."""
        file, place = self._stored(name)
        if place.scales is None:
            yield file, place.stored, place.first + first, count
            return
        if first % mxfp4.GROUP or count % mxfp4.GROUP:
            raise ValueError(f"{name}: elements {first}..{first + count} are not whole groups")
        yield file, place.stored, first // 2, count // 2
        yield (
            self._files[self._file_of[place.scales]],
            place.scales,
            first // mxfp4.GROUP,
            count // mxfp4.GROUP,
        )

    @contextmanager
    def expecting(self, ranges: Iterable[tuple[str, int, int]]) -> Iterator[None]:
        """Within the block these elements (name, first, count) are read, each range once and about in this order;
        ranges of remote files are prefetched."""
        if self._ahead is None:
            yield
            return
        spans = self._spans(ranges)
        remote = (Range(file, begin, end) for file, begin, end in spans if isinstance(file, RemoteFile))
        with self._ahead.expecting(remote):
            yield

    def _spans(self, ranges: Iterable[tuple[str, int, int]]) -> Iterator[tuple[Source, int, int]]:
        """The bytes of these ranges. Elements and scales in MXFP4 alternate, but are far apart in the file: those of
        a few MiB are listed one after the other, so that one request fetches many of them."""
        window: list[tuple[tuple[Source, int, int], ...]] = []
        held, before = 0, ""
        for name, first, count in ranges:
            found = self._parts(name, first, count)
            parts = tuple(
                span for file, stored, at, number in found for span in file.spans(stored, at, number)
            )
            size = sum(end - begin for _, begin, end in parts)
            if window and (name != before or held + size > WINDOW_BYTES):
                yield from (span for each in zip(*window, strict=True) for span in each)
                window, held = [], 0
            window.append(parts)
            held, before = held + size, name
        yield from (span for each in zip(*window, strict=True) for span in each)

    def stop(self) -> None:
        """Stop reading: threads that wait for the network end."""
        if self._ahead is not None:
            self._ahead.stop()

    @property
    def remote_bytes(self) -> int:
        """Bytes of the files that are read over a network."""
        sources = (file.source for file in self._files.values())
        return sum(source.size for source in sources if isinstance(source, RemoteFile))

    @property
    def own_bytes(self) -> int:
        """Bytes of memory for prefetched data, for adapters, and for the names of more tensors than the 48B has."""
        names = max(len(self._file_of) - _FEW_TENSORS, 0) * _TENSOR_BYTES
        return names + self._addition_bytes + (MOST_BYTES if self._ahead else 0)

    def identity(self) -> str:
        """A hash of the names, sizes, times and headers of the files with the weights, and of merged adapters."""
        merged = (repr((adapter.sha256, adapter.scale)).encode() for adapter in self.merged)
        return digest(*(file.identity() for file in self._files.values()), *merged)

    def headers_hash(self) -> str:
        """A hash of all headers and merged adapters; it does not depend on the files' places and times."""
        merged = (repr((adapter.sha256, adapter.scale)).encode() for adapter in self.merged)
        return digest(*(file.header_hash.encode() for file in self._files.values()), *merged)

    def check_unchanged(self, names: Iterable[str] | None = None) -> None:
        """Raise `ConvertError` if a file with one of the tensors `names` has changed since it was opened; without
        names, check every file, and read the headers again."""
        if names is None:
            for file in self._files.values():
                file.check_unchanged(thoroughly=True)
            return
        for path in {self._file_of[stored] for name in names for stored, _ in self._place[name].tensors}:
            self._files[path].check_unchanged()

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The whole tensor in its canonical shape, exactly, as float32."""
        shape = self.shapes[name]
        return to_float32(self.elements(name, 0, math.prod(shape)), self.dtype(name)).reshape(shape)


@dataclass(frozen=True)
class _Root:
    """Where a checkpoint is."""

    path: PurePath  # its name in errors
    folder: Path  # of the small files
    names: Sequence[str]  # of the files with weights
    index: str | None
    weight_map: Mapping[str, str]  # of the index
    open: Callable[[str], SafetensorsFile]
    ahead: ReadAhead[RemoteFile] | None = None


@contextmanager
def open_checkpoint(source: Path | str, mtp: bool = True) -> Iterator[Checkpoint]:
    """Open a checkpoint: its folder, its index, its single safetensors file with `config.json` in the same folder;
    or, if a string is none of these, its id on the hub, `[hf://]OWNER/NAME[@REVISION]`. Without `mtp`, layers that
    predict further tokens are left out.

    Raises `ConvertError`, naming file and tensor, for anything missing, damaged, duplicate or unexpected.
    """
    root = _find(source)
    config = _config(root.folder)
    with ExitStack() as stack:
        files = {root.path / name: stack.enter_context(root.open(name)) for name in root.names}
        where: dict[str, PurePath] = {}
        for file_path, file in files.items():
            for name in file.tensors:
                if name in where:
                    raise ConvertError(
                        f"{file_path}: {name!r} is also in {where[name].name}",
                        todo="expected each tensor in one file, download the checkpoint again",
                    )
                where[name] = file_path
        if root.index is not None:
            _check_index(root.path / root.index, root.weight_map, where)
        stored: Mapping[PurePath, StoredFile] = files
        if config.forms is not None:
            stored, where = decoded(config.forms, files, where)
        elif not config.mxfp4_experts:
            _check_floats(files, where)
        config = family_of(config).stored(config, where.keys(), mtp)
        checkpoint = Checkpoint(root, config, stored, where)
        stack.callback(checkpoint.stop)
        yield checkpoint


def _config(folder: Path) -> ModelConfig:
    """The config, with what ModelOpt's older versions write next to it."""
    data = read_object(folder / CONFIG)
    if QUANTIZATION not in data and (folder / MODELOPT).is_file():
        described = read_object(folder / MODELOPT).get("quantization")
        data[QUANTIZATION] = {
            "quant_method": "modelopt",
            **(described if isinstance(described, dict) else {}),
        }
    return read_config(data, str(folder / CONFIG))


def _check_floats(files: Mapping[PurePath, SafetensorsFile], where: Mapping[str, PurePath]) -> None:
    """Raise `ConvertError` for quantized weights that the config does not describe."""
    for name, path in where.items():
        if (dtype := files[path].tensors[name].dtype).startswith("F8_"):
            raise ConvertError(
                f"{path}: {name!r}",
                expected=f"dtype {', '.join(FLOATS)}",
                found=dtype,
                todo=f"{CONFIG} has no {QUANTIZATION} that describes it: use that of the original checkpoint",
            )


def _find(source: Path | str) -> _Root:
    path = Path(source)
    if exists(path):
        return _on_disk(path)
    id = HubId.parse(source) if isinstance(source, str) else None
    if id is None:
        on_hub = "" if isinstance(source, Path) else ", or an id on the hub ([hf://]OWNER/NAME[@REVISION])"
        raise ConvertError(
            f"{shortened(source)}: not found",
            todo=f"expected a checkpoint folder or a safetensors file{on_hub}",
        )
    try:
        return _on_disk(cached_folder(id)) if is_offline(id) else _on_hub(id)
    except ConvertError as error:
        if str(source).startswith(PREFIX):
            raise
        raise type(error)(f"{source}: no such folder, so taken as a hub id; {error}") from None


def exists(path: Path) -> bool:
    """Whether the path exists; a text that cannot be one does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _on_disk(path: Path) -> _Root:
    if path.is_dir():
        folder, (names, index) = path, _weights(path, {file.name for file in path.iterdir() if file.exists()})
    elif path.name.endswith(_INDEX_END):
        folder, names, index = path.parent, [], path.name
    elif path.suffix in _PICKLES:
        raise ConvertError(f"{path}: {_NO_PICKLES}")
    elif path.suffix == ".safetensors":
        folder, names, index = path.parent, [path.name], None
    else:
        todo = "; to quantize a GGUF file: kimi-llama quantize" if path.suffix == ".gguf" else ""
        raise ConvertError(path, expected=f"a checkpoint folder or a .safetensors file{todo}")
    weight_map = _weight_map(folder / index) if index else {}
    names = names or sorted(set(weight_map.values()))
    return _Root(
        folder, folder, names, index, weight_map, lambda name: SafetensorsFile(LocalFile(folder / name))
    )


def _on_hub(id: HubId) -> _Root:
    hub = open_repository(id, (CONFIG, MODELOPT, INDEX, CARD, GENERATION, *TOKENIZER))
    names, index = _weights(hub.path, hub.names)
    weight_map = _weight_map(hub.folder / index) if index else {}
    names = names or sorted(set(weight_map.values()))
    return _Root(
        hub.path,
        hub.folder,
        names,
        index,
        weight_map,
        lambda name: SafetensorsFile(hub.open(name)),
        hub.ahead,
    )


def _weights(path: PurePath, names: Collection[str]) -> tuple[list[str], str | None]:
    """The files with weights among the names of a folder's files, or their index. Shards without an index are a
    checkpoint if their tensors are complete and unique, which is checked when they are open."""
    if SINGLE in names and INDEX in names:
        raise ConvertError(
            f"{path}: has both {SINGLE} and {INDEX}", todo="give the path of the one to convert"
        )
    if SINGLE in names:
        return [SINGLE], None
    indexes = [INDEX] if INDEX in names else sorted(name for name in names if name.endswith(_INDEX_END))
    if len(indexes) > 1:
        raise ConvertError(
            f"{path}: has several indexes",
            found=", ".join(indexes),
            todo="give the path of the one to convert",
        )
    if indexes:
        return [], indexes[0]
    weights = sorted(
        name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")
    )
    if weights:
        return weights, None
    pickles = sorted(name for name in names if PurePath(name).suffix in _PICKLES)
    if pickles:
        raise ConvertError(f"{path / pickles[0]}: {_NO_PICKLES}")
    raise ConvertError(
        path,
        expected="a checkpoint folder with .safetensors files",
        found=", ".join(sorted(names)[:8]) or "nothing",
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of a shard index; all files are in the index's folder."""
    found = read_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ConvertError(f"{index}: weight_map", expected="an object of tensor and file names")
    for name, file in found.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or not file.isprintable():
            raise ConvertError(
                f"{index}: {name!r}", expected="a .safetensors file name", found=f"{file!r:.80}"
            )
        posix, windows = PurePosixPath(file), PureWindowsPath(file)
        if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
            raise ConvertError(
                f"{index}: {name!r}",
                expected="a file in the folder of the index",
                found=f"{file!r:.80}, which is outside of it",
            )
    return {plain_name(name): file for name, file in found.items()}


def _check_index(index: PurePath, weight_map: Mapping[str, str], where: Mapping[str, PurePath]) -> None:
    """Raise `ConvertError` if the index and the shards differ."""
    for name, file in weight_map.items():
        if name not in where:
            raise ConvertError(
                f"{index.parent / file}: missing tensor {name!r} of {index.name}",
                todo="download the file again",
            )
        if where[name] != index.parent / file:
            raise ConvertError(
                f"{index}: {name!r}",
                expected=f"in {file}",
                found=f"in {where[name].name}",
                todo="index and files do not belong together, download the checkpoint again",
            )
    for name, found in where.items():
        if name not in weight_map:
            raise ConvertError(
                f"{found}: unexpected tensor {name!r}, which {index.name} does not list",
                todo="index and files do not belong together, download the checkpoint again",
            )


def _resolve(
    path: PurePath,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    files: Mapping[PurePath, StoredFile],
    where: Mapping[str, PurePath],
) -> dict[str, Place]:
    """The only place of each canonical tensor. Raises `ConvertError` for a stored tensor that is not used."""
    resolved: dict[str, Place] = {}
    family = family_of(config)
    head, embedding = family.table.head.hub, family.table.embedding.hub
    for stored, file in where.items():
        if _OF_PEFT.search(stored):
            raise ConvertError(
                f"{file}: {stored!r} is of an unmerged PEFT state",
                todo="merge it (merge_and_unload) and save the model, or save the adapter alone (save_pretrained)",
            )
    for name, shape in shapes.items():
        tied = (
            name == head and config.tie_word_embeddings
        )  # transformers then uses the embedding, whatever is stored
        candidates = places_of(config, embedding if tied else name, shape)
        found = [place for place in candidates if place.stored in where]
        if not found:
            raise _missing(path, candidates, where)
        if len(found) > 1:
            raise ConvertError(
                f"{where[found[1].stored]}: {found[1].stored!r} is a duplicate of "
                f"{found[0].stored!r} in {where[found[0].stored].name}",
                todo="keep one of the two",
            )
        resolved[name] = found[0]
        if found[0].scales is not None:
            _check_packed(found[0], config, where)
    used = {
        stored: (name.endswith(family.padded) and bool(family.padded), place, shape)
        for name, place in resolved.items()
        for stored, shape in place.tensors
    }
    ignored = (*family.ignored, *family.left_out(config))
    for stored, file in where.items():
        if (
            stored.startswith(ignored)
            or stored.endswith(_BUFFERS)
            or (stored == head and config.tie_word_embeddings)
        ):
            continue
        if stored not in used:
            raise ConvertError(
                f"{file}: unexpected tensor {stored!r}",
                todo=(
                    f"{CONFIG} describes a model without it, and without this tensor it may compute "
                    "something else"
                ),
            )
        tensor, (padded, place, expected) = files[file].tensors[stored], used[stored]
        same = tensor.shape == expected or (  # training programs keep it as [heads]
            stored.endswith("A_log") and tensor.shape == (math.prod(expected),)
        )
        longer = padded and len(tensor.shape) == 1 and tensor.shape > expected
        if not same and not longer:
            raise ConvertError(
                f"{file}: {stored!r}",
                expected=f"shape {list(expected)} by {CONFIG}",
                found=list(tensor.shape),
                todo="file and config do not belong together",
            )
        dtypes = FLOATS if place.scales is None else PACKED if stored == place.stored else SCALES
        if tensor.dtype not in (*dtypes, DOUBLE, Dtype.MXFP4.name):
            todo = (
                f"{CONFIG} has no quantization_config that says how to read it"
                if dtypes is FLOATS
                else "only MXFP4 is read"
            )
            raise ConvertError(
                f"{file}: {stored!r}", expected=f"dtype {', '.join(dtypes)}", found=tensor.dtype, todo=todo
            )
    return resolved


def _missing(path: PurePath, candidates: Sequence[Place], where: Mapping[str, PurePath]) -> ConvertError:
    for place in candidates:
        if (packed := f"{place.stored}_packed") in where:
            return ConvertError(
                f"{where[packed]}: unexpected tensor {packed!r}: only routed experts may be packed",
                todo="dequantise the others",
            )
    first, *others = candidates
    also = ", ".join(repr(place.stored) for place in others)
    return ConvertError(
        f"{path}: missing tensor {first.stored!r} of shape "
        f"{list(first.stored_shape)}{(f' (also looked for {also})' if also else '')}",
        todo=f"the checkpoint is incomplete, or {CONFIG} describes another model",
    )


def _check_packed(place: Place, config: ModelConfig, where: Mapping[str, PurePath]) -> None:
    file = where[place.stored]
    if not config.mxfp4_experts:
        raise ConvertError(
            f"{file}: {place.stored!r}",
            expected=f"a quantization_config in {CONFIG} that describes packed weights",
            found="none",
            todo="use the config of the original checkpoint",
        )
    if place.scales not in where:
        raise ConvertError(
            f"{file}: {place.stored!r}: missing tensor {place.scales!r} with its scales",
            todo="download the checkpoint again",
        )
