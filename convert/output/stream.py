"""Reads, checks and encodes the output tensors chunk by chunk, on all cores, in file order.

Input: the checkpoint and the plan. Output: byte arrays in file order. A `Chunk` is a few rows. The number of
chunks in flight is fixed, so that memory does not grow with the model. The output does not depend on the number of
cores. NaN, infinity, and values that the type cannot represent are errors that name file, tensor and index.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Final

import numpy as np

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.tensor_table import PlannedTensor, Transform
from kimi_gguf.convert.plan import Plan
from kimi_gguf.convert.source.checkpoint import Checkpoint
from kimi_gguf.convert.source.safetensors_file import Dtype, to_float32
from kimi_gguf.convert.types.encode import BadValueError, Stored, check, encode
from kimi_gguf.convert.types.ggml import Ggml, load
from kimi_gguf.engine.limits import available_memory
from kimi_gguf.engine.tensor_types import BF16, F16, F32, Bytes, TensorType
from kimi_gguf.engine.toolchain import cores

CHUNK_ELEMENTS: Final = 1 << 20
_ELEMENT_BYTES: Final = 16  # maximum memory per element while it is read, widened and encoded
_BASE_MEMORY: Final = 384 << 20  # the interpreter with numpy, headers, a vocabulary of 160,000 tokens


@dataclass(frozen=True)
class Pace:
    """Limits of the work in flight."""

    threads: int
    chunks: int  # chunks being read, encoded or waiting to be written
    elements: int  # maximum elements of a chunk; rows are never divided

    @classmethod
    def within(cls, max_memory: int | None, threads: int | None = None, elsewhere: int = 0) -> Pace:
        """All cores, or fewer if memory requires it: `max_memory` (bytes of the whole process, of which `elsewhere` are
        reserved for other uses), without it what is available. Raises `ConvertError` if `max_memory` is too little."""
        threads = threads or cores()
        pace = cls(threads, 4 * threads + 2, CHUNK_ELEMENTS)
        most = available_memory() if max_memory is None else max_memory
        if most is None:
            return pace
        base = _BASE_MEMORY + elsewhere
        room = most - base
        while room < pace.memory and pace.elements > 1 << 16:
            pace = cls(pace.threads, pace.chunks, pace.elements // 2)
        while room < pace.memory and pace.chunks > 2:
            pace = cls(max(pace.threads - 1, 1), pace.chunks - 2, pace.elements)
        if max_memory is not None and room < pace.memory:
            least = -(-(base + pace.memory) >> 20)
            raise ConvertError(
                "--max-memory", expected=f"at least {least} MiB", found=f"{max_memory >> 20} MiB"
            )
        return pace

    @property
    def memory(self) -> int:
        """Bytes of all chunks in flight."""
        return self.chunks * self.elements * _ELEMENT_BYTES


@dataclass(frozen=True)
class Chunk:
    """Rows of one output tensor, all from one source."""

    tensor: PlannedTensor
    source: str
    slice: int  # the expert or head: which of the tensor's importances are these rows'
    first: int  # element of the source
    count: int
    read: Callable[[Checkpoint, Chunk], tuple[Stored, Dtype]]  # -> [rows, columns] and their dtype

    @property
    def ranges(self) -> Iterator[tuple[str, int, int]]:
        """What `read` reads, in this order: source, first element, number of elements."""
        yield self.source, self.first, self.count
        if self.tensor.output.factor is not None:
            yield self.tensor.output.factor[0], self.first, self.count


class Rounding:
    """Counts the values of quantized checkpoints that F16 or BF16 does not hold exactly; for several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.values, self.changed, self.most = 0, 0, 0.0  # most: the largest change, relative to the value

    def add(self, exact: Stored, written: Bytes, kind: TensorType) -> None:
        """Count the float32 values `exact`, of which `written` are the bytes."""
        halves = written.view("<u2")
        values = to_float32(halves, Dtype.BF16) if kind is BF16 else halves.view("<f2").astype(np.float32)
        flat = exact.reshape(-1)
        differs = values != flat
        with np.errstate(divide="ignore"):
            changes = np.abs(values[differs] / flat[differs] - 1)
        with self._lock:
            self.values += len(flat)
            self.changed += int(differs.sum())
            self.most = max(self.most, float(changes.max(initial=0)))

    def __str__(self) -> str:
        if not self.changed:
            return f"the file has all {self.values:,} dequantized values exactly"
        return (
            f"{self.changed:,} of {self.values:,} dequantized values were rounded, by at most {self.most:.2%}"
        )


