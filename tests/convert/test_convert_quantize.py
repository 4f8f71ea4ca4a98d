"""Types have ggml's numbers and sizes, casts round correctly, and values beyond a type's range are refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, quants
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kimi_gguf.convert.source.safetensors_file import FLOATS, Dtype
from kimi_gguf.convert.types.encode import BadValueError, encode
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.ggml import load
from kimi_gguf.engine.tensor_types import BF16, F16, F32, TENSOR_TYPES, TensorType

NEWER = {"Q1_0", "Q2_0"}  # than the gguf package that may be installed
CASTS = [F32, F16, BF16]


def cast(values: np.ndarray, kind: TensorType) -> np.ndarray:
    return encode(np.asarray(values, np.float32), Dtype.F32, kind)


def hard_values() -> np.ndarray:
    """Rows of 64 with magnitudes over the whole range of a type, with zeros, ties and subnormals."""
    rng = np.random.default_rng(7)
    wide = rng.normal(size=(400, 64)) * 10.0 ** rng.uniform(-12, 4, (400, 1))
    ties = rng.integers(-254, 255, (50, 64)) / 2.0  # with a maximum of 127 every other value is a half
    ties[:, 0] = 127
    tiny = rng.normal(size=(50, 64)) * 1e-41
    odd = np.zeros((3, 64))
    odd[1, 5] = -0.0
    odd[2, 40] = 1e-30
    steps = np.arange(64)[None] * 2.0**-24 * 1.5  # between half-precision subnormals
    return np.concatenate([wide, ties, tiny, odd, steps]).astype(np.float32)


@pytest.mark.parametrize("kind", CASTS, ids=lambda kind: kind.name)
def test_casts_are_those_of_gguf(kind: TensorType) -> None:
    values = hard_values()
    expected = quants.quantize(values, GGMLQuantizationType[kind.name])
    assert np.array_equal(cast(values, kind), np.ascontiguousarray(expected).view(np.uint8).reshape(-1))


@pytest.mark.engine
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0"])
def test_block_types_that_gguf_can_write_too(name: str) -> None:
    """gguf implements the same arithmetic independently; its two ternary types round halves differently."""
    values = np.random.default_rng(3).normal(size=(40, 256)).astype(np.float32)
    kind = TENSOR_TYPES[name]
    ggml = load()
    ggml.prepare(kind)
    expected = quants.quantize(values, GGMLQuantizationType[name])
    assert np.array_equal(encode(values, Dtype.F32, kind, None, ggml), expected.reshape(-1))


@pytest.mark.parametrize("kind", TENSOR_TYPES.values(), ids=TENSOR_TYPES)
def test_numbers_and_sizes_are_those_of_gguf(kind: TensorType) -> None:
    if kind.name in NEWER and not hasattr(GGMLQuantizationType, kind.name):
        pytest.skip("not in the installed gguf package; the engine's sizes are checked at every run")
    number = GGMLQuantizationType[kind.name]
    assert kind.number == number
    assert (kind.block, kind.block_bytes) == GGML_QUANT_SIZES[number]


@pytest.mark.engine
@pytest.mark.parametrize("kind", TENSOR_TYPES.values(), ids=TENSOR_TYPES)
def test_sizes_are_those_of_the_engine(kind: TensorType) -> None:
    load().prepare(kind)
    assert kind.nbytes((256, 3, 2)) == 6 * 256 // kind.block * kind.block_bytes


@pytest.mark.parametrize("name", TYPES)
def test_file_types_have_the_numbers_of_llama_cpp(name: str) -> None:
    theirs = {f.name.split("_", 1)[-1]: int(f) for f in LlamaFileType}
    if name in NEWER and name not in theirs:
        pytest.skip("not in the installed gguf package; llama-quantize's own keys are compared elsewhere")
    assert TYPES[name].number == theirs[name]


def nearest(value: float, candidates: list[tuple[float, int]]) -> set[int]:
    """The encodings of the representable numbers nearest to `value`; of two equally near ones, the even one."""
    distance = [(abs(Fraction(value) - Fraction(c)), code % 2, code) for c, code in candidates]
    best = min(distance)
    return {code for gap, odd, code in distance if (gap, odd) == best[:2]}


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def from_code(code: int, kind: TensorType) -> float:
    if kind is F16:
        return float(np.uint16(code).view(np.float16))
    return float((np.uint32(code) << np.uint32(16)).view(np.float32))


@pytest.mark.parametrize("kind", [F16, BF16], ids=["F16", "BF16"])
@settings(max_examples=500, deadline=None)
@given(value=finite)
def test_casts_give_the_nearest_number_ties_to_even(kind: TensorType, value: float) -> None:
    assume(abs(value) < kind.limit)
    code = int(cast(np.array([[value]]), kind).view(np.uint16)[0])
    around = [c for c in (code - 1, code, code + 1) if 0 <= c <= 0xFFFF]
    numbers = [(from_code(c, kind), c) for c in around]
    assert code in nearest(value, [(x, c) for x, c in numbers if np.isfinite(x)])


@pytest.mark.parametrize("kind", [F16, BF16], ids=["F16", "BF16"])
def test_the_limit_is_the_first_value_that_overflows(kind: TensorType) -> None:
    limit = np.float32(kind.limit)
    below = np.nextafter(limit, np.float32(0))
    largest = cast(np.array([[below, -below]]), kind).view(np.uint16)
    assert list(largest) == {"F16": [0x7BFF, 0xFBFF], "BF16": [0x7F7F, 0xFF7F]}[kind.name]
    with pytest.raises(BadValueError) as refused:
        cast(np.array([[1, 2], [3, -limit]]), kind)
    assert (refused.value.index, refused.value.value, refused.value.beyond) == (3, -limit, True)


@pytest.mark.parametrize("dtype", map(Dtype, FLOATS), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_the_first_that_is_not_finite_is_found(dtype: Dtype, value: float) -> None:
    values = np.ones((4, 8), np.float32)
    values[2, 5] = values[3, 0] = value
    stored = values.astype(dtype.numpy) if dtype is not Dtype.BF16 else values.view(np.uint16)[:, 1::2]
    with pytest.raises(BadValueError) as refused:
        encode(stored, dtype, F32)
    assert refused.value.index == 21 and not refused.value.beyond
    assert np.array_equal(refused.value.value, value, equal_nan=True)


@pytest.mark.engine
@pytest.mark.parametrize("value", [9e6, 1e30])
def test_a_scale_that_overflows_is_refused(value: float) -> None:
    """Q8_0's scale is 1/127 of the largest number, in half precision."""
    ggml, kind = load(), TENSOR_TYPES["Q8_0"]
    rows = np.ones((3, 64), np.float32)
    rows[1, 7] = -value
    with pytest.raises(BadValueError) as refused:
        encode(rows, Dtype.F32, kind, None, ggml)
    assert refused.value.index == 71 and refused.value.beyond
    rows[1, 7] = 8.3e6
    encode(rows, Dtype.F32, kind, None, ggml)


def test_rows_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="row length 48 is not a multiple of the block size 32"):
        TENSOR_TYPES["Q8_0"].nbytes((48, 2))
