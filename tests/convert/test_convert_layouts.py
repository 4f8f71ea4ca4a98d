"""A model converts to the same bytes for every layout of its names, config, files and folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_tools import (
    assert_refused,
    convert,
    edited_json,
    edited_tensors,
    fresh_checkpoint,
    gguf_keys,
    gguf_values,
)
from random_checkpoint import Layout, Spec, weights
from safetensors.torch import load_file, save_file

from kimi_gguf.convert.source.checkpoint import open_checkpoint

SPEC = Spec()
SPECS = [
    SPEC,
    Spec(layers="MKKM", heads=3, q_lora=24, experts=6, experts_used=3, dense_layers=2, seed=1),
    Spec(layers="KM", dense_layers=0, shared_experts=2, conv=3, dtype=torch.float16, seed=2),
]
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
LAYOUTS: list[Layout] = ["hub", "resaved", "native"]


def converted(source: Path, output: Path, kind: str = "BF16", *options: str) -> bytes:
    run = convert(source, "-o", output, "--type", kind, "--name", "model", *options)
    assert run.status == 0, run.err
    return without_origin(output)


def without_origin(path: Path) -> bytes:
    """A file's bytes without the information on its source files: hashes, and the id on the hub."""
    content = path.read_bytes()
    for key in (b"kimi_gguf.source.config_sha256", b"kimi_gguf.source.headers_sha256"):
        at = content.index(key) + len(key) + 12
        content = content[:at] + bytes(64) + content[at + 64 :]
    return content


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_layouts_and_numbers_of_files_give_the_same_bytes(tmp_path: Path, spec: Spec) -> None:
    found = {}
    for layout in LAYOUTS:
        for shards in (1, 3):
            folder = fresh_checkpoint(tmp_path / f"{layout}{shards}", spec, layout, shards)
            found[layout, shards] = converted(folder, tmp_path / f"{layout}{shards}.gguf")
    first = found["hub", 1]
    assert [key for key, content in found.items() if content != first] == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_a_checkpoint_reads_as_the_hubs_names(tmp_path: Path, spec: Spec, layout: Layout) -> None:
    expected = weights(spec)
    with open_checkpoint(fresh_checkpoint(tmp_path, spec, layout)) as checkpoint:
        assert set(checkpoint.shapes) == set(expected)
        for name, tensor in expected.items():
            assert checkpoint.shapes[name] == tuple(tensor.shape)
            assert checkpoint.dtype(name).name == DTYPES[tensor.dtype]
            assert np.array_equal(checkpoint.float32(name), tensor.float().numpy()), name


def test_index_and_single_file_are_sources_too(tmp_path: Path, source: Path, single: Path) -> None:
    (single / "model.safetensors").rename(single / "other.safetensors")
    by_folder = converted(source, tmp_path / "a.gguf")
    assert converted(source / "model.safetensors.index.json", tmp_path / "b.gguf") == by_folder
    assert converted(single / "other.safetensors", tmp_path / "c.gguf") == by_folder


def test_a_hugging_face_cache_is_followed_and_names_the_model(tmp_path: Path) -> None:
    """In the cache every file of a snapshot is a link to `../../blobs`."""
    plain = fresh_checkpoint(tmp_path / "Kimi-Test", SPEC)
    snapshot = tmp_path / "models--org--Kimi-Test" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--org--Kimi-Test" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    for source in (plain, snapshot):
        assert convert(source, "-o", tmp_path / f"{source.name}.gguf").status == 0
    ours, plain_keys = gguf_keys(tmp_path / "0123abcd.gguf"), gguf_keys(tmp_path / "Kimi-Test.gguf")
    descent = {
        "general.organization": "org",
        "general.source.huggingface.repository": "org/Kimi-Test",
        "general.source.repo_url": "https://huggingface.co/org/Kimi-Test",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Kimi-Test",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Kimi-Test",
    }
    assert ours == plain_keys | descent
    for name, values in gguf_values(tmp_path / "0123abcd.gguf").items():
        assert np.array_equal(values, gguf_values(tmp_path / "Kimi-Test.gguf")[name])


CARDS = {
    "---\nlicense: mit\nbase_model:\n- moonshotai/Kimi-Linear-48B-A3B-Base\ntags: [x]\n---\n# A model\n": {
        "general.license": "mit",
        "general.base_model.0.organization": "moonshotai",
    },
    "---\nlicense: 'other'\nlicense_link: https://example.org/licence\n---\n": {
        "general.license": "other",
        "general.license.link": "https://example.org/licence",
    },
    "---\nlicense: mit\n": {},  # no end
    "license: mit\n": {},
    "---\nlicense: " + "x" * 300 + "\nbase_model: ../../etc\n---\n": {},
    "\xff---\n\0": {},
}