def prepared(checkpoint: Checkpoint, plan: Plan) -> Ggml | None:
    """ggml's quantization functions, prepared for every type of the plan; None if the plan needs none, as for weights
    that keep the type of the checkpoint."""
    kinds = {
        tensor.type.name: tensor.type
        for tensor in plan.tensors
        if tensor.type.quantized
        and any(checkpoint.dtype(source).name != tensor.type.name for source in tensor.output.sources)
    }
    if not kinds:
        return None
    ggml = load()
    for kind in kinds.values():
        ggml.prepare(kind)
    return ggml


def encoded(
    checkpoint: Checkpoint,
    plan: Plan,
    tensors: Sequence[PlannedTensor],
    pace: Pace,
    ggml: Ggml | None = None,
    rounding: Rounding | None = None,
) -> Iterator[tuple[PlannedTensor, Bytes]]:
    """The bytes of `tensors` in order, each chunk with its tensor. Raises `ConvertError`."""

    def work(chunk: Chunk) -> Bytes:
        tensor = chunk.tensor
        weights = plan.weights(tensor) if tensor.type.quantized else None
        if weights is not None:
            columns = tensor.output.ne[0]
            weights = weights[chunk.slice * columns : (chunk.slice + 1) * columns]
        try:
            rows, dtype = chunk.read(checkpoint, chunk)
            written = encode(rows, dtype, tensor.type, weights, ggml)
            if (
                rounding
                and tensor.type in (BF16, F16)
                and dtype is Dtype.F32
                and checkpoint.form(chunk.source)
            ):
                rounding.add(rows, written, tensor.type)
            return written
        except BadValueError as bad:
            raise _complaint(checkpoint, chunk, bad) from None

    def chunks() -> Iterator[Chunk]:
        return (chunk for tensor in tensors for chunk in _chunks(tensor, pace.elements))

    under_way: deque[tuple[PlannedTensor, Future[Bytes]]] = deque()
    pool = ThreadPoolExecutor(pace.threads, "encode")
    try:
        with checkpoint.expecting(wanted for chunk in chunks() for wanted in chunk.ranges):
            for chunk in chunks():
                under_way.append((chunk.tensor, pool.submit(work, chunk)))
                if len(under_way) >= pace.chunks:
                    tensor, done = under_way.popleft()
                    yield tensor, done.result()
            for tensor, done in under_way:
                yield tensor, done.result()
    finally:
        under_way.clear()
        pool.shutdown(wait=True, cancel_futures=True)


