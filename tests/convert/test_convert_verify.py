"""`verify` checks files of any converter and names what is wrong; `inspect` shows a model's true properties."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from convert_tools import convert, edited_json, fresh_checkpoint, gguf_types
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from random_checkpoint import Spec
from test_convert_like_quantize import write_imatrix

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.gguf import GgufFile
from kimi_gguf.tools.synthetic_checkpoint import write_synthetic

SPEC = Spec(layers="KKM", hidden=256, heads=4, seed=50)


@pytest.fixture
def file(tmp_path: Path, source: Path) -> Path:
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    return tmp_path / "x.gguf"


@pytest.mark.parametrize("kind", ["F32", "BF16", pytest.param("Q4_K_M", marks=pytest.mark.engine)])
def test_our_own_files_are_proved(tmp_path: Path, source: Path, kind: str) -> None:
    out = tmp_path / "x.gguf"
    assert convert(source, "-o", out, "--type", kind).status == 0
    run = convert("verify", out, "--checkpoint", source)
    assert run.status == 0 and ": identical to a new conversion" in run.out, run.out
    assert json.loads(convert("verify", out, "--checkpoint", source, "--json").out)["proved"] is True


@pytest.mark.engine
def test_llama_quantizes_file_is_proved_with_its_importances_only(
    tmp_path: Path, source: Path, upstream: Engine
) -> None:
    bf16, imatrix, out = (tmp_path / name for name in ("bf16.gguf", "imatrix.gguf", "x.gguf"))
    assert convert(source, "-o", bf16).status == 0
    write_imatrix(imatrix, bf16, every=1)
    command = [upstream.bin / "llama-quantize", "--imatrix", imatrix, bf16, out, "Q4_K_S"]
    subprocess.run(command, check=True, capture_output=True)
    assert convert("verify", out, "--checkpoint", source, "--imatrix", imatrix).status == 0
    without = convert("verify", out, "--checkpoint", source)
    assert without.status == 1 and "(Q4_K): first difference at byte" in without.out


@pytest.mark.engine
def test_types_that_need_importances_are_refused_without(tmp_path: Path, source: Path) -> None:
    """ggml would end the process."""
    bf16, imatrix, out = (tmp_path / name for name in ("bf16.gguf", "imatrix.gguf", "x.gguf"))
    assert convert(source, "-o", bf16).status == 0
    write_imatrix(imatrix, bf16, every=1)
    name = "blk.1.ffn_gate_exps"
    types = ["--type", "Q8_0", "--tensor-type", f"{name}=IQ2_XXS"]
    assert convert(source, "-o", out, *types, "--imatrix", imatrix).status == 0
    assert convert("verify", out, "--checkpoint", source, "--imatrix", imatrix).status == 0
    run = convert("verify", out, "--checkpoint", source)
    assert run.status == 1 and f"'{name}.weight': IQ2_XXS requires an importance matrix" in run.err


@pytest.mark.engine
def test_importances_of_another_length_are_none(tmp_path: Path, source: Path) -> None:
    """Those of the embedding may have another length than its rows; a type that needs them is refused then."""
    name, values = b"token_embd.weight", np.ones(3, "<f4").tobytes()
    imatrix = tmp_path / "imatrix.dat"
    imatrix.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 1, 3) + values)
    types = ["--type", "Q8_0", "--token-embedding-type", "IQ2_XXS"]
    run = convert(source, "-o", tmp_path / "x.gguf", *types, "--imatrix", imatrix)
    assert run.status == 1 and "IQ2_XXS requires an importance matrix" in run.err


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.0.ssm_a", "blk.2.attn_k_b.weight"])
def test_one_wrong_bit_is_named(source: Path, file: Path, tensor: str) -> None:
    with GgufFile(file) as opened:
        place = opened.tensors[tensor]
    content = bytearray(file.read_bytes())
    content[place.offset + place.nbytes - 3] ^= 4
    file.write_bytes(content)
    run = convert("verify", file, "--checkpoint", source)
    complaint = f"{tensor} ({place.type.name}): first difference at byte {place.nbytes - 3} of {place.nbytes}"
    assert run.status == 1 and run.out.splitlines()[0] == complaint
    assert ": NOT identical to a new conversion" in run.out


def test_progress_is_shown(source: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_gguf.convert.progress.PLAIN_INTERVAL", 0)
    assert "100 % (" in convert("verify", file, "--checkpoint", source).err
    assert convert("verify", file, "--checkpoint", source, "--json").err == ""


def test_a_wrong_key_is_named(source: Path, file: Path) -> None:
    content = file.read_bytes()
    key = b"kimi-linear.expert_used_count\x04\x00\x00\x00"
    at = content.index(key) + len(key)
    file.write_bytes(content[:at] + b"\x03" + content[at + 1 :])
    run = convert("verify", file, "--checkpoint", source)
    assert run.status == 1 and run.out.startswith("kimi-linear.expert_used_count: expected 2, found 3\n")


def test_a_key_of_another_type_is_named(source: Path, file: Path) -> None:
    content = file.read_bytes()
    key = b"kimi-linear.expert_used_count"
    at = content.index(key) + len(key)
    file.write_bytes(content[:at] + struct.pack("<If", 6, 2.0) + content[at + 8 :])
    run = convert("verify", file, "--checkpoint", source)
    assert run.status == 1 and run.out.startswith("kimi-linear.expert_used_count: expected 2, found 2.0\n")


def add_key(file: Path, name: str, value: str | int) -> None:
    """Copy the file with one more key, with gguf's own writer."""
    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(file.with_suffix(".new"), architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        items = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], items)
    writer.add_key_value(
        name, value, GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.UINT64
    )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").replace(file)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("general.description", True),
        ("quantize.imatrix.file", True),
        ("kimi-linear.rope.scaling.type", False),
        ("tokenizer.ggml.add_eos_token", False),
        ("tokenizer.chat_template.tool_use", False),
    ],
)
def test_a_key_that_no_conversion_writes_is_named(
    source: Path, file: Path, name: str, accepted: bool
) -> None:
    """Except what describes the origin of a file."""
    add_key(file, name, "text")
    run = convert("verify", file, "--checkpoint", source)
    assert (run.status == 0) == accepted
    complaint = [] if accepted else [f"{name}: unexpected, found 'text'"]
    assert run.out.splitlines()[:-1] == complaint


