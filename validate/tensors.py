"""Check that every tensor of a GGUF file has the checkpoint's values, within the precision of its type.

Input: a GGUF file made by any converter, an open checkpoint. Output: `TensorProof`. F32, F16, BF16 and Q8_0 are proved
value by value, and MXFP4 where the checkpoint has the tensor in MXFP4. The values of the other types depend on the
quantizer and its importance matrix: for them the NMSE is limited.

The expected values are computed here, independently of the converter's code; only its table of names and shapes is
used. Tensors are compared chunk by chunk, so that no whole tensor is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.families import outputs
from kimi_gguf.convert.model.tensor_table import Output, Transform
from kimi_gguf.convert.source.checkpoint import Checkpoint
from kimi_gguf.convert.source.safetensors_file import Dtype
from kimi_gguf.engine.gguf import GgufError, GgufModel, GgufTensor
from kimi_gguf.engine.gguf_check import all_splits
from kimi_gguf.engine.tensor_types import Bytes, TensorType
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.mxfp4 import GROUP, block_quants, not_finite, source_quants, source_values

Float32s = NDArray[np.float32]
Flags = NDArray[np.bool_]
PIECE = 1 << 22  # elements per chunk; a multiple of every block size
# Q8_0 stores a block's scale in F16, with a relative error of up to 2^-11, but rounds the values with the exact scale.
# The error of a quant q is therefore at most half a step plus |q| times the error of the scale.
STEP_ROUNDING = 2.0**-11
EXP_ULPS = 3  # allowed error of float32 exp in different libraries, in units in the last place
SMALLEST_STEP = 2.0**-25  # half of F16's smallest number: the largest absolute error of a tiny scale
MAX_FAILURES = 20  # failures that are described; the rest are only counted

# The largest NMSE of a matrix (a tensor, an expert, a head) by type: about twice the largest that correct quantization
# has (docs/validation.md#limits-of-quantized-tensors), and below 1, the NMSE of a matrix of zeros.
NMSE_LIMITS = {
    "Q4_0": 0.06, "Q4_1": 0.03, "Q5_0": 0.03, "Q5_1": 0.01,
    "Q2_K": 0.3, "Q3_K": 0.1, "Q4_K": 0.06, "Q5_K": 0.02, "Q6_K": 0.02,
    "IQ1_S": 0.8, "IQ1_M": 0.75, "IQ2_XXS": 0.9, "IQ2_XS": 0.75, "IQ2_S": 0.75, "IQ3_XXS": 0.45, "IQ3_S": 0.45,
    "IQ4_NL": 0.06, "IQ4_XS": 0.06, "MXFP4": 0.06, "NVFP4": 0.04,
    "TQ1_0": 0.85, "TQ2_0": 0.85, "Q1_0": 0.95, "Q2_0": 0.75,
}  # fmt: skip
# The same for a row. With the types that are not listed, a correct row can have an NMSE near or above 1.
ROW_NMSE_LIMIT = 0.5
ROW_LIMITED = frozenset(
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4")
)
SMALL_ROW = 0.01  # rows with less than this share of the mean row's squared norm count as having this share
UNIT = 32  # elements that are summed together; rows of block types are a multiple of it


@dataclass(frozen=True)
class Bounded:
    """A tensor that was checked by its NMSE only."""

    name: str
    type: str
    nmse: float  # of the matrix with the largest
    limit: float
    row_nmse: float  # of the row with the largest
    row_limit: float | None


@dataclass(frozen=True)
class TypeSummary:
    """The tensors of one type that were checked by their NMSE only; `nmse` and `row_nmse` are the largest."""

    type: str
    tensors: int
    nmse: float
    limit: float
    row_nmse: float
    row_limit: float | None


@dataclass
class TensorProof:
    """Result of the comparison; `proved` is true if every value of every tensor was proved."""

    exact: int = 0  # bit-identical tensors: F32, or F16 and BF16 from a checkpoint of the same type
    rounded: int = 0  # F16 and BF16 tensors in which every value is correctly rounded
    quantised: int = 0  # Q8_0 tensors in which every value is within half a step
    bounded: list[Bounded] = field(
        default_factory=list
    )  # tensors of other types, also those over their limit
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    misfits: int = 0  # failed tensors that are missing, unknown, or have a wrong shape

    @property
    def proved(self) -> bool:
        return self.failed == 0 and not self.bounded

    @property
    def bounded_types(self) -> list[TypeSummary]:
        """A summary of `bounded` for each type."""
        by_type: dict[str, list[Bounded]] = {}
        for each in self.bounded:
            by_type.setdefault(each.type, []).append(each)
        return [
            TypeSummary(
                kind,
                len(tensors),
                max(tensor.nmse for tensor in tensors),
                tensors[0].limit,
                max(tensor.row_nmse for tensor in tensors),
                tensors[0].row_limit,
            )
            for kind, tensors in by_type.items()
        ]

    def fail(self, text: str, *, misfit: bool = False) -> None:
        """Count a failure; keep the text of the first MAX_FAILURES."""
        self.failed += 1
        self.misfits += misfit
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(text)


def prove(
    path: Path, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> TensorProof:
    """Compare every tensor of the file with the checkpoint.

    `progress` gets the number of tensors done and the total. Raises ValidateError if the file or one of its splits
    is not a readable GGUF file.
    """
    expected = {output.name: output for output in outputs(checkpoint.config)}
    proof = TensorProof()
    with open_gguf(path) as model:
        stored = model.tensors
        for name in sorted(stored.keys() - expected.keys()):
            proof.fail(f"{name}: unexpected tensor, not in the checkpoint", misfit=True)
        for done, (name, output) in enumerate(expected.items(), 1):
            if name not in stored:
                proof.fail(f"{name}: missing from the file", misfit=True)
            elif (found := _shape(stored[name].ne)) != _shape(output.ne):
                proof.fail(f"{name}: expected shape {_shape(output.ne)}, found {found}", misfit=True)
            else:
                _prove_one(model, stored[name], output, checkpoint, proof)
            if progress is not None:
                progress(done, len(expected))
    return proof


def check_layers(path: Path, checkpoint: Checkpoint) -> None:
    """Raise ValidateError for a file whose vocabulary, layers or experts are not those of the checkpoint."""
    ends = ("token_embd.weight", "attn_norm.weight", "ffn_gate_inp.weight")
    expected = {each.name: _shape(each.ne) for each in outputs(checkpoint.config) if each.name.endswith(ends)}
    with open_gguf(path) as model:
        found = {name: _shape(each.ne) for name, each in model.tensors.items() if name.endswith(ends)}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise ValidateError(
                f"{path}: {name}",
                expected=f"{expected.get(name, 'no such tensor')}, as in the checkpoint",
                found=f"{found.get(name, 'no such tensor')}",
                todo="give a file of the same model",
            )


def open_gguf(path: Path) -> GgufModel:
    """Open a GGUF file, or all splits of a model, given the first, which has the metadata.

    Raises ValidateError for a file that is not a readable GGUF file or has no tensors, EngineError for a split that is
    not the first.
    """
    all_splits(path)
    if not path.exists():
        raise ValidateError(f"{path}: no such file")
    try:
        model = GgufModel(path)
    except GgufError as error:
        raise ValidateError(
            f"{path}: not a readable GGUF file: {str(error).removeprefix(f'{path}: ')}"
        ) from error
    if not model.tensors:
        model.close()
        raise ValidateError(f"{path}: expected tensors, found none", todo="give a file with the weights")
    return model


def _shape(ne: Sequence[int]) -> tuple[int, ...]:
    """The shape without trailing dimensions of 1, which some writers keep and others drop."""
    shape = list(ne)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


class SquaredErrors:
    """The squared errors and the squared values of a tensor, summed row by row."""

    def __init__(self, ne: Sequence[int]) -> None:
        self._columns, self._done = ne[0], 0
        shape = (math.prod(ne[2:]), math.prod(ne[1:2]))  # matrices, rows
        self._errors, self._sizes = np.zeros(shape), np.zeros(shape)

    def add(self, found: Float32s, wanted: Float32s) -> None:
        """Add the next elements, in file order; whole units."""
        rows = np.arange(self._done, self._done + len(wanted), UNIT) // self._columns
        for sums, values in ((self._errors, found - wanted), (self._sizes, wanted)):
            units = np.square(values, dtype=np.float64).reshape(-1, UNIT).sum(1)
            sums += np.bincount(rows, units, sums.size).reshape(sums.shape)
        self._done += len(wanted)

    def matrices(self) -> NDArray[np.float64]:
        """The NMSE of every matrix."""
        return _ratio(self._errors.sum(1), self._sizes.sum(1))

    def rows(self) -> NDArray[np.float64]:
        """The NMSE of every row [matrix, row]."""
        least = SMALL_ROW * self._sizes.mean(1, keepdims=True)
        return _ratio(self._errors, np.maximum(self._sizes, least))


def _ratio(errors: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """errors / sizes; 0 if both are zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: NDArray[np.float64] = np.where((errors == 0) & (sizes == 0), 0, errors / sizes)
    return ratio


