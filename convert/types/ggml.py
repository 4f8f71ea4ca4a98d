"""Calls ggml's quantization functions in the engine's library: float32 rows to the bytes of any block type.

Input: rows of finite numbers, and optionally the importances of their columns. Output: the bytes that llama-quantize
would write, because it calls the same function. Calls release the GIL and are thread-safe.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.engine.builds import EngineError, find
from kimi_gguf.engine.tensor_types import Bytes, TensorType, Values

LIBRARY: Final = "libggml-base.dylib" if sys.platform == "darwin" else "libggml-base.so"


class Ggml:
    """The library of one build; made by `load`."""

    def __init__(self, library: Path, identity: str) -> None:
        self.identity = identity  # of the build, since another one might quantise otherwise
        try:
            found = ctypes.CDLL(str(library))
        except OSError as error:
            raise ConvertError(
                f"{library}: cannot be loaded: {error}; build it again: kimi-llama build"
            ) from None
        self._quantize = found.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        self._init = found.ggml_quantize_init
        self._init.argtypes, self._init.restype = [ctypes.c_int], None
        self._sound = found.ggml_validate_row_data
        self._sound.argtypes, self._sound.restype = [ctypes.c_int, pointer, ctypes.c_size_t], ctypes.c_bool
        self._block = found.ggml_blck_size
        self._block.argtypes, self._block.restype = [ctypes.c_int], ctypes.c_int64
        self._block_bytes = found.ggml_type_size
        self._block_bytes.argtypes, self._block_bytes.restype = [ctypes.c_int], ctypes.c_size_t

    def prepare(self, kind: TensorType) -> None:
        """Make the type's search tables, seconds for some. Raises `ConvertError` for a type it lacks."""
        sizes = self._block(kind.number), self._block_bytes(kind.number)
        if sizes != (kind.block, kind.block_bytes):
            raise ConvertError(
                f"{kind.name}: the engine's ggml has blocks of {sizes[0]} in {sizes[1]} bytes, expected "
                f"{kind.block} in {kind.block_bytes}; build the engine of this version: kimi-llama build"
            )
        self._init(kind.number)

    def quantize(self, kind: TensorType, rows: Values, weights: Values | None, out: Bytes) -> bool:
        """Encode `rows` [n, columns] into `out`; `weights` [columns] are their importances.

        False when a block's scale overflowed: the bytes mean nothing then.
        """
        n, columns = rows.shape
        if not rows.flags.c_contiguous or rows.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError("rows and out must be contiguous, rows float32")
        if columns % kind.block or out.nbytes != rows.size // kind.block * kind.block_bytes:
            raise ValueError(f"{rows.shape} does not make {out.nbytes} bytes of {kind.name}")
        if weights is not None and (weights.shape != (columns,) or weights.dtype != np.float32):
            raise ValueError(f"weights of shape {weights.shape} for {columns} columns")
        place = None if weights is None else np.ascontiguousarray(weights).ctypes.data
        self._quantize(kind.number, rows.ctypes.data, out.ctypes.data, 0, n, columns, place)
        return bool(self._sound(kind.number, out.ctypes.data, out.nbytes))


@cache
def load() -> Ggml:
    """The build that runs (see `engine.builds`). Raises `ConvertError` when there is none."""
    try:
        engine = find()
    except EngineError as error:
        raise ConvertError(str(error)) from None
    if engine is None:
        raise ConvertError(
            "this --type is made by ggml's own quantisers, and no engine is built: run `kimi-llama build` "
            "(minutes, once); F32, F16 and BF16 need none"
        )
    return Ggml(engine.lib / LIBRARY, engine.key)
