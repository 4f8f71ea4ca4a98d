"""Quantized tensors, whose values depend on the quantizer: correct ones pass, and faults that the NMSE can show fail.

Each fault is made in a copy of the checkpoint, which is converted and then compared with the original.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_tools import write_imatrix
from random_checkpoint import Spec, write_checkpoint
from safetensors.torch import load_file, save_file

from kimi_gguf.convert.conversion import Options, convert
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.ggml import LIBRARY, Ggml
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.tensor_types import TENSOR_TYPES
from kimi_gguf.tools.nmse_table import measure
from kimi_gguf.validate.tensors import (
    NMSE_LIMITS,
    ROW_LIMITED,
    ROW_NMSE_LIMIT,
    SquaredErrors,
    TensorProof,
    dequantize,
    prove,
)

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("engine")]

SPEC = Spec(
    layers="KM", hidden=256, kda_head_dim=128, kv_lora=256, nope=128, v_dim=128, intermediate=256,
    moe_intermediate=256, experts=6, std=0.02, seed=5,
)  # fmt: skip
WEIGHTS = "model.safetensors"
EXPERTS = "model.layers.1.block_sparse_moe.experts"
OUTPUT = "model.layers.1.self_attn.o_proj.weight"
QUANTIZED = [kind for kind in TYPES if TYPES[kind].quantized]

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("quantized") / "checkpoint", SPEC, shards=1)


@pytest.fixture(scope="module")
def imatrix(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix")
    convert(checkpoint, folder / "bf16.gguf", TYPES["BF16"])
    write_imatrix(folder / "imatrix.gguf", folder / "bf16.gguf", every=1)
    return folder / "imatrix.gguf"


@pytest.fixture
def proof_after(
    checkpoint: Path, imatrix: Path, tmp_path: Path
) -> Callable[[str, Callable[[Weights], None] | None], TensorProof]:
    """(type, change) -> what the proof says about a file of this type that was made from changed weights."""

    def proof(kind: str, change: Callable[[Weights], None] | None = None) -> TensorProof:
        source = tmp_path / "changed"
        source.mkdir()
        for file in checkpoint.iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        if change is not None:
            weights = load_file(source / WEIGHTS)
            change(weights)
            save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
        convert(source, tmp_path / "model.gguf", TYPES[kind], Options(imatrix=imatrix))
        with open_checkpoint(checkpoint) as original:
            return prove(tmp_path / "model.gguf", original)

    return proof


Proving = Callable[..., TensorProof]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_correct_file_passes(proof_after: Proving, kind: str) -> None:
    proof = proof_after(kind)
    assert proof.failures == []
    assert proof.proved == (kind == "Q8_0")
    base = TYPES[kind].base.name
    assert base == "Q8_0" or base in {each.type for each in proof.bounded}


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ2_XXS", "TQ2_0", "Q1_0", "Q8_0"])
def test_a_tensor_of_zeros_fails(proof_after: Proving, kind: str) -> None:
    proof = proof_after(kind, lambda weights: weights[OUTPUT].zero_())
    assert proof.failed == 1
    assert proof.failures[0].startswith("blk.1.attn_output.weight (")
    if kind != "Q8_0":
        [tensor] = [each for each in proof.bounded if each.name == "blk.1.attn_output.weight"]
        assert tensor.nmse == 1
        assert f"NMSE: expected at most {tensor.limit:g}, found 1" in proof.failures[0]


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0", "Q2_K", "Q1_0", "Q8_0"])
def test_one_expert_of_zeros_fails(proof_after: Proving, kind: str) -> None:
    """Only a sixth of the tensor's squared norm: the NMSE of the whole tensor would not show it in every type."""
    proof = proof_after(kind, lambda weights: weights[f"{EXPERTS}.3.w1.weight"].zero_())
    assert proof.failed == 1
    assert proof.failures[0].startswith("blk.1.ffn_gate_exps.weight (")
    assert kind == "Q8_0" or "1 of 6 matrices, the first of which is 3" in proof.failures[0]


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0", "Q2_K", "Q1_0", "Q8_0"])
def test_an_expert_swapped_with_another_fails(proof_after: Proving, kind: str) -> None:
    def swap(weights: Weights) -> None:
        first, second = (f"{EXPERTS}.{expert}.w2.weight" for expert in (1, 4))
        weights[first], weights[second] = weights[second], weights[first]

    proof = proof_after(kind, swap)
    assert proof.failed == 1
    assert proof.failures[0].startswith("blk.1.ffn_down_exps.weight (")
    assert kind == "Q8_0" or "2 of 6 matrices, the first of which is 1" in proof.failures[0]


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0", "Q3_K_M", "Q8_0"])
def test_one_wrong_row_fails(proof_after: Proving, kind: str) -> None:
    """One of 512 rows: the matrix's own NMSE is within the limit."""
    proof = proof_after(kind, lambda weights: weights["lm_head.weight"][37].zero_())
    assert proof.failed == 1
    assert proof.failures[0].startswith("output.weight (")
    assert kind == "Q8_0" or "rows, the first of which is 37: expected at most 0.5" in proof.failures[0]


