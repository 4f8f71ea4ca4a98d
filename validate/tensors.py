"""Proof that the tensors of a GGUF file are those of the checkpoint, in the precision that the file promises.

Input: a GGUF file of any origin, an open checkpoint. Output: `TensorProof`.

The checkpoint's side is computed anew here, from names and shapes of the conversion's table but with none of
its arithmetic, and in pieces: no tensor is ever whole in memory.
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
from kimi_gguf.convert.model.tensors import Output, Transform, outputs
from kimi_gguf.convert.source.checkpoint import Checkpoint, to_float32
from kimi_gguf.engine.gguf import GgufError, GgufModel, GgufTensor
from kimi_gguf.engine.gguf_check import all_parts
from kimi_gguf.validate.errors import ValidateError

Float32s = NDArray[np.float32]
Flags = NDArray[np.bool_]
PIECE = 1 << 22  # elements at once; a multiple of every block size
# Q8_0 keeps a block's step in F16, off by up to 2^-11 of itself, and chooses the values by the exact one: a
# value q may be off by half a step and |q| times that.
STEP_ROUNDING = 2.0**-11
EXP_ULPS = 3  # units in the last place by which libraries' float32 exp may be off
SMALLEST_STEP = 2.0**-25  # half of F16's smallest number: by this a tiny block's scale may be off
MAX_FAILURES = 20  # named; the rest are only counted


@dataclass
class TensorProof:
    """What was found; `proved` is the verdict."""

    exact: int = 0  # tensors equal bit for bit: F32 anywhere, F16 and BF16 from the same type
    rounded: int = 0  # tensors whose every value is the correctly rounded one (F16, BF16)
    quantised: int = 0  # Q8_0 tensors whose every value is within half a step
    unproved: dict[str, float] = field(default_factory=dict)  # of other types: name -> NMSE, no verdict
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    misfits: int = 0  # of the failed, tensors that are missing, of another shape, or unknown

    @property
    def proved(self) -> bool:
        return self.failed == 0

    def fail(self, text: str, *, misfit: bool = False) -> None:
        """Count a failure and, of the first few, keep the text."""
        self.failed += 1
        self.misfits += misfit
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(text)


def prove(
    path: Path, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> TensorProof:
    """Compare every tensor of the file with the checkpoint. `progress` gets tensors done and in all.

    Raises ValidateError if the file, or a part of it, is no GGUF.
    """
    with open_gguf(path) as model:
        return _prove(model, checkpoint, progress)


def _prove(
    model: GgufModel, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None
) -> TensorProof:
    stored = model.tensors
    expected = {output.name: output for output in outputs(checkpoint.config)}
    proof = TensorProof()
    for name in sorted(stored.keys() - expected.keys()):
        proof.fail(f"{name}: the checkpoint has nothing like it", misfit=True)
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
    """The model, of several files through the first. Raises ValidateError for a file that is not GGUF, EngineError
    for the name of a file that is not the first."""
    all_parts(path)
    try:
        return GgufModel(path)
    except GgufError as error:
        raise ValidateError(f"{path}: not a readable GGUF file: {error}") from error


def _shape(ne: Sequence[int]) -> tuple[int, ...]:
    """Without the trailing dimensions of 1 that writers keep or drop."""
    shape = list(ne)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


@dataclass(frozen=True)
class Comparison:
    """Some elements of a tensor: as bytes, as the numbers those mean, and as the checkpoint has them."""

    raw: NDArray[np.uint8]
    found: Float32s
    wanted: Float32s
    transform: Transform


def _prove_one(
    model: GgufModel, tensor: GgufTensor, output: Output, checkpoint: Checkpoint, proof: TensorProof
) -> None:
    """Compare one tensor piece by piece and enter the result."""
    kind = Kind(tensor.type.number)
    wrong_in = CHECKS.get(kind)
    error = size = 0.0
    exact, first = True, 0
    for each in _comparisons(model, tensor, output, checkpoint):
        wrong = wrong_in(each) if wrong_in else np.zeros(1, bool)
        if wrong.any():
            i = int(wrong.argmax())
            proof.fail(
                f"{tensor.name} ({kind.name}): element {first + i}: checkpoint {each.wanted[i]:.9g}, "
                f"file {each.found[i]:.9g}; {int(wrong.sum())} of {len(wrong)} values there are wrong"
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
    """The tensor and the checkpoint's values side by side, in the order of the file."""
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


def _wrong_f16(each: Comparison) -> Flags:
    wrong: Flags = each.found != each.wanted.astype(np.float16).astype(np.float32)
    return wrong


def _wrong_bf16(each: Comparison) -> Flags:
    wrong: Flags = each.found != nearest_bf16(each.wanted)
    return wrong


def _wrong_q8_0(each: Comparison) -> Flags:
    """Off by more than half a step, or in a block whose step does not fit its largest value."""
    step = each.raw.reshape(-1, 34)[:, :2].copy().view(np.float16).astype(np.float32)  # [blocks, 1]
    largest = np.abs(each.wanted).reshape(-1, 32).max(1, keepdims=True)
    step_wrong = ~(np.abs(step * 127 - largest) <= 2 * STEP_ROUNDING * largest + 127 * SMALLEST_STEP)
    found = each.found.reshape(-1, 32)
    off = np.abs(found - each.wanted.reshape(-1, 32))
    allowed = 0.5 * step + STEP_ROUNDING * np.abs(found) + 127 * SMALLEST_STEP
    value_wrong = ~(off <= allowed * (1 + 1e-5))  # 1e-5 for float32 in this very line
    wrong: Flags = (value_wrong | step_wrong).reshape(-1)
    return wrong


CHECKS: dict[Kind, Callable[[Comparison], Flags]] = {
    Kind.F32: _wrong_f32,
    Kind.F16: _wrong_f16,
    Kind.BF16: _wrong_bf16,
    Kind.Q8_0: _wrong_q8_0,
}


def nearest_bf16(x: Float32s) -> Float32s:
    """Each value rounded to the nearest bfloat16, ties to even, as float32."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def expected_values(output: Output, checkpoint: Checkpoint) -> Iterator[Float32s]:
    """The output's values in its own order, 1-D pieces of at most PIECE elements (more for kv_b)."""
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
    """kv_b [heads * (nope + v), latent] holds each head's key rows, then its value rows.

    attn_k_b wants keys with `nope` fastest, attn_v_b values with `latent` fastest.
    """
    heads = kv_b.reshape(c.num_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
    if output.transform is Transform.K_OF_KV:
        return np.ascontiguousarray(heads[:, : c.qk_nope_head_dim].transpose(0, 2, 1)).reshape(-1)
    return np.ascontiguousarray(heads[:, c.qk_nope_head_dim :]).reshape(-1)
