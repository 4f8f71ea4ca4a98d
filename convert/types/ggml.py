"""Calls ggml's quantization functions in the engine's library: float32 rows to the bytes of any block type.

Input: rows of finite numbers, and optionally the importances of their columns. Output: the bytes that llama-quantize
would write, because it calls the same function. Calls release the GIL and are thread-safe.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.engine.builds import find
from kimi_gguf.engine.tensor_types import Bytes, TensorType, Values
from kimi_gguf.patches.errors import KimiError

LIBRARY: Final = "libggml-base.dylib" if sys.platform == "darwin" else "libggml-base.so"


class Ggml:
    """The library of one build; made by `load`."""

    def __init__(self, library: Path, identity: str) -> None:
        self.identity = identity  # of the build: another one may quantize differently
        try:
            found = ctypes.CDLL(str(library))
        except OSError as error:
            raise ConvertError(
                f"{library}: cannot be loaded: {error}", todo="run `kimi-llama build`"
            ) from None
        pointer, kind, size, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_int64

        def function(name: str, result: Any, *arguments: Any) -> Any:
            symbol = getattr(found, name)
            symbol.restype, symbol.argtypes = result, arguments
            return symbol

        chunk = (kind, pointer, pointer, number, number, number, pointer)
        self._quantize = function("ggml_quantize_chunk", size, *chunk)
        self._init = function("ggml_quantize_init", None, kind)
        self._is_valid = function("ggml_validate_row_data", ctypes.c_bool, kind, pointer, size)
        self._block = function("ggml_blck_size", number, kind)
        self._block_bytes = function("ggml_type_size", size, kind)

    def prepare(self, kind: TensorType) -> None:
        """Make the type's search tables, which takes seconds for some types. Raises `ConvertError` if the build does
        not have the type."""
        sizes = self._block(kind.number), self._block_bytes(kind.number)
        if sizes != (kind.block, kind.block_bytes):
            raise ConvertError(
                kind.name,
                expected=f"blocks of {kind.block} elements in {kind.block_bytes} bytes",
                found=f"{sizes[0]} in {sizes[1]}",
                todo="build llama.cpp again: kimi-llama build",
            )
        self._init(kind.number)

    def quantize(self, kind: TensorType, rows: Values, weights: Values | None, out: Bytes) -> bool:
        """Encode `rows` [n, columns] into `out`; `weights` [columns] are their importances.

        False if a block's scale overflowed; the bytes are then invalid.
        """
        n, columns = rows.shape
        if not rows.flags.c_contiguous or rows.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError("rows and out must be contiguous, rows float32")
        if columns % kind.block or out.nbytes != rows.size // kind.block * kind.block_bytes:
            raise ValueError(f"{rows.shape} does not make {out.nbytes} bytes of {kind.name}")
        if weights is not None and (weights.shape != (columns,) or weights.dtype != np.float32):
            raise ValueError(f"weights of shape {weights.shape} for {columns} columns")
        if weights is None and kind.needs_weights:
            raise ValueError(f"{kind.name} requires importances")  # ggml would end the process
        place = None if weights is None else np.ascontiguousarray(weights).ctypes.data
        self._quantize(kind.number, rows.ctypes.data, out.ctypes.data, 0, n, columns, place)
        return bool(self._is_valid(kind.number, out.ctypes.data, out.nbytes))


@cache
def load() -> Ggml:
    """The library of the build in use (see `engine.builds`). Raises `ConvertError` if there is none."""
    try:
        engine = find()
    except KimiError as error:
        raise ConvertError(str(error)) from None
    if engine is None:
        raise ConvertError(
            "--type",
            expected="a build of llama.cpp, whose functions quantize to this type",
            found="none",
            todo="run `kimi-llama build` (minutes, once), or use F32, F16 or BF16",
        )
    return Ggml(engine.lib / LIBRARY, engine.key)
