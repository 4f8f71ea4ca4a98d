"""Files and words as people bring them from other tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from random_checkpoint import Spec, write_checkpoint
from safetensors.torch import load_file, save_file

from kimi_gguf.convert.conversion import convert, plan_only
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.mixes import RECIPES, TypeRequest

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4961234567\n".format("0" * 64)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tiktoken.model", "config.json"])
def test_a_git_lfs_pointer_is_named_as_one(name: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, Spec())
    (checkpoint / name).write_text(POINTER)
    with pytest.raises(ConvertError, match=f"{name}: is a Git LFS pointer; .* git lfs pull"):
        plan_only(checkpoint, TYPES["F32"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "deepseek_v3"},
            "the other models of llama.cpp, without KDA, are converted by its convert_hf_to",
        ),
        (
            {"quantization": {"group_size": 64, "bits": 4}},
            "quantization: is an MLX conversion; convert the checkpoint",
        ),
    ],
)
def test_models_of_other_kinds_are_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path, Spec()) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ConvertError, match=message):
        plan_only(tmp_path, TYPES["F32"])


def test_an_unmerged_adapter_in_the_weights_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, Spec(), shards=1)
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.3.self_attn.q_proj.weight"
    tensors[name.replace("q_proj", "q_proj.base_layer")] = tensors.pop(name)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ConvertError, match=r"base_layer\.weight' is of an unmerged PEFT state; merge it"):
        plan_only(checkpoint, TYPES["F32"])


def test_patterns_that_match_nothing_are_noted(tmp_path: Path) -> None:
    """But not those of a recipe, which are for all families."""
    checkpoint, q8_0 = write_checkpoint(tmp_path, Spec()), TYPES["Q8_0"]
    patterns = (("attn_q", q8_0.base), ("no_such", q8_0.base), ("ATTN_K_B", q8_0.base))
    notes = plan_only(checkpoint, TypeRequest(q8_0, overrides=patterns)).notes
    assert "--tensor-type: no tensor matches 'no_such'" in notes
    for recipe in RECIPES.values():
        assert not any("--tensor-type: no tensor" in note for note in plan_only(checkpoint, recipe).notes)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, Spec())
    convert(checkpoint, tmp_path / "before.gguf", TYPES["F32"])
    for name in ("config.json", "tokenizer_config.json", "model.safetensors.index.json"):
        (checkpoint / name).write_bytes(b"\xef\xbb\xbf" + (checkpoint / name).read_bytes())
    convert(checkpoint, tmp_path / "after.gguf", TYPES["F32"])
    assert (tmp_path / "before.gguf").read_bytes()[-100000:] == (tmp_path / "after.gguf").read_bytes()[
        -100000:
    ]
