"""Random weights for the generated models, made quickly as slices of a pool of encoded rows for each kind of row.

Input: planned tensors. Output: their bytes in chunks. Rows are normal with deviation 1/sqrt(columns), so
that every matmul keeps the scale of its input; gates, norms and convolutions are drawn as models are initialised.
Each slice starts at a random row of the pool, so that tensors do not repeat the same sequence of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.source.safetensors_file import Dtype
from kimi_gguf.convert.types.encode import encode
from kimi_gguf.convert.types.ggml import Ggml
from kimi_gguf.convert.types.mixes import NEED_IMPORTANCES
from kimi_gguf.engine.tensor_types import Bytes, TensorType, Values

POOL_ROWS = 1021  # a prime, so that slices do not line up with heads or experts


@dataclass(frozen=True)
class Gate:
    """How the parameters of KDA's log-gate are drawn."""

    scale: tuple[float, float]  # range of `ssm_a`
    steps: tuple[float, float]  # range of softplus(dt), drawn by its logarithm


# Unbounded: as models are initialised. Bounded: the log-gate is bound * sigmoid(|a| (f + dt)), with an f of about 1.
UNBOUNDED: Final = Gate((-16.0, -1.0), (0.001, 0.1))
BOUNDED: Final = Gate((-2.0, -0.5), (0.01, 1.0))
BOUNDED_POSITIVE: Final = Gate((0.5, 2.0), (0.01, 1.0))


def small_values(name: str, shape: tuple[int, ...], rng: np.random.Generator, gate: Gate) -> Values | None:
    """Values [rows, columns] of tensors that are not weight matrices; None for weight matrices."""
    size = int(np.prod(shape))

    def normal(mean: float, deviation: float) -> Values:
        return (mean + deviation * rng.standard_normal(size, np.float32)).astype(np.float32)

    if name.endswith(("norm.weight", "_base.weight", "_scale.weight")):  # norms, hyper-connections
        values = normal(1.0, 0.1)
    elif name.endswith("ssm_a"):
        values = rng.uniform(*gate.scale, size).astype(np.float32)
    elif name.endswith("ssm_dt.bias"):
        low, high = gate.steps
        step = np.exp(rng.uniform(np.log(low), np.log(high), size))
        values = (step + np.log(-np.expm1(-step))).astype(np.float32)
    elif "ssm_conv1d" in name:
        values = normal(0.0, 0.3)
    elif name.endswith("exp_probs_b.bias"):
        values = normal(0.0, 0.05)
    else:
        return None
    return values.reshape(-1, shape[0])


class Weights:
    """The bytes of planned tensors, deterministic for the same order of calls."""

    def __init__(self, ggml: Ggml, gate: Gate = UNBOUNDED) -> None:
        self._ggml, self._gate = ggml, gate
        self._rng = np.random.default_rng(1)
        self._pools: dict[tuple[str, int], Bytes] = {}  # by type and columns; all rows are stored twice

    def pieces(self, tensors: Sequence[PlannedTensor]) -> Iterator[tuple[PlannedTensor, Bytes]]:
        """The data of all tensors in order, as chunks, each with its tensor."""
        return ((tensor, piece) for tensor in tensors for piece in self.pieces_of(tensor))

    def pieces_of(self, tensor: PlannedTensor) -> Iterator[Bytes]:
        """The data of one tensor in order."""
        ne = tensor.output.ne
        values = small_values(tensor.name, ne, self._rng, self._gate)
        if values is not None:
            yield encode(values, Dtype.F32, tensor.type, ggml=self._ggml)
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
            equal = np.ones(columns, np.float32) if kind.name in NEED_IMPORTANCES else None
            once = encode(np.ascontiguousarray(values), Dtype.F32, kind, equal, self._ggml)
            pool = self._pools[kind.name, columns] = np.tile(once.reshape(POOL_ROWS, -1), (2, 1))
        return pool
