"""The proof that a GGUF file has the checkpoint's tensors: its results, and that it finds one wrong bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from convert_tools import edited_tensors, split_safetensors
from random_checkpoint import Spec, write_checkpoint

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.tensors import TensorProof, nearest_bf16, prove

SPEC = Spec(layers="KM", hidden=64, kda_head_dim=32, q_lora=32, seed=3)
LAST_VALUE = {
    "F32": (-4, 1),
    "F16": (-2, 1),
    "BF16": (-2, 1),
    "Q8_0": (-1, 2),
}  # its lowest byte, bits to change


def proof_of(file: Path, checkpoint: Path) -> TensorProof:
    with open_checkpoint(checkpoint) as opened:
        return prove(file, opened)


def converted(folder: Path, kind: str, spec: Spec = SPEC) -> tuple[Path, Path]:
    checkpoint = write_checkpoint(folder / "checkpoint", spec)
    convert(checkpoint, folder / "model.gguf", TYPES[kind])
    return folder / "model.gguf", checkpoint


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_converted_file_is_proved(tmp_path: Path, kind: str) -> None:
    proof = proof_of(*converted(tmp_path, kind))
    assert proof.proved and not proof.failures
    assert (proof.quantised > 0) == (kind == "Q8_0")
    assert (proof.rounded > 1) == (kind == "F16")  # except ssm_a, an exponential of the checkpoint's values


def test_float32_weights_are_correctly_rounded_to_bf16(tmp_path: Path) -> None:
    proof = proof_of(*converted(tmp_path, "BF16", Spec(layers="KM", dtype=torch.float32, seed=4)))
    assert proof.proved and proof.rounded > 10


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("name", ["blk.1.attn_k_b.weight", "blk.1.ffn_down_exps.weight", "token_embd.weight"])
def test_one_wrong_value_is_found_and_named(tmp_path: Path, kind: str, name: str) -> None:
    """The lowest bit of the last value; for Q8_0 two steps (one may still round to within half a step)."""
    file, checkpoint = converted(tmp_path, kind)
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    byte, bits = LAST_VALUE[tensor.tensor_type.name]
    tensor.data.reshape(-1).view(np.uint8)[byte] ^= bits
    reader.data.flush()
    del reader
    proof = proof_of(file, checkpoint)
    assert proof.failed == 1
    assert name in proof.failures[0] and "1 of" in proof.failures[0]


@pytest.mark.parametrize(
    "kind, number, stored",
    [
        ("F16", 1e5, [0, 0x7C]),  # rounds to infinity
        ("F16", np.inf, [0, 0x7C]),
        ("BF16", 3.4e38, [0x80, 0x7F]),
        ("BF16", -np.inf, [0x80, 0xFF]),
        ("BF16", np.uint32(0xFFFFFFFF).view(np.float32), [0, 0]),  # NaN
    ],
)
def test_values_that_are_not_finite_are_found(
    tmp_path: Path, kind: str, number: float, stored: list[int]
) -> None:
    """Other converters write them; an expert that no token of the text chooses does not show them in the logits."""
    file, checkpoint = converted(tmp_path, kind, replace(SPEC, dtype=torch.float32))
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    tensor.data.reshape(-1).view(np.uint8)[:2] = stored
    reader.data.flush()
    del reader, tensor
    name = "model.layers.1.block_sparse_moe.experts.0.w2.weight"
    (path,) = (path for path in checkpoint.glob("*.safetensors") if name in split_safetensors(path)[0])
    with edited_tensors(path) as tensors:
        dtype, shape, content = tensors[name]
        tensors[name] = dtype, shape, np.float32(number).tobytes() + content[4:]
    proof = proof_of(file, checkpoint)
    assert proof.failed == 1 and "blk.1.ffn_down_exps.weight" in proof.failures[0]


def test_a_scale_that_is_off_is_found(tmp_path: Path) -> None:
    """A block's step 1 % too large, with values that fit it: each is within half a step, but coarser."""
    file, checkpoint = converted(tmp_path, "Q8_0")
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    block = tensor.data.reshape(-1).view(np.uint8)[:34]
    values = gguf.quants.dequantize(block.copy(), gguf.GGMLQuantizationType.Q8_0).reshape(-1)
    step = np.float16(block[:2].view(np.float16)[0] * np.float16(1.01))
    block[:2] = np.array([step]).view(np.uint8)
    block[2:] = np.rint(values / np.float32(step)).astype(np.int8).view(np.uint8)
    reader.data.flush()
    del reader
    assert proof_of(file, checkpoint).failed == 1


def test_another_checkpoint_is_told_apart(tmp_path: Path) -> None:
    file, _ = converted(tmp_path, "BF16")
    other = write_checkpoint(tmp_path / "other", replace(SPEC, seed=9))
    assert proof_of(file, other).failed > 30
    more_layers = write_checkpoint(tmp_path / "more", replace(SPEC, layers="KMK"))
    assert any("missing from the file" in failure for failure in proof_of(file, more_layers).failures)


def test_what_is_no_gguf_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SPEC)
    with pytest.raises(ValidateError, match=r"config\.json: not a readable GGUF file"):
        proof_of(checkpoint / "config.json", checkpoint)


def test_nearest_bf16_rounds_ties_to_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159], dtype=np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert nearest_bf16(values).tolist() == expected.tolist()
    assert nearest_bf16(values)[1] == 1.0 and nearest_bf16(values)[2] == np.float32(1 + 2**-6)