@pytest.mark.parametrize("card", CARDS, ids=range(len(CARDS)))
def test_the_model_card_gives_licence_and_descent_and_never_an_error(tmp_path: Path, card: str) -> None:
    source = fresh_checkpoint(tmp_path / "model", SPEC)
    (source / "README.md").write_text(card)
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    keys = gguf_keys(tmp_path / "x.gguf")
    asked = ("general.license", "general.license.link", "general.base_model.0.organization")
    assert {name: keys[name] for name in asked if name in keys} == CARDS[card]
    config = hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    assert keys["kimi_gguf.source.config_sha256"] == config


@pytest.mark.parametrize("original_names", [True, False], ids=["resaved", "in-memory-names"])
@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: spec.id)
def test_what_transformers_saves_gives_the_hub_layouts_values(
    tmp_path: Path, spec: Spec, original_names: bool
) -> None:
    from transformers import KimiLinearForCausalLM

    hub = fresh_checkpoint(tmp_path / "hub", spec)
    model = KimiLinearForCausalLM.from_pretrained(hub, dtype=torch.float32)
    saved = tmp_path / "saved"
    model.save_pretrained(saved, save_original_format=original_names)
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copyfile(hub / name, saved / name)
    assert ("layer_types" in json.loads((saved / "config.json").read_text())) is True
    assert converted(saved, tmp_path / "saved.gguf", "F32") == converted(hub, tmp_path / "hub.gguf", "F32")


def test_a_native_config_made_in_transformers_is_read(tmp_path: Path) -> None:
    """A config that was never a hub config: without `linear_attn_config` and `first_k_dense_replace`."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    spec = Spec(layers="KMK", dense_layers=1)
    hub = fresh_checkpoint(tmp_path / "hub", spec)
    config = KimiLinearConfig(
        vocab_size=json.loads((hub / "config.json").read_text())["vocab_size"],
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        moe_intermediate_size=spec.moe_intermediate,
        num_hidden_layers=3,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        n_shared_experts=1,
        kv_lora_rank=spec.kv_lora,
        qk_nope_head_dim=spec.nope,
        qk_rope_head_dim=spec.rope,
        v_head_dim=spec.v_dim,
        num_experts_per_tok=spec.experts_used,
        num_local_experts=spec.experts,
        linear_head_dim=spec.kda_head_dim,
        linear_num_heads=spec.heads,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        bos_token_id=274,
        eos_token_id=276,
        pad_token_id=529,
    )
    native = tmp_path / "native"
    KimiLinearForCausalLM(config).save_pretrained(native, save_original_format=False)
    saved = json.loads((native / "config.json").read_text())
    assert "linear_attn_config" not in saved and "first_k_dense_replace" not in saved
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copyfile(hub / name, native / name)
    converted(native, tmp_path / "native.gguf", "F32")
    in_memory = load_file(native / "model.safetensors")
    experts = in_memory["model.layers.1.mlp.experts.gate_up_proj"]
    values = gguf_values(tmp_path / "native.gguf")
    gate = torch.from_numpy(values["blk.1.ffn_gate_exps.weight"].copy())
    up = torch.from_numpy(values["blk.1.ffn_up_exps.weight"].copy())
    assert torch.equal(torch.cat([gate, up], 1), experts)


def test_tied_embeddings_become_an_output_of_their_own(tmp_path: Path, single: Path, out: Path) -> None:
    """transformers then omits the head, which llama.cpp's graph requires; without the setting it is missing."""
    with edited_tensors(single / "model.safetensors") as tensors:
        del tensors["lm_head.weight"]
    assert_refused(convert(single, "-o", out / "x.gguf"), out, "missing", "lm_head.weight")
    with edited_json(single / "config.json") as config:
        config["tie_word_embeddings"] = True
    converted(single, tmp_path / "tied.gguf", "F32")
    values = gguf_values(tmp_path / "tied.gguf")
    assert (values["output.weight"] == values["token_embd.weight"]).all()


def test_the_same_tensor_under_two_layouts_names_is_refused(tmp_path: Path, out: Path) -> None:
    folder = fresh_checkpoint(tmp_path / "both", SPEC, "native", shards=1)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_conv1d.weight"
    save_file(tensors | {name: weights(SPEC)[name]}, folder / "model.safetensors")
    run = convert(folder, "-o", out / "x.gguf")
    assert_refused(run, out, "duplicate", name, "model.layers.0.self_attn.conv1d.weight")
