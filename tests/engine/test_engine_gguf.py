"""The reader of GGUF files: the bytes of a tensor."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_file import write_gguf

from kimi_gguf.engine.gguf import GgufError, GgufFile, key_of
from kimi_gguf.engine.tensor_names import layer_of, without_layer

VALUES = np.arange(1000, dtype=np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", tensors={"weight": VALUES})


@pytest.mark.parametrize(
    ("name", "layer", "rest"),
    [
        ("blk.12.ssm_a", 12, "ssm_a"),
        ("blk.0.attn_norm.weight", 0, "attn_norm.weight"),
        ("output.weight", -1, "output.weight"),
        ("a.blk.3.b", -1, "a.blk.3.b"),
        ("blk.-1.a", -1, "blk.-1.a"),
        ("blk.3", -1, "blk.3"),
        ("blk.٣.a", -1, "blk.٣.a"),
    ],
)
def test_the_layer_in_a_name(name: str, layer: int, rest: str) -> None:
    assert (layer_of(name), without_layer(name)) == (layer, rest)


def test_a_key_is_read_without_what_follows_it(path: Path) -> None:
    assert key_of(path, "general.architecture") == "kimi-linear"
    assert key_of(path, "absent") is None
    os.truncate(path, 75)  # where the only key ends
    assert key_of(path, "general.architecture") == "kimi-linear"
    os.truncate(path, 74)
    with pytest.raises(GgufError, match="truncated"):
        key_of(path, "general.architecture")


def test_values_in_front_of_a_key_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "keys.gguf"
    writer = GGUFWriter(path, "gemma3n")
    writer.add_array("flags", [True, True, False])
    writer.add_array("words", ["a", "bc"])
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_string("text", "def")
    writer.add_bool("flag", True)
    writer.add_uint64("last", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert key_of(path, "last") == 7
    assert (key_of(path, "flags"), key_of(path, "words")) == ([True, True, False], ["a", "bc"])
    for size in range(path.stat().st_size - 1, 3, -1):
        os.truncate(path, size)
        with pytest.raises(GgufError, match=r"ends early|longer than the header"):
            key_of(path, "last")


def test_reads_that_return_fewer_bytes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads at most 2 GiB at once, and a stacked F32 expert tensor of the 48B has 2.25."""
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: whole(fd, [parts[0][:7]], at))
    with GgufFile(path) as file:
        assert file.read(file.tensors["weight"]).tobytes() == VALUES.tobytes()
        assert file.read(file.tensors["weight"], 5, 20).tobytes() == VALUES.tobytes()[5:25]


def test_a_file_that_becomes_shorter_is_an_error(path: Path) -> None:
    with GgufFile(path) as file:
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(GgufError, match="'weight': the file was truncated while it was read"):
            file.read(file.tensors["weight"])