def test_a_key_cannot_print_lines_of_its_own(source: Path, file: Path) -> None:
    add_key(file, "x\nidentical\x1b[31m", "text")
    run = convert("verify", file, "--checkpoint", source)
    assert run.out.splitlines()[0] == r"'x\nidentical\x1b[31m': unexpected, found 'text'"


def test_a_missing_key_is_named(source: Path, file: Path) -> None:
    content = file.read_bytes()
    assert content.count(b"kimi-linear.expert_used_count") == 1
    file.write_bytes(content.replace(b"kimi-linear.expert_used_count", b"kimi-linear.expert_uses_count"))
    said = convert("verify", file, "--checkpoint", source).out.splitlines()
    assert "kimi-linear.expert_used_count: missing, expected 2" in said
    assert "kimi-linear.expert_uses_count: unexpected, found 2" in said


@pytest.mark.parametrize("edited", ["file", "checkpoint"])
def test_a_chat_template_that_differs_is_shown_from_there(tmp_path: Path, edited: str) -> None:
    source, out = fresh_checkpoint(tmp_path / "model", SPEC), tmp_path / "x.gguf"
    known = "{{ a }}" * 30
    options = []
    if edited == "file":
        options = ["--chat-template", tmp_path / "mine.jinja"]
        (tmp_path / "mine.jinja").write_text(known + "{{ other }}")
    (source / "chat_template.jinja").write_text(known + "{{ b }}")
    assert convert(source, "-o", out, *options).status == 0
    if edited == "checkpoint":
        (source / "chat_template.jinja").write_text(known + "{{ other }}")
    run = convert("verify", out, "--checkpoint", source)
    parts = ["'b }}'", "'other }}'"] if edited == "file" else ["'other }}'", "'b }}'"]
    assert run.status == 1
    assert run.out.splitlines()[0] == (
        f"tokenizer.chat_template: expected {parts[0]}, found {parts[1]}, from character {len(known) + 3} on"
    )


def test_a_chat_template_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    source, out = fresh_checkpoint(tmp_path / "model", SPEC), tmp_path / "x.gguf"
    assert convert(source, "-o", out).status == 0
    with edited_json(source / "tokenizer_config.json") as settings:
        del settings["chat_template"]
    run = convert("verify", out, "--checkpoint", source)
    assert run.status == 1 and run.out.startswith("tokenizer.chat_template: unexpected, found ")


def test_another_checkpoint_fails_verification(tmp_path: Path, source: Path, file: Path) -> None:
    others = {"deeper": Spec(layers="KKMM", hidden=256, heads=4), "wider": Spec(layers="KKM", hidden=128)}
    for name, spec in others.items():
        run = convert("verify", file, "--checkpoint", fresh_checkpoint(tmp_path / name, spec))
        assert run.status == 1 and "the file was not made from this checkpoint" in run.err