@dataclass(frozen=True)
class Comparison:
    """A chunk of a tensor: its bytes, their dequantized values, and the values expected from the checkpoint."""

    raw: NDArray[np.uint8]
    found: Float32s
    wanted: Float32s
    transform: Transform


def _prove_one(
    model: GgufModel, tensor: GgufTensor, output: Output, checkpoint: Checkpoint, proof: TensorProof
) -> None:
    """Compare one tensor chunk by chunk and record the result."""
    kind = tensor.type.name
    if kind == "MXFP4" and all(checkpoint.dtype(source) is Dtype.MXFP4 for source in output.sources):
        _prove_copy(model, tensor, output, checkpoint, proof)
        return
    check = CHECKS.get(kind)
    if check is None:
        _bound_one(model, tensor, output, checkpoint, proof)
        return
    exact, first = True, 0
    for each in _comparisons(model, tensor, output, checkpoint):
        wrong = check(each)
        if wrong.any():
            i = int(wrong.argmax())
            proof.fail(
                f"{tensor.name} ({kind}): element {first + i}: expected {each.wanted[i]:.9g}, "
                f"found {each.found[i]:.9g}; {int(wrong.sum())} of {len(wrong)} values in this chunk are wrong"
            )
            return
        exact = exact and bool(np.array_equal(each.found, each.wanted))
        first += len(each.wanted)
    if kind == "Q8_0":
        proof.quantised += 1
    elif exact:
        proof.exact += 1
    else:
        proof.rounded += 1


