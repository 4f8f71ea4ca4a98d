"""Checkpoints as training programs and people leave them: read like the published one, or refused by what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_tools import convert, fresh_checkpoint, gguf_keys
from gguf import GGUFReader
from random_checkpoint import Spec
from safetensors.torch import load_file, save_file

SPEC = Spec(layers="KM", seed=74)
INDEX = "model.safetensors.index.json"


def contents(file: Path) -> dict[str, bytes]:
    return {tensor.name: np.asarray(tensor.data).tobytes() for tensor in GGUFReader(file).tensors}


def with_tensors(
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> Callable[[Path], None]:
    """Edit the tensors of all shards; the index follows."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors = edit(load_file(file))
            save_file(tensors, file)
            index["weight_map"] |= dict.fromkeys(tensors, file.name)
        (folder / INDEX).write_text(json.dumps(index))

    return change


def other_index(folder: Path) -> None:
    (folder / INDEX).rename(folder / "model.fp16.safetensors.index.json")


def without_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        file.rename(folder / f"part{number}.safetensors")


def buffer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next((name for name in tensors if ".self_attn." in name), None)
    extra = (
        {f"{name.rpartition('.self_attn.')[0]}.self_attn.rotary_emb.inv_freq": torch.ones(4)} if name else {}
    )
    return tensors | extra


def flat(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.reshape(-1) if name.endswith("A_log") else t for name, t in tensors.items()}


READ: dict[str, Callable[[Path], None]] = {
    "shards-without-index": without_index,
    "another-index": other_index,
    "compiled": with_tensors(lambda tensors: {f"_orig_mod.{name}": t for name, t in tensors.items()}),
    "parallel": with_tensors(lambda tensors: {f"module.{name}": t for name, t in tensors.items()}),
    "buffers": with_tensors(buffer),
    "heads-of-A_log": with_tensors(flat),
    "doubles": with_tensors(
        lambda tensors: {name: t.double() if "norm" in name else t for name, t in tensors.items()}
    ),
}


@pytest.mark.parametrize("name", READ)
def test_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    folder = fresh_checkpoint(tmp_path / "model", SPEC)
    assert convert(folder, "-o", tmp_path / "expected.gguf").status == 0
    READ[name](folder)
    run = convert(folder, "-o", tmp_path / "found.gguf")
    assert run.status == 0, run.err
    assert contents(tmp_path / "found.gguf") == contents(tmp_path / "expected.gguf")
    assert ("tensors are F64" in run.err) == (name == "doubles")


def test_a_tied_output_is_the_embedding_whatever_is_stored(tmp_path: Path) -> None:
    """As in transformers."""
    folder = fresh_checkpoint(tmp_path / "model", SPEC)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    run = convert(folder, "-o", tmp_path / "x.gguf")
    assert run.status == 0 and "the stored output matrix is left out" in run.err
    found = contents(tmp_path / "x.gguf")
    assert found["output.weight"] == found["token_embd.weight"]


def incomplete(folder: Path) -> None:
    (folder / INDEX).unlink()
    next(folder.glob("*.safetensors")).unlink()


def two_indexes(folder: Path) -> None:
    other_index(folder)
    shutil.copy(folder / "model.fp16.safetensors.index.json", folder / "model.bf16.safetensors.index.json")


def twice(folder: Path) -> None:
    (folder / INDEX).unlink()
    file = next(folder.glob("*.safetensors"))
    shutil.copy(file, folder / "copy.safetensors")


def nothing(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (incomplete, "missing tensor"),
        (two_indexes, "has several indexes: found model.bf16.safetensors.index.json, model.fp16"),
        (twice, "is also in"),
        (nothing, "expected a checkpoint folder with .safetensors files, found config.json"),
    ],
)
def test_what_is_no_checkpoint_is_named(change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folder = fresh_checkpoint(tmp_path / "model", SPEC)
    change(folder)
    run = convert(folder, "-o", tmp_path / "x.gguf")
    assert run.status == 1 and said in run.err, run.err


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}\n{{ m.content }", "chat_template.jinja, line 2: "),
        ("{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}", ""),
    ],
)
def test_a_chat_template_is_parsed(template: str, said: str, tmp_path: Path) -> None:
    folder = fresh_checkpoint(tmp_path / "model", SPEC)
    (folder / "chat_template.jinja").write_text(template)
    run = convert(folder, "-o", tmp_path / "x.gguf")
    assert (run.status == 1) == bool(said) and said in run.err, run.err
    if not said:
        assert gguf_keys(tmp_path / "x.gguf")["tokenizer.chat_template"] == template


def test_a_list_of_templates_needs_a_default(tmp_path: Path) -> None:
    folder = fresh_checkpoint(tmp_path / "model", SPEC)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": "{{ tools }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    run = convert(folder, "-o", tmp_path / "x.gguf")
    assert run.status == 1 and 'expected a template with the name "default", found tool_use' in run.err, (
        run.err
    )
