"""Quantized weights of a checkpoint as exact float32 values, or as MXFP4 where that is what is stored.

Input: open files and the `Forms` of the config. Output: the same files with one tensor of the model's shape in place of
elements, scales and zero points, so that the rest of the converter sees ordinary weights. Values are decoded range by
range as they are read. element * scale is one product in float32: exact for scales that are powers of two, and for
scales in BF16 or F16 with elements of at most eight bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.stored_forms import CONFIG, E2M1, EXPERT, FP8, INT8, PACKED, Form, Forms
from kimi_gguf.convert.source import mxfp4
from kimi_gguf.convert.source.byte_source import Source
from kimi_gguf.convert.source.safetensors_file import (
    DOUBLE,
    SCALES,
    Dtype,
    SafetensorsFile,
    StoredTensor,
    to_float32,
)

Values = npt.NDArray[np.float32]

_ELEMENTS: Final = {FP8: ("F8_E4M3",), INT8: ("I8",), PACKED: ("I32",), E2M1: ("U8", "I8")}
_FLOATS: Final = ("F32", "BF16", "F16")
_PART: Final = re.compile(r"_(scale|scale_inv|scale_2|zero_point|global_scale|shape)$")  # not the elements
# Of activations, and what the shape of the elements says.
_UNUSED: Final = ("input_scale", "input_global_scale", "weight_shape")
_TODO: Final = "the checkpoint is damaged, or its config is of another one"


def _e4m3() -> Values:
    """Byte -> value: a sign, four bits of exponent with bias 7, three of mantissa; 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent - 10.0))
    size[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


_E4M3: Final = _e4m3()


@dataclass(frozen=True)
class _Part:
    """A stored tensor and its file."""

    file: SafetensorsFile
    name: str

    @property
    def tensor(self) -> StoredTensor:
        return self.file.tensors[self.name]

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """Elements as stored."""
        return self.file.read(self.name, first, count)

    def floats(self, first: int, count: int) -> Values:
        """Elements of a tensor of scales."""
        stored, dtype = self.read(first, count), self.tensor.dtype
        if dtype in _FLOATS:
            return to_float32(stored, Dtype(dtype))
        return np.asarray((_E4M3 if dtype == FP8 else mxfp4.SCALES)[stored])


@dataclass(frozen=True)
class _Matrix:
    """A quantized tensor [..., rows, columns]."""

    form: Form
    shape: tuple[int, ...]
    in_blocks: bool  # kept in MXFP4: a routed expert
    elements: _Part
    scales: _Part
    zeros: _Part | None
    whole: _Part | None

    @property
    def parts(self) -> tuple[_Part, ...]:
        return tuple(part for part in (self.elements, self.scales, self.zeros, self.whole) if part)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of a matrix along rows and columns."""
        sizes = zip(self.shape[-2:], self.form.block, strict=True)
        rows, columns = (1 if size is None else -(-n // size) for n, size in sizes)
        return rows, columns

    def reads(self, first: int, count: int) -> tuple[tuple[_Part, int, int], ...]:
        """What is read for a range of elements, in the order of `parts`: part, first element, number of elements."""
        if self.in_blocks:
            halves, groups = (self.elements, 2), (self.scales, mxfp4.GROUP)
            return tuple((part, first // per, count // per) for part, per in (halves, groups))
        row, rows = self._rows(first, count)
        words, width, per_word = self.elements.tensor.shape[-1], self.grid[1], 32 // self.form.bits
        low, last = map(int, self._block_rows(np.array([row, row + rows - 1])))
        end = last + 1
        ranges = [(self.elements, row * words, rows * words), (self.scales, low * width, (end - low) * width)]
        if self.zeros is not None:
            if self.form.elements == PACKED:  # packed along the rows of blocks
                low, end = low // per_word, -(-end // per_word)
            ranges.append((self.zeros, low * width, (end - low) * width))
        if self.whole is not None:
            ranges.append((self.whole, 0, 1))
        return tuple(ranges)

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """A range of elements of all matrices, one after the other, 1-D: float32, or blocks of MXFP4."""
        (elements, *place), (scales, *scales_place), *others = self.reads(first, count)
        stored = elements.read(*place)
        if self.in_blocks:
            return mxfp4.blocks(stored.view(np.uint8), scales.read(*scales_place))
        row, rows = self._rows(first, count)
        columns, width = self.shape[-1], self.grid[1]
        blocks = self._block_rows(np.arange(row, row + rows))
        out = self._codes(stored.reshape(rows, -1), columns)
        factors = scales.floats(*scales_place).reshape(-1, width)
        if self.zeros is not None:
            zeros, at, size = others[0]
            points, offset = zeros.read(at, size).reshape(-1, width), blocks[0]
            if self.form.elements == PACKED:
                points = _unpacked(np.ascontiguousarray(points.T), self.form.bits).T
                offset = at // width * (32 // self.form.bits)
            out -= self._spread(np.asarray(points, np.float32)[blocks - offset], columns)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            if self.whole is not None:
                factor = self.whole.floats(0, 1)
                factors = factors / factor if self.form.divides else factors * factor
            out *= self._spread(factors[blocks - blocks[0]], columns)
        return out.reshape(-1)[first - row * columns :][:count]

    def _rows(self, first: int, count: int) -> tuple[int, int]:
        """The first row of a range of elements, and the number of rows."""
        columns = self.shape[-1]
        row = first // columns
        return row, -(-(first + count) // columns) - row

    def _codes(self, stored: npt.NDArray[Any], columns: int) -> Values:
        form = self.form
        if form.elements in (FP8, INT8):
            return np.asarray(_E4M3[stored] if form.elements == FP8 else stored, np.float32)
        if form.elements == E2M1:
            return np.asarray(mxfp4.PAIRS[stored.view(np.uint8)].reshape(len(stored), -1))
        return np.asarray(_unpacked(stored, form.bits)[:, :columns])

    def _block_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The row of blocks of each row."""
        height = self.form.block[0]
        matrix, row = np.divmod(rows, self.shape[-2])
        return matrix * self.grid[0] + (0 if height is None else row // height)

    def _spread(self, blocks: Values, columns: int) -> Values:
        """[rows, blocks] -> [rows, columns], or what numpy broadcasts to it."""
        width = self.form.block[1]
        return blocks if width is None else np.repeat(blocks, width, axis=1)[:, :columns]


def _unpacked(words: npt.NDArray[Any], bits: int) -> Values:
    """Words [..., n] -> signed elements [..., n * 32 / bits], the lowest bits first; stored with an offset."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1).astype(np.float32) - np.float32(1 << (bits - 1))


class DecodedFile:
    """A file with decoded tensors among its own; for `Checkpoint` like a `SafetensorsFile`."""

    def __init__(self, file: SafetensorsFile, matrices: Mapping[str, _Matrix], hidden: set[str]) -> None:
        self._file = file
        self._matrices = matrices
        self.path, self.source, self.header_hash = file.path, file.source, file.header_hash
        shown = {name: tensor for name, tensor in file.tensors.items() if name not in hidden}
        shown |= {
            name: StoredTensor(name, "MXFP4" if matrix.in_blocks else "F32", matrix.shape, 0, 0)
            for name, matrix in matrices.items()
        }
        self.tensors: Mapping[str, StoredTensor] = shown
        # those with the tensors' scales too
        self._files = {file, *(part.file for matrix in matrices.values() for part in matrix.parts)}

    def form(self, name: str) -> tuple[Form, int] | None:
        """In which form a tensor is stored, in how many bytes; None if it is not decoded."""
        matrix = self._matrices.get(name)
        tensors = (part.tensor for part in matrix.parts) if matrix else ()
        return (matrix.form, sum(tensor.end - tensor.begin for tensor in tensors)) if matrix else None

    def scales(self, name: str) -> tuple[PurePath, str]:
        """File and name of a decoded tensor's scales."""
        scales = self._matrices[name].scales
        return scales.file.path, scales.name

    def read(self, name: str, first: int, count: int) -> npt.NDArray[Any]:
        """As of a `SafetensorsFile`: decoded elements in float32, or blocks of MXFP4."""
        matrix = self._matrices.get(name)
        return self._file.read(name, first, count) if matrix is None else matrix.read(first, count)

    def spans(self, name: str, first: int, count: int) -> Iterator[tuple[Source, int, int]]:
        """Where what `read` reads for this range is stored."""
        matrix = self._matrices.get(name)
        if matrix is None:
            yield from self._file.spans(name, first, count)
            return
        for part, at, size in matrix.reads(first, count):
            yield from part.file.spans(part.name, at, size)

    def identity(self) -> bytes:
        """As of a `SafetensorsFile`."""
        return self._file.identity()

    def check_unchanged(self, thoroughly: bool = False) -> None:
        """The same for the file, and for the files of its tensors' scales."""
        for file in self._files:
            file.check_unchanged(thoroughly)


def decoded(
    forms: Forms, files: Mapping[PurePath, SafetensorsFile], where: Mapping[str, PurePath]
) -> tuple[dict[PurePath, DecodedFile], dict[str, PurePath]]:
    """The files with decoded tensors, and the file of each tensor. Reads no data. Raises `ConvertError`."""
    matrices: dict[PurePath, dict[str, _Matrix]] = {path: {} for path in files}
    hidden: set[str] = set()
    for stored, path in where.items():
        dtype = files[path].tensors[stored].dtype
        if dtype in (*_FLOATS, DOUBLE) or _PART.search(stored):
            continue
        base = stored.removesuffix("_packed")
        module = base.removesuffix(".weight")
        form = forms(module)
        if form is None or stored != base + form.suffix:
            raise ConvertError(
                f"{path}: {stored!r}",
                expected="weights that are not quantized" if form is None else f"{base + form.suffix!r}",
                found=dtype,
                todo=f"{CONFIG} does not describe this tensor: {_TODO}",
            )
        matrix = _matrix(form, base, files, where)
        matrices[path][base] = matrix
        hidden |= {part.name for part in matrix.parts}
        hidden |= {name for end in _UNUSED if (name := f"{module}.{end}") in where}
    made = {path: DecodedFile(file, matrices[path], hidden) for path, file in files.items()}
    return made, {name: path for path, file in made.items() for name in file.tensors}


def _matrix(
    form: Form, base: str, files: Mapping[PurePath, SafetensorsFile], where: Mapping[str, PurePath]
) -> _Matrix:
    def part(suffix: str) -> _Part:
        name = base + suffix
        if name not in where:
            raise ConvertError(
                f"{where[base + form.suffix]}: {base + form.suffix!r}: missing tensor {name!r}", todo=_TODO
            )
        return _Part(files[where[name]], name)

    elements, scales = part(form.suffix), part(form.scales)
    per = {E2M1: 2, PACKED: 32 // form.bits}.get(form.elements, 1)
    *outer, words = elements.tensor.shape or (0,)
    zeros, whole = part("_zero_point") if form.zeros else None, part(form.whole) if form.whole else None
    in_blocks = form.mxfp4 and bool(EXPERT.fullmatch(base.removesuffix(".weight")))
    matrix = _Matrix(form, (*outer, words * per), in_blocks, elements, scales, zeros, whole)
    if len(outer) not in (1, 2) or (len(outer) == 2 and form.zeros):
        raise _wrong(elements, "a matrix", list(elements.tensor.shape))
    if elements.tensor.dtype not in _ELEMENTS[form.elements]:
        raise _wrong(elements, f"dtype {' or '.join(_ELEMENTS[form.elements])}", elements.tensor.dtype)
    width = form.block[1]
    if width is not None and form.elements in (E2M1, PACKED) and matrix.shape[-1] % width:
        raise _wrong(elements, f"columns in groups of {width}", matrix.shape[-1])
    grid = (*outer[:-1], *matrix.grid)
    _check_scales(form, scales, grid)
    if zeros is not None and form.elements == PACKED:
        grid = (*outer[:-1], -(-grid[-2] // per), grid[-1])
    if zeros is not None and (zeros.tensor.dtype != form.elements or zeros.tensor.size != math.prod(grid)):
        raise _wrong(
            zeros, f"{form.elements} {list(grid)}", f"{zeros.tensor.dtype} {list(zeros.tensor.shape)}"
        )
    if whole is not None and (whole.tensor.dtype != "F32" or whole.tensor.size != 1):
        raise _wrong(whole, "one number in F32", f"{whole.tensor.dtype} {list(whole.tensor.shape)}")
    return matrix


def _check_scales(form: Form, scales: _Part, grid: tuple[int, ...]) -> None:
    tensor = scales.tensor
    allowed: tuple[str, ...] = _FLOATS
    if form.elements == E2M1:
        allowed = SCALES if form.mxfp4 else ("F8_E4M3",)
    elif form.scales == "_scale_inv":
        allowed = (*_FLOATS, *SCALES)
    if tensor.dtype not in allowed:
        raise _wrong(scales, f"dtype {' or '.join(allowed)}", tensor.dtype)
    if tensor.shape != grid and not (tensor.size == math.prod(grid) == 1):
        raise _wrong(scales, f"shape {list(grid)}", list(tensor.shape))


def _wrong(part: _Part, expected: str, found: object) -> ConvertError:
    return ConvertError(f"{part.file.path}: {part.name!r}", expected=expected, found=found, todo=_TODO)