def _prove_copy(
    model: GgufModel, tensor: GgufTensor, output: Output, checkpoint: Checkpoint, proof: TensorProof
) -> None:
    """Compare a tensor in MXFP4 with a source in MXFP4, bit for bit."""
    start, count = 0, math.prod(output.source_shape)
    for source in output.sources:
        for first in range(0, count, PIECE):
            size = min(PIECE, count - first)
            raw = model.read(tensor, start, tensor.type.nbytes((size,)))
            start += raw.nbytes
            wanted, wanted_scales = source_quants(checkpoint, source, first, size)
            found, scales = block_quants(raw)
            wrong = (found != wanted) | np.repeat(scales != wanted_scales, GROUP)
            infinite = not_finite(wanted, wanted_scales)
            if infinite.any():
                i = int(infinite.argmax())
                proof.fail(
                    f"{tensor.name} (MXFP4): element {first + i} of {source}: expected a finite value, found one with "
                    f"the scale {wanted_scales[i // GROUP]}; the checkpoint is damaged"
                )
                return
            if wrong.any():
                i = int(wrong.argmax())
                proof.fail(
                    f"{tensor.name} (MXFP4): element {first + i} of {source}: expected bits {wanted[i]:#x} with scale "
                    f"{wanted_scales[i // GROUP]}, found {found[i]:#x} with {scales[i // GROUP]}; "
                    f"{int(wrong.sum())} of {size} elements in this chunk are wrong"
                )
                return
    proof.exact += 1


def _bound_one(
    model: GgufModel, tensor: GgufTensor, output: Output, checkpoint: Checkpoint, proof: TensorProof
) -> None:
    """Compare the NMSE of a tensor's matrices and rows with the limits of its type, and record the result."""
    errors, kind = SquaredErrors(tensor.ne), tensor.type.name
    for each in _comparisons(model, tensor, output, checkpoint):
        errors.add(each.found, each.wanted)
    matrices, rows = errors.matrices(), errors.rows()
    limit, row_limit = NMSE_LIMITS[kind], ROW_NMSE_LIMIT if kind in ROW_LIMITED else None
    proof.bounded.append(
        Bounded(tensor.name, kind, float(matrices.max()), limit, float(rows.max()), row_limit)
    )
    over = np.flatnonzero(~(matrices <= limit))
    over_rows = np.argwhere(~(rows <= row_limit)) if row_limit is not None else np.empty((0, 2), int)
    text, found, most = f"{tensor.name} ({kind}): NMSE", float(matrices.max()), limit
    if len(over):
        if len(matrices) > 1:
            text += f" of {len(over)} of {len(matrices)} matrices, the first of which is {over[0]}"
    elif len(over_rows):
        matrix, row = over_rows[0]
        text += f" of {len(over_rows)} of {rows.size} rows, the first of which is {row}"
        text += f" of matrix {matrix}" if len(matrices) > 1 else ""
        found, most = float(rows.max()), ROW_NMSE_LIMIT
    else:
        return
    proof.fail(f"{text}: expected at most {most:g}, found {found:.3g}")


