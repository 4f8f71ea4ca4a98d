"""Check that every tensor of a GGUF file has the checkpoint's values, within the precision of its type.

Input: a GGUF file made by any converter, an open checkpoint. Output: `TensorProof`.

The expected values are computed here, independently of the converter's code; only its table of names and shapes is
used. Tensors are compared chunk by chunk, so that no whole tensor is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from kimi_gguf.convert.model.config import KimiConfig
from kimi_gguf.convert.model.tensor_table import Output, Transform, outputs
from kimi_gguf.convert.source.checkpoint import Checkpoint, to_float32
from kimi_gguf.engine.gguf import GgufError, GgufModel, GgufTensor
from kimi_gguf.engine.gguf_check import all_parts
from kimi_gguf.validate.errors import ValidateError

Float32s = NDArray[np.float32]
Flags = NDArray[np.bool_]
PIECE = 1 << 22  # elements per chunk; a multiple of every block size
# Q8_0 stores a block's scale in F16, with a relative error of up to 2^-11, but rounds the values with the exact scale.
# The error of a quant q is therefore at most half a step plus |q| times the error of the scale.
STEP_ROUNDING = 2.0**-11
EXP_ULPS = 3  # allowed error of float32 exp in different libraries, in units in the last place
SMALLEST_STEP = 2.0**-25  # half of F16's smallest number: the largest absolute error of a tiny scale
MAX_FAILURES = 20  # failures that are described; the rest are only counted


@dataclass
class TensorProof:
    """Result of the comparison; `proved` is true if no tensor failed."""

    exact: int = 0  # bit-identical tensors: F32, or F16 and BF16 from a checkpoint of the same type
    rounded: int = 0  # F16 and BF16 tensors in which every value is correctly rounded
    quantised: int = 0  # Q8_0 tensors in which every value is within half a step
    # tensors of other types, which are not judged: name -> NMSE
    unproved: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    misfits: int = 0  # failed tensors that are missing, unknown, or have a wrong shape

    @property
    def proved(self) -> bool:
        return self.failed == 0

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


def open_gguf(path: Path) -> GgufModel:
    """Open a GGUF file, or all splits of a model, given the first, which has the metadata.

    Raises ValidateError for a file that is not a readable GGUF file, EngineError for a split that is not the first.
    """
    all_parts(path)
    try:
        return GgufModel(path)
    except GgufError as error:
        raise ValidateError(f"{path}: not a readable GGUF file: {error}") from error


def _shape(ne: Sequence[int]) -> tuple[int, ...]:
    """The shape without trailing dimensions of 1, which some writers keep and others drop."""
    shape = list(ne)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


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
    kind = Kind(tensor.type.number)
    wrong_in = CHECKS.get(kind)
    error = size = 0.0
    exact, first = True, 0
    for each in _comparisons(model, tensor, output, checkpoint):
        wrong = wrong_in(each) if wrong_in else np.zeros(1, bool)
        if wrong.any():
            i = int(wrong.argmax())
            proof.fail(
                f"{tensor.name} ({kind.name}): element {first + i}: expected {each.wanted[i]:.9g}, "
                f"found {each.found[i]:.9g}; {int(wrong.sum())} of {len(wrong)} values in this chunk are wrong"
            )
            return
        exact = exact and bool(np.array_equal(each.found, each.wanted))
        error += float(np.square(each.found - each.wanted, dtype=np.float64).sum())
        size += float(np.square(each.wanted, dtype=np.float64).sum())
        first += len(each.wanted)
    if wrong_in is None:
        proof.unproved[tensor.name] = error / size if size else 0.0
    elif kind == Kind.Q8_0:
        proof.quantised += 1
    elif exact:
        proof.exact += 1
    else:
        proof.rounded += 1


def _comparisons(
    model: GgufModel, tensor: GgufTensor, output: Output, checkpoint: Checkpoint
) -> Iterator[Comparison]:
    """The chunks of the tensor with their expected values, in file order."""
    kind, start = Kind(tensor.type.number), 0
    for wanted in expected_values(output, checkpoint):
        raw = model.read(tensor, start, tensor.type.nbytes((len(wanted),)))
        found = gguf.quants.dequantize(raw, kind).reshape(-1).astype(np.float32, copy=False)
        yield Comparison(raw, found, wanted, output.transform)
        start += raw.nbytes


def _wrong_f32(each: Comparison) -> Flags:
    off = np.abs(each.found - each.wanted)
    allowed = EXP_ULPS * np.spacing(np.abs(each.wanted)) if each.transform is Transform.NEG_EXP else 0
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


CHECKS: dict[Kind, Callable[[Comparison], Flags]] = {
    Kind.F32: _wrong_f32,
    Kind.F16: lambda each: each.found != each.wanted.astype(np.float16).astype(np.float32),
    Kind.BF16: lambda each: each.found != nearest_bf16(each.wanted),
    Kind.Q8_0: _wrong_q8_0,
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
            elements = checkpoint.elements(source, first, min(PIECE, count - first))
            values = to_float32(elements, checkpoint.dtype(source))
            if output.transform is Transform.NEG_EXP:
                values = (-np.exp(values.astype(np.float64))).astype(np.float32)
            yield values


def _from_kv_b(output: Output, kv_b: Float32s, c: KimiConfig) -> Float32s:
    """Split kv_b [heads * (nope + v), latent], which holds each head's key rows followed by its value rows.

    In attn_k_b `nope` is the fastest dimension, in attn_v_b it is `latent`.
    """
    heads = kv_b.reshape(c.num_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
    if output.transform is Transform.K_OF_KV:
        return np.ascontiguousarray(heads[:, : c.qk_nope_head_dim].transpose(0, 2, 1)).reshape(-1)
    return np.ascontiguousarray(heads[:, c.qk_nope_head_dim :]).reshape(-1)
