"""The pairs of a PEFT adapter by the tensors of its base checkpoint that they add to.

Input: an adapter's folder, its base checkpoint. Output: `Adapter`: for each canonical hub name a `Pair`, whose factors
A [rank, columns] and B [rows, rank] are read when they are needed. Opening reads headers only, and checks every name,
shape and rank: a tensor that belongs to no pair, or to no matrix of the base, is a `ConvertError`.

PEFT names modules as the model has them in memory, or as the checkpoint has them on disk: all layouts of the base's
family are known. A stored tensor that holds several canonical ones (q, k and v in one; all experts in one) is divided.
Source: PEFT 0.21, `lora/layer.py`: `Linear`, `Embedding` and `ParamWrapper`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kimi_gguf.convert.adapter.peft_config import CONFIG, PeftConfig, read_peft_config
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.families import family_of, hub_shapes, places_of
from kimi_gguf.convert.model.layouts import Place
from kimi_gguf.convert.source.byte_source import LocalFile
from kimi_gguf.convert.source.checkpoint import INDEX, SINGLE, Checkpoint
from kimi_gguf.convert.source.safetensors_file import FLOATS, Dtype, SafetensorsFile, to_float32

WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
# MODULE.lora_A.weight, with the adapter's name in a state that was not saved by PEFT; embeddings have no ".weight".
_HALF: Final = re.compile(
    r"(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(\.(?!weight$)[\w-]+)?(?P<weight>\.weight)?"
)
_BASE_LAYER: Final = (
    ".base_layer"  # a module in a wrapper; of several parameters in one module, all but the last
)
_COPY: Final = f"{_BASE_LAYER}.weight"  # PEFT saves a copy of an embedding that it adapts
_KEPT: Final = 4  # stored tensors in memory
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """What an adapter adds to a canonical tensor [rows, columns]: scale * B A."""

    file: SafetensorsFile
    read: Callable[
        [str], Matrix
    ]  # a stored tensor; the latest are kept, because a matrix is read in several parts
    names: tuple[str, str]  # the stored tensors of A and B
    rank: int
    scale: float
    first_row: int  # of B: the canonical tensor can be a part of the stored one
    rows: int
    expert: int | None  # which of `experts` matrices, if all are in one stored tensor
    experts: int
    transposed: bool  # the stored pair is that of the transposed matrix

    def factors(self) -> tuple[Matrix, Matrix]:
        """A [rank, columns] and B [rows, rank]. Raises `ConvertError` for numbers that are not finite."""
        a, b = (self.read(name) for name in self.names)
        if self.expert is not None:
            a = a.reshape(self.experts, self.rank, -1)[self.expert]
            b = b.reshape(len(b), self.rank, self.experts)[:, :, self.expert]
        if self.transposed:
            a, b = b.T, a.T
        return np.ascontiguousarray(a), np.ascontiguousarray(b[self.first_row : self.first_row + self.rows])


def _read(file: SafetensorsFile, name: str) -> Matrix:
    """A stored tensor as float32. Raises `ConvertError` for numbers that are not finite."""
    tensor = file.tensors[name]
    values = to_float32(file.read(name, 0, tensor.size), Dtype(tensor.dtype)).reshape(tensor.shape)
    if not np.isfinite(values).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(values))[0]]
        raise ConvertError(
            f"{file.path}: {name!r}: element {index}",
            expected="a finite number",
            found=values[tuple(index)],
            todo="the adapter is damaged, or its training diverged",
        )
    return values


@dataclass(frozen=True)
class Adapter:
    """An open adapter; made by `open_adapter`."""

    folder: Path
    config: PeftConfig
    pairs: Mapping[str, Pair]  # by canonical hub name
    files: tuple[Path, ...]

    @property
    def memory(self) -> int:
        """Bytes of the stored tensors that are kept, and of the parts of them that are used, in float32."""
        tensors = next(iter(self.pairs.values())).file.tensors.values()
        return 2 * _KEPT * 4 * max(tensor.size for tensor in tensors)

    def check_unchanged(self) -> None:
        """Raise `ConvertError` if its weights were changed since it was opened."""
        next(iter(self.pairs.values())).file.check_unchanged(thoroughly=True)


def is_adapter(source: Path | str) -> bool:
    """Whether a path is the folder of a PEFT adapter, and not of a model."""
    return has_adapter(source) and not any((Path(source) / name).exists() for name in (SINGLE, INDEX))


def has_adapter(source: Path | str) -> bool:
    """Whether a path is a folder with a PEFT adapter, alone or next to its base."""
    try:
        return (Path(source) / CONFIG).is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def open_adapter(folder: Path, base: Checkpoint) -> Iterator[Adapter]:
    """Open an adapter of a checkpoint. Raises `ConvertError`."""
    config = read_peft_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickle = next((name for name in _PICKLES if (folder / name).exists()), None)
        raise ConvertError(
            f"{folder}: has no {WEIGHTS}",
            found=pickle or "no other file of weights",
            todo="pickled weights run code when they are read: save the adapter as safetensors",
        )
    with ExitStack() as stack:
        file = stack.enter_context(SafetensorsFile(LocalFile(path)))
        yield Adapter(folder, config, dict(_pairs(file, config, base)), (folder / CONFIG, path))


def _pairs(file: SafetensorsFile, config: PeftConfig, base: Checkpoint) -> Iterator[tuple[str, Pair]]:
    halves: dict[str, dict[str, str]] = {}  # by the stored module: the names of A and B
    for name, tensor in file.tensors.items():
        match = _HALF.fullmatch(name.removeprefix(_PREFIX))
        if name.endswith(_COPY) and match is None:
            _check_copy(file, name, base)
            continue
        valid = match is not None and (match["embedding"] is None) == (match["weight"] is not None)
        if match is None or not valid or tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            raise ConvertError(
                f"{file.path}: {name!r}",
                expected=f"lora_A or lora_B of a matrix, in {', '.join(FLOATS)}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
                todo="biases, magnitudes, convolutions and whole modules have no form in a LoRA adapter of GGUF",
            )
        half = halves.setdefault(match["module"], {})
        if match["half"] in half:
            raise ConvertError(
                f"{file.path}: {name!r} and {half[match['half']]!r} are of one matrix",
                todo="keep one of the two",
            )
        half[match["half"]] = name
    if not halves:
        raise ConvertError(f"{file.path}: has no pairs", expected="tensors lora_A and lora_B")
    read = lru_cache(_KEPT)(partial(_read, file))
    targets = _targets(base.config, {module.replace(_BASE_LAYER, "") for module in halves})
    seen: dict[str, str] = {}
    for module, half in halves.items():
        for side in "AB":
            if side not in half:
                other = next(iter(half.values()))
                raise ConvertError(
                    f"{file.path}: {other!r} has no lora_{side}",
                    todo="the adapter is incomplete: save it again",
                )
        for name, pair in _pairs_of(file, read, config, base, module, (half["A"], half["B"]), targets):
            if name in seen:
                raise ConvertError(
                    f"{file.path}: {half['A']!r} and {seen[name]!r} are both of {name!r}",
                    todo="keep one of the two",
                )
            seen[name] = half["A"]
            yield name, pair


@dataclass(frozen=True)
class _Target:
    """A canonical tensor that is stored, in some layout, in a tensor of the module."""

    name: str
    shape: tuple[int, ...]
    place: Place


def _targets(config: ModelConfig, modules: set[str]) -> dict[str, list[_Target]]:
    """By module: the canonical tensors in its weight, or in the tensors below it that hold all experts."""
    targets: dict[str, list[_Target]] = {}
    for name, shape in hub_shapes(config).items():
        for place in places_of(config, name, shape):
            parent, _, last = place.stored.rpartition(".")
            module = parent if last == "weight" or len(place.stored_shape) == 3 else None
            if module in modules and place.scales is None:
                targets.setdefault(module, []).append(_Target(name, shape, place))
    return targets


def _pairs_of(
    file: SafetensorsFile,
    read: Callable[[str], Matrix],
    config: PeftConfig,
    base: Checkpoint,
    module: str,
    names: tuple[str, str],
    targets: Mapping[str, list[_Target]],
) -> Iterator[tuple[str, Pair]]:
    """The pairs of the canonical tensors in one stored tensor. names: the stored halves A and B."""
    (ranks, columns), (rows, ranks_of_b) = (file.tensors[name].shape for name in names)
    plain = module.replace(_BASE_LAYER, "")
    candidates = targets.get(plain, [])
    embedding = family_of(base.config).table.embedding.hub
    if not candidates:
        raise ConvertError(
            f"{file.path}: {names[0]!r}: is of no tensor of the base model",
            expected=f"a module of {base.folder}, such as {embedding.removesuffix('.weight')}",
            found=plain,
            todo="give the checkpoint that the adapter was trained on: --base",
        )
    found: dict[tuple[str, bool], list[_Target]] = {}  # by the stored tensor, and whether it is transposed
    for target in candidates:
        if len(target.shape) != 2 or len(target.place.stored_shape) not in (2, 3):
            continue
        *_, out, inner = target.place.stored_shape
        of_embedding = "lora_embedding_" in names[0]
        if (rows, columns) == (out, inner) and not of_embedding:
            found.setdefault((target.place.stored, False), []).append(target)
        # an embedding's matrix is transposed, and in older versions of PEFT those of parameters are
        if (rows, columns) == (inner, out) and (of_embedding or len(target.place.stored_shape) == 3):
            found.setdefault((target.place.stored, True), []).append(target)
        if out == inner and len(target.place.stored_shape) == 3:  # both fit
            found.pop((target.place.stored, not config.transposed_parameters), None)
    if len(found) != 1:
        shapes = sorted({str(list(target.place.stored_shape)) for target in candidates})
        raise ConvertError(
            f"{file.path}: {names[0]!r} [{ranks}, {columns}], {names[1]!r} [{rows}, {ranks_of_b}]",
            expected=f"a pair of a matrix of {base.folder}: {' or '.join(shapes)}",
            found=f"a product of shape [{rows}, {columns}]"
            + (", which fits several tensors" if found else ""),
            todo="adapter and base do not belong together, or the tensor is not a matrix",
        )
    ((stored, transposed), inside), *_ = found.items()
    experts = inside[0].place.stored_shape[0] if len(inside[0].place.stored_shape) == 3 else 1
    rank, expected = ranks // experts, config.rank_of(f"{plain}.{stored.rpartition('.')[2]}", plain)
    if ranks != ranks_of_b or ranks % experts or rank != expected:
        raise ConvertError(
            f"{file.path}: {names[0]!r} [{ranks}, {columns}], {names[1]!r} [{rows}, {ranks_of_b}]",
            expected=f"rank {expected} by {CONFIG}"
            + (f", for each of {experts} experts" if experts > 1 else ""),
            todo="adapter and config do not belong together",
        )
    scale = config.scale_of(rank, f"{plain}.{stored.rpartition('.')[2]}", plain)
    for target in inside:
        matrix, first = divmod(target.place.first, rows * columns)
        yield target.name, Pair(
            file, read, names, rank, scale,
            first_row=first // target.shape[1],
            rows=target.shape[0],
            expert=matrix if experts > 1 else None,
            experts=experts,
            transposed=transposed,
        )  # fmt: skip


def _check_copy(file: SafetensorsFile, name: str, base: Checkpoint) -> None:
    """Raise `ConvertError` unless the copy of an embedding, which PEFT saves with its pair, is that of the base."""
    stored = name.removeprefix(_PREFIX).removesuffix(_COPY) + ".weight"
    tensor = file.tensors[name]
    same = [canonical for canonical, shape in base.shapes.items() if shape == tensor.shape
            and any(place.stored == stored for place in places_of(base.config, canonical, shape))]  # fmt: skip
    step = 1 << 22
    equal = bool(same) and tensor.dtype in FLOATS and all(
        np.array_equal(
            to_float32(file.read(name, first, min(step, tensor.size - first)), Dtype(tensor.dtype)),
            to_float32(base.elements(same[0], first, min(step, tensor.size - first)), base.dtype(same[0])),
        )
        for first in range(0, tensor.size, step)
    )  # fmt: skip
    if not equal:
        raise ConvertError(
            f"{file.path}: {name!r}",
            expected=f"the values of {stored!r} of the base",
            found="others: the adapter changes the whole matrix",
            todo="merge it with PEFT, save the model, and convert that checkpoint",
        )