def _chunks(tensor: PlannedTensor, elements: int) -> Iterator[Chunk]:
    """The chunks of a tensor, in file order."""
    output = tensor.output
    size = math.prod(output.source_shape)
    for expert, source in enumerate(output.sources):
        if output.transform is Transform.COPY:
            columns = output.ne[0]
            step = max(elements // columns, 1) * columns
            for first in range(0, size, step):
                yield Chunk(tensor, source, expert, first, min(step, size - first), _rows)
        elif output.transform in (Transform.NEG_EXP, Transform.EXP):
            yield Chunk(tensor, source, 0, 0, size, _exp)
        elif output.transform is Transform.PRODUCT:
            yield Chunk(tensor, source, 0, 0, size, _product)
        else:
            yield from _heads(tensor, source)


def _heads(tensor: PlannedTensor, source: str) -> Iterator[Chunk]:
    """kv_b by head: `nope` rows of k, then `v` rows of v."""
    output = tensor.output
    of_k = output.transform is Transform.K_OF_KV
    rank, rows = (output.ne[1], output.ne[0]) if of_k else (output.ne[0], output.ne[1])
    heads = output.ne[2]
    per_head, count = math.prod(output.source_shape) // heads, rank * rows
    for head in range(heads):
        first = head * per_head if of_k else (head + 1) * per_head - count
        yield Chunk(tensor, source, head, first, count, _transposed if of_k else _rows)


def _rows(checkpoint: Checkpoint, chunk: Chunk) -> tuple[Stored, Dtype]:
    values, dtype = (
        checkpoint.elements(chunk.source, chunk.first, chunk.count),
        checkpoint.dtype(chunk.source),
    )
    return values.reshape(chunk.count // chunk.tensor.output.ne[0], -1), dtype


def _transposed(checkpoint: Checkpoint, chunk: Chunk) -> tuple[Stored, Dtype]:
    values, dtype = _rows(checkpoint, chunk)
    return np.ascontiguousarray(values.reshape(chunk.tensor.output.ne[0], -1).T), dtype


def _exp(checkpoint: Checkpoint, chunk: Chunk) -> tuple[Stored, Dtype]:
    """-exp(x) or exp(x), computed in double precision and rounded once."""
    sign = -1 if chunk.tensor.output.transform is Transform.NEG_EXP else 1
    stored, dtype = _rows(checkpoint, chunk)
    check(stored, dtype, F32)
    with np.errstate(over="ignore"):
        exact = sign * np.exp(to_float32(stored, dtype).astype(np.float64))
        values = exact.astype(np.float32)
    if not np.isfinite(values).all():
        at = int(np.argmax(np.abs(exact)))
        raise BadValueError(at, float(exact.flat[at]), beyond=True)
    return values, Dtype.F32


def _product(checkpoint: Checkpoint, chunk: Chunk) -> tuple[Stored, Dtype]:
    """The product with the factor, in float32 as the model's code computes it."""
    factors = []
    for source, first, count in chunk.ranges:
        stored, dtype = checkpoint.elements(source, first, count), checkpoint.dtype(source)
        try:
            check(stored, dtype, F32)
        except BadValueError as bad:
            raise _not_finite(checkpoint, source, bad) from None
        factors.append(to_float32(stored, dtype))
    with np.errstate(over="ignore"):
        values = factors[0] * factors[1]
    if not np.isfinite(values).all():
        raise BadValueError(int(np.argmin(np.isfinite(values))), math.inf, beyond=True)
    return values.reshape(1, -1), Dtype.F32


def _not_finite(
    checkpoint: Checkpoint, source: str, bad: BadValueError, element: int | None = None
) -> ConvertError:
    element = bad.index if element is None else element
    if checkpoint.dtype(source) is Dtype.MXFP4:
        path, stored, index = checkpoint.locate_scale(source, element)
        return ConvertError(
            f"{path}: {stored!r}: element {list(index)}",
            expected="a scale with finite weights",
            found=f"one with {bad.value} (the byte 255 is NaN, 253 and 254 overflow float32)",
            todo="the checkpoint is damaged",
        )
    path, stored, index = checkpoint.locate(source, element)
    return ConvertError(
        f"{path}: {stored!r}: element {list(index)}",
        expected="a finite number",
        found=bad.value,
        todo="the checkpoint is damaged, or its training diverged",
    )


def _complaint(checkpoint: Checkpoint, chunk: Chunk, bad: BadValueError) -> ConvertError:
    element = bad.index
    if chunk.read is _transposed:  # back to the order of the source
        columns = chunk.tensor.output.ne[0]
        row, column = divmod(element, columns)
        element = column * (chunk.count // columns) + row
    if not bad.beyond:
        return _not_finite(checkpoint, chunk.source, bad, chunk.first + element)
    path, stored, index = checkpoint.locate(chunk.source, chunk.first + element)
    kind = chunk.tensor.type
    what = "the checkpoint is damaged" if kind is F32 else "convert to BF16 or F32"
    return ConvertError(
        f"{path}: {stored!r} -> {chunk.tensor.name}: element {list(index)} is "
        f"{bad.value:g}, too large for {kind.name}",
        todo=what,
    )
