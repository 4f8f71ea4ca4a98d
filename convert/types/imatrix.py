"""Reads importance matrices made by llama-imatrix: the importance of each column of a weight.

Input: a file in the GGUF format or the older binary format. Output: `Importances`: for each tensor the weights that
ggml's quantization functions accept, computed in float32 as in llama-quantize. Source: `common/imatrix-loader.cpp`,
`tools/quantize/quantize.cpp` of llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.engine.file_kind import kind_of
from kimi_gguf.engine.gguf import GgufFile
from kimi_gguf.engine.tensor_types import Values

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_MAX_BYTES: Final = 4 << 30
_MAX_NAME: Final = 1024


@dataclass(frozen=True)
class Importances:
    """The weights of an importance matrix by tensor name, 1-D, expert after expert."""

    path: Path
    weights: Mapping[str, Values]
    dataset: str | None
    chunks: int

    def of(self, tensor: str, columns: int) -> Values | None:
        """A tensor's weights; None if it has none, or not one for each column (those of the embedding may not)."""
        found = self.weights.get(tensor)
        return found if found is not None and len(found) == columns else None


def read_importances(path: Path) -> Importances:
    """Read either format. Raises `ConvertError` or `GgufError` if the file is damaged, empty, or not finite."""
    if path.exists() and not path.is_file():
        raise ConvertError(path, expected="an importance matrix", found=kind_of(path))
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        found = _gguf(path) if magic == b"GGUF" else _legacy(path)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror}") from None
    if not found.weights:
        raise ConvertError(path, expected="entries", found="none", todo="make it again with llama-imatrix")
    for name, weights in found.weights.items():
        if not np.isfinite(weights).all():
            found_value = weights[~np.isfinite(weights)][0]
            raise ConvertError(
                f"{path}: {name!r}", expected="finite numbers", found=found_value, todo="make it again"
            )
    return found


def _gguf(path: Path) -> Importances:
    with GgufFile(path) as file:
        if missing := [key for key in (_DATASETS, _CHUNKS, _CHUNK_SIZE) if key not in file.keys]:
            raise ConvertError(f"{path}: missing key {missing[0]}", todo="make it with llama-imatrix")
        datasets, chunks = file.keys[_DATASETS], file.keys[_CHUNKS]
        if not isinstance(datasets, list) or not isinstance(chunks, int):
            types = f"{type(datasets).__name__} and {type(chunks).__name__}"
            raise ConvertError(
                f"{path}: {_DATASETS}, {_CHUNKS}",
                expected="list and int",
                found=types,
                todo="make it with llama-imatrix",
            )
        if not 0 <= chunks < 2**31:
            raise ConvertError(
                f"{path}: {_CHUNKS}", expected=f"0 to {2**31 - 1}", found=chunks, todo="make it again"
            )
        weights: dict[str, Values] = {}
        for full in file.tensors:
            name, suffix = full[: full.rfind(".")], full[full.rfind(".") :]
            if suffix not in (_SUMS, _COUNTS):
                continue
            pair = [file.tensors.get(name + suffix) for suffix in (_SUMS, _COUNTS)]
            if pair[0] is None or pair[1] is None or {t.type.name for t in pair if t} != {"F32"}:
                raise ConvertError(f"{path}: {name!r}", expected=f"{_SUMS} and {_COUNTS}, both F32")
            if suffix == _SUMS:
                sums, counts = (file.read(t).view("<f4") for t in pair if t)
                weights[name] = _means(sums, counts, f"{path}: {name!r}")
        return Importances(path, weights, str(datasets[0]) if datasets else None, chunks)


def _means(sums: Values, counts: Values, where: str) -> Values:
    """Mean squares: each expert's sums divided by its number of calls; ones for an expert without calls."""
    if not np.isfinite(counts).all() or len(sums) % len(counts):
        raise ConvertError(where, expected=f"a multiple of {len(counts)} sums", found=len(sums))
    whole = np.copysign(np.floor(np.abs(counts.astype(np.float64)) + 0.5), counts).astype(np.float32)
    by_expert = sums.reshape(len(counts), -1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        means = np.where(whole[:, None] > 0, by_expert / whole[:, None], np.float32(1))
    return means.reshape(-1).astype(np.float32, copy=False)


def _legacy(path: Path) -> Importances:
    """i32 entries; each: i32 length, name, i32 calls, i32 values, float32 values; then i32 chunks, dataset."""
    if path.stat().st_size > _MAX_BYTES:
        raise ConvertError(path, expected="an importance matrix", found=f"more than {_MAX_BYTES >> 30} GiB")
    data, at = path.read_bytes(), 0

    def fail(what: str) -> ConvertError:
        return ConvertError(
            f"{path}: invalid importance matrix: {what} at byte {at}", todo="make it with llama-imatrix"
        )

    def take(count: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= count <= len(data) - at:
            raise fail(f"{what} ends early")
        at += count
        return data[at - count : at]

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    weights: dict[str, Values] = {}
    for _ in range(number("the number of entries")):
        length = number("a name's length")
        if not 0 < length <= _MAX_NAME:
            raise fail(f"a name of {length} bytes")
        name = take(length, "a name").split(b"\0")[0].decode("utf-8", "replace")
        calls, count = number("a number of calls"), number("a number of values")
        if count < 1:
            raise fail(f"{count} values of {name!r:.80}")
        sums = np.frombuffer(take(4 * count, "the values"), "<f4").astype(np.float32)
        with np.errstate(invalid="ignore"):  # not finite numbers are refused later
            weights[name] = sums / np.float32(calls) if calls > 0 else sums
    chunks, dataset = 0, None
    if at < len(data):
        chunks = number("the number of chunks")
        if len(data) - at > 4:
            text = take(number("the dataset's length"), "the dataset")
            dataset = text.split(b"\0")[0].decode(errors="replace")
    return Importances(path, weights, dataset, chunks)
