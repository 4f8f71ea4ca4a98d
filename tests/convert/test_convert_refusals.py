"""Checkpoints that cannot be converted correctly are refused with names: tensors, values, index, header, files."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_tools import assert_refused, convert, edit_header, edited_json, edited_tensors, fresh_checkpoint
from random_checkpoint import Spec

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.source.checkpoint import open_checkpoint

SPEC = Spec(layers="KMK", experts=8)


Tensors = dict[str, tuple[str, list[int], bytes]]
MOE = "model.layers.1.block_sparse_moe."
Q = "model.layers.0.self_attn.q_proj.weight"


def reshape(name: str, shape: list[int]) -> Callable[[Tensors], object]:
    return lambda t: t.update({name: (t[name][0], shape, t[name][2])})


def poke(name: str, element: int, value: float) -> Callable[[Tensors], object]:
    """Overwrite one element of a BF16 or F32 tensor."""

    def change(tensors: Tensors) -> None:
        dtype, shape, content = tensors[name]
        size = {"BF16": 2, "F32": 4}[dtype]
        packed = struct.pack("<f", value)[4 - size :]
        at = element * size
        tensors[name] = (dtype, shape, content[:at] + packed + content[at + size :])

    return change


def add(name: str, dtype: str, shape: list[int]) -> Callable[[Tensors], object]:
    """Add a tensor of zeros, or replace one."""
    size = {"F64": 8, "F32": 4, "BF16": 2, "I16": 2, "F8_E4M3": 1}[dtype]
    return lambda t: t.update({name: (dtype, shape, bytes(size * math.prod(shape)))})


def lose(name: str) -> Callable[[Tensors], object]:
    return lambda t: t.pop(name)


# (what is wrong, the change to valid tensors, words of the error)
TENSORS: list[tuple[str, Callable[[Tensors], object], list[str]]] = [
    ("missing", lose(Q), ["missing", Q]),
    ("missing expert", lose(f"{MOE}experts.7.w2.weight"), ["missing", "experts.7.w2"]),
    ("missing routing bias", lose(f"{MOE}gate.e_score_correction_bias"), ["missing", "e_score_correction"]),
    ("bias", add("model.layers.0.self_attn.q_proj.bias", "F32", [64]), ["unexpected", "q_proj.bias"]),
    ("another layer", add("model.layers.3.input_layernorm.weight", "BF16", [64]), ["unexpected", "layers.3"]),
    ("expert too many", add(f"{MOE}experts.8.w1.weight", "BF16", [32, 64]), ["unexpected", "experts.8"]),
    ("transposed", reshape("model.layers.0.self_attn.f_a_proj.weight", [64, 32]), ["[32, 64]", "[64, 32]"]),
    ("huge shape", reshape(Q, [10**4000, 10**4000]), [Q, "whole numbers below 2^63"]),
    ("flattened", reshape(Q, [4096]), [Q, "[64, 64]", "[4096]"]),
    ("integers", add("model.norm.weight", "I16", [64]), ["model.norm.weight", "I16"]),
    ("float8", add(Q, "F8_E4M3", [64, 64]), [Q, "F8_E4M3"]),
    ("NaN", poke(Q, 65, math.nan), [Q, "[1, 1]", "nan"]),
    ("infinity", poke(f"{MOE}experts.3.w1.weight", 64, math.inf), ["experts.3.w1", "[1, 0]", "inf"]),
    ("NaN in kv_b", poke("model.layers.1.self_attn.kv_b_proj.weight", 64 * 33 + 5, math.nan), ["[33, 5]"]),
    ("infinite A_log", poke("model.layers.2.self_attn.A_log", 1, -math.inf), ["A_log", "[0, 0, 1, 0]"]),
    ("overflow of exp", poke("model.layers.2.self_attn.A_log", 1, 89.0), ["A_log", "blk.2.ssm_a"]),
]


@pytest.mark.parametrize("change, words", [c[1:] for c in TENSORS], ids=[c[0] for c in TENSORS])
def test_tensor_is_refused(
    single: Path, out: Path, change: Callable[[Tensors], object], words: list[str]
) -> None:
    with edited_tensors(single / "model.safetensors") as tensors:
        change(tensors)
    assert_refused(convert(single, "-o", out / "x.gguf"), out, *words)


def test_nan_in_a_fused_tensor_is_named_with_its_index(tmp_path: Path, out: Path) -> None:
    """In the fused experts, the row of w3 (up) of expert 5 follows its 32 rows of w1."""
    folder = fresh_checkpoint(tmp_path / "model", SPEC, "native", shards=1)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with edited_tensors(folder / "model.safetensors") as tensors:
        poke(name, (5 * 64 + 32 + 4) * 64 + 7, math.nan)(tensors)
    assert_refused(convert(folder, "-o", out / "x.gguf"), out, name, "[5, 36, 7]")


@pytest.mark.parametrize("kind, value", [("F16", 65520.0), ("BF16", 3.4e38), ("Q8_0", 9e6)])
def test_number_too_large_for_the_type_is_refused(tmp_path: Path, out: Path, kind: str, value: float) -> None:
    spec = Spec(layers="KM", dtype=torch.float32)
    folder = fresh_checkpoint(tmp_path / "model", spec, shards=1)
    with edited_tensors(folder / "model.safetensors") as tensors:
        poke(Q, 7, -value)(tensors)
    assert_refused(convert(folder, "-o", out / "x.gguf", "--type", kind), out, Q, "blk.0.attn_q.weight", kind)
    assert convert(folder, "-o", out / "x.gguf", "--type", "F32").status == 0


Index = dict[str, Any]


def move(name: str, file: str) -> Callable[[Index], object]:
    return lambda i: i["weight_map"].update({name: file})


INDEXES: list[tuple[str, Callable[[Index], object], list[str]]] = [
    ("absolute path", move(Q, "/etc/model.safetensors"), [Q, "/etc/model.safetensors", "outside"]),
    ("climbing path", move(Q, "../model-00001-of-00002.safetensors"), [Q, "outside"]),
    ("climbing in the middle", move(Q, "a/../../x.safetensors"), [Q, "outside"]),
    ("Windows drive", move(Q, "C:\\model.safetensors"), [Q, "outside"]),
    ("climbing Windows path", move(Q, "..\\model.safetensors"), [Q, "outside"]),
    ("NUL in a path", move(Q, "a\0.safetensors"), [Q, "file name"]),
    ("half a character in a path", move(Q, "\ud800.safetensors"), [Q, "file name"]),
    ("pickle", move(Q, "model-00001.bin"), [Q, "safetensors"]),
    ("number", lambda i: i["weight_map"].update({Q: 1}), [Q, "file name"]),
    ("missing shard", move(Q, "model-00003-of-00002.safetensors"), ["model-00003", "not found"]),
    ("wrong shard", move(Q, "model-00002-of-00002.safetensors"), ["in model-00002", "in model-00001"]),
    ("tensor that no shard has", move("ghost", "model-00001-of-00002.safetensors"), ["'ghost'", "missing"]),
    ("tensor left out", lambda i: i["weight_map"].pop(Q), [Q, "unexpected", "does not list"]),
    ("empty", lambda i: i.update(weight_map={}), ["weight_map"]),
    ("no weight map", lambda i: i.pop("weight_map"), ["weight_map"]),
    ("weight map as list", lambda i: i.update(weight_map=[Q]), ["weight_map"]),
]


@pytest.mark.parametrize("change, words", [c[1:] for c in INDEXES], ids=[c[0] for c in INDEXES])
def test_index_is_refused(
    source: Path, out: Path, change: Callable[[Index], object], words: list[str]
) -> None:
    with edited_json(source / "model.safetensors.index.json") as index:
        change(index)
    assert_refused(convert(source, "-o", out / "x.gguf"), out, *words)


@pytest.mark.parametrize("name, home, other", [(Q, 1, 2), ("lm_head.weight", 2, 1)])
def test_a_tensor_in_two_shards_is_refused(source: Path, out: Path, name: str, home: int, other: int) -> None:
    """Whichever shard the index names."""
    with edited_tensors(source / f"model-0000{home}-of-00002.safetensors") as tensors:
        copy = tensors[name]
    with edited_tensors(source / f"model-0000{other}-of-00002.safetensors") as tensors:
        tensors[name] = copy
    run = convert(source, "-o", out / "x.gguf")
    assert_refused(run, out, name, "model-00001", "model-00002", "is also in")


Header = dict[str, Any]


def offsets(name: str, begin: int, end: int) -> Callable[[Header], object]:
    def change(header: Header) -> None:
        first, last = header[name]["data_offsets"]
        header[name]["data_offsets"] = [first + begin, last + end]

    return change


HEADERS: list[tuple[str, Callable[[Header], object], list[str]]] = [
    ("overlap", offsets(Q, -2, -2), ["overlaps"]),
    ("gap", lambda h: h.pop(Q), ["gap"]),
    ("offsets after the end of the file", offsets(Q, 1 << 40, 1 << 40), [Q, "inside"]),
    ("negative offset", lambda h: h[Q].update(data_offsets=[-1, 8191]), [Q, "inside"]),
    ("backward offsets", lambda h: h[Q]["data_offsets"].reverse(), [Q, "inside"]),
    ("size unlike the shape", lambda h: h[Q].update(shape=[64, 63]), [Q, "bytes"]),
    ("dtype unlike the size", lambda h: h[Q].update(dtype="F32"), [Q, "bytes"]),
    ("unknown dtype", lambda h: h[Q].update(dtype="F4"), [Q, "dtype", "F4"]),
    ("dtype no text", lambda h: h[Q].update(dtype=["BF16"]), [Q, "dtype"]),
    ("fraction in the shape", lambda h: h[Q].update(shape=[64, 64.0]), [Q, "shape"]),
    ("negative shape", lambda h: h[Q].update(shape=[-64, -64]), [Q, "shape"]),
    ("too many dimensions", lambda h: h[Q].update(shape=[1] * 9), [Q, "dimensions"]),
    ("truth in the offsets", lambda h: h[Q].update(data_offsets=[False, 8192]), [Q, "data_offsets"]),
    ("key too many", lambda h: h[Q].update(crc=1), [Q, "crc"]),
    ("entry no object", lambda h: h.update({Q: 1}), [Q, "object"]),
    ("metadata no texts", lambda h: h.update(__metadata__={"format": 1}), ["__metadata__"]),
]


@pytest.mark.parametrize("change, words", [c[1:] for c in HEADERS], ids=[c[0] for c in HEADERS])
def test_safetensors_header_is_refused(
    single: Path, out: Path, change: Callable[[Header], object], words: list[str]
) -> None:
    edit_header(single / "model.safetensors", change)
    assert_refused(convert(single, "-o", out / "x.gguf"), out, "model.safetensors", *words)


@pytest.mark.parametrize("change", [-1, 1], ids=["a byte short", "a byte long"])
def test_a_file_of_another_length_than_its_header_says_is_refused(
    single: Path, out: Path, change: int
) -> None:
    path = single / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size + change)
    assert_refused(convert(single, "-o", out / "x.gguf"), out, "model.safetensors", "bytes")


def test_a_file_that_shrinks_while_it_is_read_is_refused(single: Path) -> None:
    with open_checkpoint(single) as checkpoint:
        checkpoint.float32(Q)
        os.truncate(single / "model.safetensors", 100_000)
        with pytest.raises(ConvertError, match="the file ends at byte 100000"):
            for name in checkpoint.shapes:
                checkpoint.float32(name)


def test_duplicate_header_key_is_refused(single: Path, out: Path) -> None:
    path = single / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    twice = content[8:9] + b'"model.norm.weight":{},' + content[9 : 8 + length]
    path.write_bytes(struct.pack("<Q", len(twice)) + twice + content[8 + length :])
    assert_refused(convert(single, "-o", out / "x.gguf"), out, "'model.norm.weight'", "twice")


def test_pickled_weights_are_refused_unread(single: Path, out: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    for source in (single, single / "pytorch_model.bin"):
        assert_refused(convert(source, "-o", out / "x.gguf"), out, "pytorch_model.bin", "safetensors", "code")


def test_two_checkpoints_in_one_folder_are_refused(tmp_path: Path, out: Path) -> None:
    folder = fresh_checkpoint(tmp_path / "model", SPEC, shards=2)
    fresh_checkpoint(folder, SPEC, shards=1)
    assert_refused(convert(folder, "-o", out / "x.gguf"), out, "both")
    assert convert(folder / "model.safetensors", "-o", out / "x.gguf").status == 0


def test_python_of_the_checkpoint_is_never_run(tmp_path: Path, source: Path) -> None:
    (tmp_path / "trap").mkdir()
    trap = f"open({str(tmp_path / 'trap' / 'sprung')!r}, 'w')\n"
    for name in ("configuration_kimi", "modeling_kimi", "tokenization_kimi", "tiktoken", "gguf"):
        (source / f"{name}.py").write_text(trap)
    with edited_json(source / "config.json") as data:
        data["auto_map"] = {"AutoConfig": "configuration_kimi.KimiLinearConfig"}
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    assert list((tmp_path / "trap").iterdir()) == []
