"""MXFP4 of a checkpoint is decoded and compared independently of the converter: its mistakes are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from convert_tools import edited_tensors
from random_k3 import PREFIX, K3Spec, write_checkpoint

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.source import mxfp4 as converters
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.mixes import MXFP4, TypeRequest
from kimi_gguf.validate.mxfp4 import decode, not_finite
from kimi_gguf.validate.probe import reference_of
from kimi_gguf.validate.tensors import TensorProof, prove

SPEC = K3Spec(layers="KKM", seed=6)
REQUESTS = {"MXFP4": MXFP4, "F32": TypeRequest(TYPES["F32"])}
EXPERT = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
Bytes = np.ndarray


def proof_of(file: Path, checkpoint: Path) -> TensorProof:
    with open_checkpoint(checkpoint) as opened:
        return prove(file, opened)


def halves_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[[Bytes, Bytes], Bytes] = converters.blocks
    monkeypatch.setattr(
        converters, "blocks", lambda packed, scales: right((packed >> 4) | (packed << 4), scales)
    )


def scales_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converters, "SCALES", np.append(2 * converters.SCALES[:200], converters.SCALES[200:]))


@pytest.mark.parametrize(
    ("mistake", "kind"), [(halves_swapped, "MXFP4"), (halves_swapped, "F32"), (scales_doubled, "F32")]
)
def test_a_mistake_of_the_converter_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None], kind: str
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SPEC)
    convert(checkpoint, tmp_path / "right.gguf", REQUESTS[kind])
    assert proof_of(tmp_path / "right.gguf", checkpoint).proved
    with open_checkpoint(checkpoint) as opened:
        expected = reference_of(opened, quiet=False).weight(EXPERT)
    mistake(monkeypatch)
    convert(checkpoint, tmp_path / "wrong.gguf", REQUESTS[kind])
    proof = proof_of(tmp_path / "wrong.gguf", checkpoint)
    assert proof.failed == 6 and "_exps.weight" in proof.failures[0]  # three tensors of two layers
    with open_checkpoint(checkpoint) as opened:
        assert reference_of(opened, quiet=False).weight(EXPERT).equal(expected)


def test_the_sign_of_a_zero_is_compared(tmp_path: Path) -> None:
    """A copy is equal bit for bit."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SPEC)
    file = tmp_path / "model.gguf"
    convert(checkpoint, file, MXFP4)
    reader = gguf.GGUFReader(file, "r+")
    blocks = next(t for t in reader.tensors if t.name == "blk.1.ffn_up_exps.weight").data.reshape(-1, 17)
    block, byte = np.argwhere(blocks[:, 1:] & 7 == 0)[0]
    blocks[block, 1 + byte] ^= 8
    reader.data.flush()
    del reader, blocks
    proof = proof_of(file, checkpoint)
    assert proof.failed == 1 and "expected bits 0x" in proof.failures[0]


@pytest.mark.parametrize("scale", [253, 254, 255])
def test_a_copy_of_values_that_are_not_finite_is_refused(tmp_path: Path, scale: int) -> None:
    """convert-kimi refuses such a checkpoint; other converters copy the bits."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SPEC, shards=1)
    file = tmp_path / "model.gguf"
    convert(checkpoint, file, MXFP4)
    with edited_tensors(checkpoint / "model.safetensors") as tensors:
        for name, byte in ((f"{PREFIX}{EXPERT}_scale", scale), (f"{PREFIX}{EXPERT}_packed", 7)):
            dtype, shape, content = tensors[name]
            tensors[name] = dtype, shape, content[:-16] + bytes([byte] * 16)
    reader = gguf.GGUFReader(file, "r+")
    blocks = next(t for t in reader.tensors if t.name == "blk.1.ffn_gate_exps.weight").data
    expert = blocks.reshape(SPEC.experts, -1, 17)[0]
    with open_checkpoint(checkpoint) as opened:
        expert[:] = converters.blocks(*opened.packed_bytes(EXPERT, 0, 64 * 32)).reshape(-1, 17)
    reader.data.flush()
    del reader, blocks, expert
    proof = proof_of(file, checkpoint)
    assert proof.failed == 1 and f"the scale {scale}; the checkpoint is damaged" in proof.failures[0]


def test_which_values_are_not_finite() -> None:
    """Float32 ends before 2^128: 4 * 2^(253 - 127), 2 * 2^(254 - 127)."""
    codes = np.tile(np.arange(16, dtype=np.uint8), 8)
    scales = np.array([252, 253, 254, 255], np.uint8)
    np.testing.assert_array_equal(not_finite(codes, scales), ~np.isfinite(decode(codes, scales)))
    assert not_finite(codes, scales).reshape(4, 32).sum(1).tolist() == [0, 8, 16, 32]


def test_all_sixteen_elements_and_the_ends_of_the_scales() -> None:
    """E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same with a sign. 2^-127 is a subnormal float32; 255 is NaN."""
    sizes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    values = np.array([*sizes, *(-size for size in sizes)] * 2)
    np.testing.assert_array_equal(decode(codes, np.array([127], np.uint8)), values.astype(np.float32))
    smallest = decode(codes, np.array([0], np.uint8))
    np.testing.assert_array_equal(smallest, (values * 2.0**-127).astype(np.float32))
    assert np.isnan(decode(codes, np.array([255], np.uint8))).all()