def noisy(share: float) -> Callable[[Weights], None]:
    """Add Gaussian noise of `share` times the standard deviation to a tensor, as a fine-tuned sibling would have."""

    def change(weights: Weights) -> None:
        rng, old = torch.Generator().manual_seed(1), weights[OUTPUT].float()
        noise = share * old.std() * torch.randn(old.shape, generator=rng)
        weights[OUTPUT] = (old + noise).to(weights[OUTPUT].dtype)

    return change


@pytest.mark.parametrize(("kind", "share"), [("Q8_0", 0.003), ("Q4_0", 0.3), ("Q4_K_M", 0.3)])
def test_a_siblings_tensor_fails_if_it_is_far_enough(proof_after: Proving, kind: str, share: float) -> None:
    assert [each.split(" ")[0] for each in proof_after(kind, noisy(share)).failures] == [
        "blk.1.attn_output.weight"
    ]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M"])
def test_a_siblings_tensor_within_the_quantization_error_passes(proof_after: Proving, kind: str) -> None:
    """A limit of this check, which docs/validation.md states."""
    assert proof_after(kind, noisy(0.2)).failed == 0


@pytest.mark.parametrize("name", NMSE_LIMITS)
def test_the_limits_are_above_correct_quantization_and_below_zeros(engine: Engine, name: str) -> None:
    found = [*measure(Ggml(engine.lib / LIBRARY, engine.key), TENSOR_TYPES[name], rows=16)]
    assert max(each.matrix for each in found) < NMSE_LIMITS[name] < 1
    assert name not in ROW_LIMITED or max(each.row for each in found) < ROW_NMSE_LIMIT


def test_every_type_has_a_check() -> None:
    assert NMSE_LIMITS.keys() == {kind.name for kind in TENSOR_TYPES.values() if kind.quantized} - {"Q8_0"}
    assert NMSE_LIMITS.keys() > ROW_LIMITED


def test_the_documented_limits_are_those_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "validation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \|(?: [^|]+ \|){3} ([\d.]+) \| [^|]+ \| ([\d.]*) ?\|$", text, re.MULTILINE)
    assert {name: float(limit) for name, limit, _ in rows} == NMSE_LIMITS
    assert {name: float(row) for name, _, row in rows if row} == dict.fromkeys(ROW_LIMITED, ROW_NMSE_LIMIT)


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0"])
def test_types_that_gguf_lacks_are_dequantized_as_ggml_does(engine: Engine, name: str) -> None:
    kind = TENSOR_TYPES[name]
    raw = np.random.default_rng(3).integers(0, 60, 40 * kind.block_bytes, np.uint8)  # scales below infinity
    expected = np.empty(40 * kind.block, np.float32)
    library = ctypes.CDLL(str(engine.lib / LIBRARY))
    getattr(library, f"dequantize_row_{name.lower()}")(
        ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(expected.ctypes.data), ctypes.c_int64(len(expected))
    )
    assert np.array_equal(dequantize(raw, kind), expected)


def test_squared_errors_are_summed_across_chunks() -> None:
    rng = np.random.default_rng(4)
    wanted = rng.standard_normal((3, 5, 64)).astype(np.float32)
    found = wanted.copy()
    found[1, 2] = 0
    wanted[2, 4] = 0  # a row of zeros counts with a hundredth of the mean row's size
    found[2, 4] = 0
    found[2, 4, 0] = 1
    errors = SquaredErrors((64, 5, 3))
    for first in range(0, wanted.size, 96):
        errors.add(found.reshape(-1)[first : first + 96], wanted.reshape(-1)[first : first + 96])
    sizes = np.square(wanted, dtype=np.float64).sum(2)
    assert errors.matrices() == pytest.approx([0, sizes[1, 2] / sizes[1].sum(), 1 / sizes[2].sum()])
    assert errors.rows()[1] == pytest.approx([0, 0, 1, 0, 0])
    assert errors.rows()[2, 4] == pytest.approx(1 / (0.01 * sizes[2].mean()))