def test_inspect_shows_file_and_checkpoint(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "x.gguf"
    assert convert(source, "-o", out, "--name", "a name").status == 0
    file, folder = (json.loads(convert("inspect", p, "--json", "--context", 1000).out) for p in (out, source))
    for seen in (file, folder):
        layers = [(layer["index"], layer["mixer"], layer["ffn"]) for layer in seen["layers"]]
        assert layers == [(-1, "", ""), (0, "KDA", "dense"), (1, "KDA", "MoE"), (2, "MLA", "MoE")]
        assert seen["type"] == "BF16"
        assert seen["latent_cache_f16"] == 1 * (64 + 16) * 1000 * 2
        assert seen["recurrent_state_f32"] == 2 * 4 * (4 * 32 * 32 + 3 * 3 * 4 * 32)
    assert file["name"] == "a name" and file["kind"] == "GGUF" and folder["kind"] == "safetensors"
    assert file["parameters"] == folder["parameters"] == sum(t.n_elements for t in GGUFReader(out).tensors)
    counts = {name: count for name, (count, _) in file["types"].items()}
    types = list(gguf_types(out).values())
    assert counts == {name: types.count(name) for name in set(types)}
    text = convert("inspect", out).out
    assert "2  MLA    MoE" in text and "of MLA latents (F16)" in text


def test_the_48bs_caches(tmp_path: Path) -> None:
    """Computed from its published shape: 7 layers of 576 values; 20 of 32 heads x 128 x 128 and three rows of 12288."""
    seen = json.loads(convert("inspect", write_synthetic(tmp_path), "--json", "--context", 32768).out)
    assert seen["parameters"] == 49_122_681_728
    assert sum(layer["nbytes"] for layer in seen["layers"]) == 98_245_528_576
    assert seen["latent_cache_f16"] == 7 * 576 * 32768 * 2
    assert seen["recurrent_state_f32"] == 20 * 4 * (32 * 128 * 128 + 3 * 12288)


@pytest.mark.parametrize("damage", ["", "GGUF", "GGUX", "cut", "text"])
def test_what_is_no_gguf_is_refused(source: Path, file: Path, damage: str) -> None:
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-4000], "text": b"hello" * 100}.get(damage, damage.encode()))
    for arguments in (["inspect", file], ["verify", file, "--checkpoint", source]):
        run = convert(*arguments)
        assert run.status == 1 and run.err.startswith("convert-kimi: error: ") and run.err.count("\n") == 1


@pytest.mark.parametrize("layers", [4, 2**62])
def test_inspect_refuses_more_layers_of_drafts_than_layers(file: Path, layers: int) -> None:
    add_key(file, "kimi-linear.nextn_predict_layers", layers)
    run = convert("inspect", file)
    assert run.status == 1 and f"expected at most 3 layers, found {layers}" in run.err


def test_inspect_refuses_a_layer_that_is_no_number(file: Path) -> None:
    content = file.read_bytes()
    assert content.count(b"blk.1.attn_norm.weight") == 1
    file.write_bytes(content.replace(b"blk.1.attn_norm.weight", b"blk.--1.tn_norm.weight"))
    run = convert("inspect", file)
    assert run.status == 1 and "'blk.--1.tn_norm.weight': expected a layer from 0 to 2" in run.err


def test_inspect_refuses_an_architecture_that_is_no_text(tmp_path: Path) -> None:
    """An empty array of numbers."""
    name, file = b"general.architecture", tmp_path / "x.gguf"
    key = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, 4, 0)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
    run = convert("inspect", file)
    assert run.status == 1 and "general.architecture: expected kimi-linear" in run.err


@pytest.mark.engine
def test_a_recipe_protects_all_but_the_experts(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "x.gguf"
    assert convert(source, "-o", out, "--recipe", "kimi-q4").status == 0
    for name, kind in gguf_types(out).items():
        assert kind in ({"Q4_K", "Q5_0"} if "_exps" in name else {"Q8_0", "F32"}), name
    assert convert("verify", out, "--checkpoint", source).status == 0
    own = convert(source, "--dry-run", "--recipe", "kimi-q4", "--tensor-type", "ssm_beta=BF16").out
    assert [line.split()[1] for line in own.splitlines() if "blk.0.ssm_beta" in line] == ["BF16"]