def _comparisons(
    model: GgufModel, tensor: GgufTensor, output: Output, checkpoint: Checkpoint
) -> Iterator[Comparison]:
    """The chunks of the tensor with their expected values, in file order."""
    start = 0
    for wanted in expected_values(output, checkpoint):
        raw = model.read(tensor, start, tensor.type.nbytes((len(wanted),)))
        yield Comparison(raw, dequantize(raw, tensor.type), wanted, output.transform)
        start += raw.nbytes


def dequantize(raw: Bytes, kind: TensorType) -> Float32s:
    """The values of whole blocks, as a 1-D array."""
    values: Float32s
    if kind.name in ("Q1_0", "Q2_0"):
        # The package gguf lacks them. A block is a scale in F16, then quants of 1 or 2 bits, the lowest first.
        blocks = raw.reshape(-1, kind.block_bytes)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32)
        quants = 2 * bits - 1 if kind.name == "Q1_0" else bits[:, ::2] + 2 * bits[:, 1::2] - 1
        values = scale * quants
    else:
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.number))
    return values.reshape(-1).astype(np.float32, copy=False)


def _wrong_f32(each: Comparison) -> Flags:
    off = np.abs(each.found - each.wanted)
    exponential = each.transform in (Transform.NEG_EXP, Transform.EXP)
    allowed = EXP_ULPS * np.spacing(np.abs(each.wanted)) if exponential else 0
    wrong: Flags = ~(off <= allowed)
    return wrong


def _wrong_q8_0(each: Comparison) -> Flags:
    """Values with an error above half a step, and values of blocks whose scale does not match the largest value."""
    step = each.raw.reshape(-1, 34)[:, :2].copy().view(np.float16).astype(np.float32)  # [blocks, 1]
    largest = np.abs(each.wanted).reshape(-1, 32).max(1, keepdims=True)
    step_wrong = ~(np.abs(step * 127 - largest) <= 2 * STEP_ROUNDING * largest + 127 * SMALLEST_STEP)
    found = each.found.reshape(-1, 32)
    off = np.abs(found - each.wanted.reshape(-1, 32))
    allowed = 0.5 * step + STEP_ROUNDING * np.abs(found) + 127 * SMALLEST_STEP
    value_wrong = ~(off <= allowed * (1 + 1e-5))  # 1e-5 covers float32 rounding in this comparison
    wrong: Flags = (value_wrong | step_wrong).reshape(-1)
    return wrong


def _wrong_halves(each: Comparison, rounded: Callable[[Float32s], Float32s]) -> Flags:
    """Values that are not the nearest of the type, and those that are not finite in the file or the checkpoint."""
    with np.errstate(over="ignore"):
        wrong: Flags = each.found != rounded(each.wanted)
    return wrong | ~np.isfinite(each.found) | ~np.isfinite(each.wanted)


CHECKS: dict[str, Callable[[Comparison], Flags]] = {
    "F32": _wrong_f32,
    "F16": lambda each: _wrong_halves(each, lambda x: x.astype(np.float16).astype(np.float32)),
    "BF16": lambda each: _wrong_halves(each, nearest_bf16),
    "Q8_0": _wrong_q8_0,
}


def nearest_bf16(x: Float32s) -> Float32s:
    """Each value rounded to the nearest bfloat16, ties to even, as float32."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def expected_values(output: Output, checkpoint: Checkpoint) -> Iterator[Float32s]:
    """The expected values in file order, as 1-D chunks of at most PIECE elements (kv_b: the whole tensor)."""
    if output.transform in (Transform.K_OF_KV, Transform.V_OF_KV):
        yield _from_kv_b(output, checkpoint.float32(output.sources[0]), checkpoint.config)
        return
    for source in output.sources:
        count = int(np.prod(output.source_shape))
        for first in range(0, count, PIECE):
            values = source_values(checkpoint, source, first, min(PIECE, count - first))
            if output.transform in (Transform.NEG_EXP, Transform.EXP):
                sign = -1 if output.transform is Transform.NEG_EXP else 1
                values = (sign * np.exp(values.astype(np.float64))).astype(np.float32)
            elif output.factor is not None:
                name, _ = output.factor
                values = values * source_values(checkpoint, name, first, len(values))
            yield values


def _from_kv_b(output: Output, kv_b: Float32s, c: ModelConfig) -> Float32s:
    """Split kv_b [heads * (nope + v), latent], which holds each head's key rows followed by its value rows.

    In attn_k_b `nope` is the fastest dimension, in attn_v_b it is `latent`.
    """
    heads = kv_b.reshape(c.num_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
    if output.transform is Transform.K_OF_KV:
        return np.ascontiguousarray(heads[:, : c.qk_nope_head_dim].transpose(0, 2, 1)).reshape(-1)
    return np.ascontiguousarray(heads[:, c.qk_nope_head_dim :]).reshape(-1)
