"""Files as other tools leave them: Git LFS pointers, and a byte order mark."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_checkpoint import Spec, write_checkpoint

from kimi_gguf.convert.conversion import convert, plan_only
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.types.file_types import TYPES

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4961234567\n".format("0" * 64)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tiktoken.model", "config.json"])
def test_a_git_lfs_pointer_is_named_as_one(name: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, Spec())
    (checkpoint / name).write_text(POINTER)
    with pytest.raises(ConvertError, match=f"{name}: is a Git LFS pointer; .* git lfs pull"):
        plan_only(checkpoint, TYPES["F32"])


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, Spec())
    convert(checkpoint, tmp_path / "before.gguf", TYPES["F32"])
    for name in ("config.json", "tokenizer_config.json", "model.safetensors.index.json"):
        (checkpoint / name).write_bytes(b"\xef\xbb\xbf" + (checkpoint / name).read_bytes())
    convert(checkpoint, tmp_path / "after.gguf", TYPES["F32"])
    assert (tmp_path / "before.gguf").read_bytes()[-100000:] == (tmp_path / "after.gguf").read_bytes()[
        -100000:
    ]
