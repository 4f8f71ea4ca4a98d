"""Random weights for the generated models, made fast: a pool of encoded rows for each kind of row, then slices.

Flows in: planned tensors. Flows out: their bytes in pieces. Rows are normal with deviation 1/sqrt(columns), so
that every product keeps the scale of its input; gates, norms and convolutions are drawn as models are initialised.
No row follows its neighbours' order in another tensor: each slice of the pool begins at a random row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kimi_gguf.convert.plan import PlannedTensor
from kimi_gguf.convert.quantise import Bytes, TensorType

POOL_ROWS = 1021  # a prime, so that slices do not line up with heads or experts

Values = NDArray[np.float32]


class Encoder:
    """ggml's own quantisers out of a build's library."""

    def __init__(self, library: Path) -> None:
        self._ggml = ctypes.CDLL(str(library))
        quantise = self._ggml.ggml_quantize_chunk
        quantise.restype = ctypes.c_size_t
        quantise.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        ]
        self._quantise = quantise

    def __call__(self, kind: TensorType, values: Values) -> Bytes:
        """values: [rows, columns]. Returns the bytes [rows, bytes of a row]."""
        rows, columns = values.shape
        out = np.empty((rows, kind.nbytes([columns])), np.uint8)
        if kind.name == "F32":
            return values.view(np.uint8).reshape(out.shape)
        written = self._quantise(kind.number, values.ctypes.data, out.ctypes.data, 0, rows, columns, None)
        assert written == out.nbytes, (kind.name, written, out.nbytes)
        return out


def small_values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Values | None:
    """Values of the tensors that are no weight matrices, [rows, columns]; None for the others."""
    size = int(np.prod(shape))

    def normal(mean: float, deviation: float) -> Values:
        return (mean + deviation * rng.standard_normal(size, np.float32)).astype(np.float32)

    if name.endswith(("norm.weight",)):
        values = normal(1.0, 0.1)
    elif name.endswith("ssm_a"):
        values = -rng.uniform(1.0, 16.0, size).astype(np.float32)
    elif name.endswith("ssm_dt.bias"):  # softplus of it is a step between 0.001 and 0.1
        step = np.exp(rng.uniform(np.log(0.001), np.log(0.1), size))
        values = (step + np.log(-np.expm1(-step))).astype(np.float32)
    elif "ssm_conv1d" in name:
        values = normal(0.0, 0.3)
    elif name.endswith("exp_probs_b.bias"):
        values = normal(0.0, 0.05)
    else:
        return None
    return values.reshape(-1, shape[0])


class Weights:
    """The bytes of any planned tensor, the same for the same order of calls and seed."""

    def __init__(self, encode: Encoder, seed: int = 1) -> None:
        self._encode = encode
        self._rng = np.random.default_rng(seed)
        self._pools: dict[tuple[str, int], Bytes] = {}  # by type and columns: twice the same rows

    def pieces(self, tensor: PlannedTensor) -> Iterator[Bytes]:
        """The tensor's data in order."""
        ne = tensor.output.ne
        values = small_values(tensor.name, ne, self._rng)
        if values is not None:
            yield self._encode(tensor.type, values).reshape(-1)
            return
        pool = self._pool(tensor.type, ne[0])
        rows = int(np.prod(ne[1:], dtype=np.int64))
        while rows:
            start, count = int(self._rng.integers(POOL_ROWS)), min(rows, POOL_ROWS)
            yield pool[start : start + count].reshape(-1)
            rows -= count

    def _pool(self, kind: TensorType, columns: int) -> Bytes:
        pool = self._pools.get((kind.name, columns))
        if pool is None:
            values = self._rng.standard_normal((POOL_ROWS, columns), np.float32) / np.float32(columns**0.5)
            once = self._encode(kind, np.ascontiguousarray(values))
            pool = self._pools[kind.name, columns] = np.concatenate([once, once])
        return pool
