"""Kimi K3: all tensors but `ssm_a` equal llama.cpp's byte for byte, from packed and plain experts, in every type."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_tools import (
    assert_upstreams_tensors,
    convert,
    edited_json,
    edited_tensors,
    gguf_keys,
    gguf_types,
    gguf_values,
    killed_conversions,
    upstream_convert,
)
from gguf import GGUFReader
from random_checkpoint import NUM_RANKS
from random_k3 import E2M1, GROUP, PREFIX, K3Spec, packed_experts, weights, write_checkpoint

from kimi_gguf.convert.output import stream
from kimi_gguf.convert.source import mxfp4
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.gguf import GgufFile
from kimi_gguf.tools.upstream_converter import Job

SPECS = {
    "published settings": K3Spec(),
    "no latent space, no q rank, no residual attention": K3Spec(
        layers="MKKM", q_lora=None, latent=None, res_block=0, shared_experts=1, dense_layers=2, seed=1
    ),
    "no norm, no gate, an unpadded A_log": K3Spec(
        layers="KM", heads=3, stored_heads=3, latent_norm=False, output_gate=False, latent=96, seed=2
    ),
    "the smallest scales": K3Spec(layers="KM", scales=(0, 3), seed=3),
    "the largest scales": K3Spec(layers="KM", scales=(240, 252), seed=4),
    "groups of experts": K3Spec(layers="KM", experts=8, groups=4, topk_groups=2, renormalize=False, seed=5),
}
# Keys that only one of the two files has, or that differ intentionally; see docs/conversion.md.
OTHER_KEYS = {
    "general.name",
    "general.size_label",
    "kimi-k3.rope.freq_base",
    "kimi-k3.expert_group_count",
    "kimi-k3.expert_group_used_count",
    "kimi_gguf.source.config_sha256",
    "kimi_gguf.source.headers_sha256",
}


def source_of(folder: Path, spec: K3Spec, packed: bool = True, shards: int = 3) -> Path:
    return write_checkpoint(folder, spec, packed, shards)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By name of the spec, a folder with the packed and the plain checkpoint, and upstream's GGUF of each."""
    folder, jobs = tmp_path_factory.mktemp("upstream"), []
    for number, spec in enumerate(SPECS.values()):
        for packed in (True, False):
            source = source_of(folder / f"{number}-{packed}", spec, packed)
            jobs.append(Job(source, folder / f"{number}-{packed}.gguf", "BF16"))
    upstream_convert(jobs)
    return folder


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("number", range(len(SPECS)), ids=list(SPECS))
def test_tensors_and_keys_equal_upstreams(tmp_path: Path, pairs: Path, number: int, packed: bool) -> None:
    """Without --type: packed experts stay MXFP4, and everything else is BF16 or F32."""
    theirs, ours = pairs / f"{number}-{packed}.gguf", tmp_path / "ours.gguf"
    assert convert(pairs / f"{number}-{packed}", "-o", ours).status == 0
    assert_upstreams_tensors(ours, theirs)
    assert ("MXFP4" in gguf_types(ours).values()) == packed
    our_keys, their_keys = gguf_keys(ours), gguf_keys(theirs)
    for keys in (our_keys, their_keys):
        for name in [name for name in keys if name.startswith("tokenizer.") or name in OTHER_KEYS]:
            del keys[name]
    assert our_keys == their_keys
    assert our_keys["general.file_type"] == (38 if packed else 32)


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize("number", range(len(SPECS)), ids=list(SPECS))
def test_packed_and_plain_experts_have_the_same_exact_values(
    tmp_path: Path, pairs: Path, number: int, kind: str
) -> None:
    """float32 and bfloat16 hold every value in MXFP4, down to subnormal ones."""
    spec = list(SPECS.values())[number]
    for packed in (True, False):
        assert convert(pairs / f"{number}-{packed}", "-o", tmp_path / f"{packed}", "--type", kind).status == 0
    contents = (
        [
            (tensor.name, tensor.tensor_type, tensor.data.tobytes())
            for tensor in GGUFReader(tmp_path / name).tensors
        ]
        for name in ("True", "False")
    )
    packed_file, plain_file = contents
    assert packed_file == plain_file
    found, exact = gguf_values(tmp_path / "True"), weights(spec)
    layer = spec.dense_layers
    for w, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        for e in range(spec.experts):
            expected = exact[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight"]
            assert np.array_equal(found[f"blk.{layer}.ffn_{name}_exps.weight"][e], expected.numpy())


def test_mxfp4_moe_keeps_the_experts_and_recipe_mxfp4_is_the_default(tmp_path: Path, pairs: Path) -> None:
    source = pairs / "0-True"
    for name, options in {"a": [], "b": ["--recipe", "mxfp4"], "c": ["--type", "MXFP4_MOE"]}.items():
        assert convert(source, "-o", tmp_path / name, *options).status == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    default, moe = ({t.name: t for t in GGUFReader(tmp_path / name).tensors} for name in "ac")
    experts = [name for name in default if "_exps" in name]
    assert len(experts) == 9
    for name in experts:
        assert default[name].data.tobytes() == moe[name].data.tobytes()
    assert moe["token_embd.weight"].tensor_type.name == "Q8_0"
    assert default["token_embd.weight"].tensor_type.name == "BF16"


def test_packed_experts_need_no_build_of_llama_cpp(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bits are only moved; quantizing plain experts to the same types needs ggml."""
    monkeypatch.setenv("KIMI_GGUF_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(stream, "load", lambda: pytest.fail("ggml was loaded"))
    assert convert(pairs / "0-True", "-o", tmp_path / "x.gguf").status == 0
    assert convert("verify", tmp_path / "x.gguf", "--checkpoint", pairs / "0-True").status == 0
    monkeypatch.undo()
    assert convert(pairs / "0-False", "-o", tmp_path / "y.gguf", "--recipe", "mxfp4").status == 0
    assert gguf_types(tmp_path / "x.gguf") == gguf_types(tmp_path / "y.gguf")


def test_a_recipe_quantizes_routed_experts_only(tmp_path: Path) -> None:
    """The projections into the space of the routed experts and out of it stay Q8_0."""
    source = source_of(tmp_path / "in", K3Spec(q_lora=None))
    plan = convert(source, "--dry-run", "--recipe", "kimi-q4").out
    types = {line.split()[0]: line.split()[1] for line in plan.splitlines() if ".weight" in line.split()[0]}
    assert types["blk.1.ffn_routed_down.weight"] == types["blk.1.ffn_routed_up.weight"] == "Q8_0"
    for name, kind in types.items():
        assert kind in ({"Q4_K", "Q5_0"} if "_exps" in name else {"Q8_0", "F32", "BF16"}), name
        assert kind != "BF16" or "ssm_beta" in name


def test_own_options_count_with_the_default_types(tmp_path: Path, pairs: Path) -> None:
    options = ["--tensor-type", "shexp=Q8_0", "--output-tensor-type", "F32"]
    assert convert(pairs / "0-True", "-o", tmp_path / "x.gguf", *options).status == 0
    types = gguf_types(tmp_path / "x.gguf")
    assert types["blk.1.ffn_up_shexp.weight"] == "Q8_0" and types["output.weight"] == "F32"
    assert types["blk.1.ffn_up_exps.weight"] == "MXFP4" and types["blk.1.ssm_g.weight"] == "BF16"


QUANTIZED = ["Q8_0", "Q4_0", "Q4_K_M", "Q5_K_S", "IQ4_NL", "MXFP4_MOE"]


@pytest.mark.engine
@pytest.mark.parametrize("kind", QUANTIZED)
def test_other_types_equal_llama_quantize_of_upstreams_file(
    tmp_path: Path, pairs: Path, engine: Engine, kind: str
) -> None:
    """It dequantizes the same values from upstream's MXFP4. (Upstream's llama-quantize quantizes the gates, too.)"""
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    command = [
        engine.bin / "llama-quantize",
        "--allow-requantize",
        pairs / "0-True.gguf",
        theirs,
        kind,
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-600:]
    assert convert(pairs / "0-True", "-o", ours, "--type", kind).status == 0
    with GgufFile(theirs) as other, GgufFile(ours) as file:
        assert [(t.name, t.type.name) for t in file.tensors.values()] == [
            (t.name, t.type.name) for t in other.tensors.values()
        ]
    contents = []
    for path in (ours, theirs):
        with GgufFile(path) as file:
            start = min(tensor.offset for tensor in file.tensors.values())
            data = path.read_bytes()[start:]
            contents.append(
                {t.name: data[t.offset - start : t.offset - start + t.nbytes] for t in file.tensors.values()}
            )
    different = [name for name in contents[0] if contents[0][name] != contents[1][name]]
    assert [name for name in different if not name.endswith(".ssm_a")] == []


def test_keys_of_the_architecture(tmp_path: Path) -> None:
    source = source_of(tmp_path / "model", K3Spec())
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    keys = gguf_keys(tmp_path / "x.gguf")
    own = {name: keys[f"kimi-k3.{name}"] for name in (
        "kda.gate_lower_bound", "expert_latent_length", "activation.situ_beta", "activation.situ_linear_beta",
        "attn_res.block_size", "attention.head_count_kv", "expert_shared_count", "attention.value_length",
        "expert_weights_norm",
    )}  # fmt: skip
    assert own == {
        "kda.gate_lower_bound": -5.0,
        "expert_latent_length": 32,
        "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 25.0,
        "attn_res.block_size": 2,
        "attention.head_count_kv": [0, 0, 1, 0],
        "expert_shared_count": 2,
        "attention.value_length": 64,
        "expert_weights_norm": True,
    }
    assert keys["tokenizer.ggml.eos_token_id"] == keys["tokenizer.ggml.eot_token_id"] == NUM_RANKS + 2
    assert keys["tokenizer.ggml.tokens"][NUM_RANKS + 2] == "<|end_of_msg|>"
    assert keys["tokenizer.ggml.pre"] == "kimi-k2"


def test_chat_template(tmp_path: Path) -> None:
    """The checkpoint has none, and a note says what to do; with the option the file has the given one."""
    source, template = source_of(tmp_path / "model", K3Spec()), tmp_path / "K3.jinja"
    missing = convert(source, "-o", tmp_path / "x.gguf", "--chat-template", template)
    assert missing.status == 1 and "K3.jinja: no such file" in missing.err
    assert "get it from https://github.com/ggml-org/llama.cpp/" in missing.err
    run = convert(source, "-o", tmp_path / "x.gguf")
    assert "--chat-template FILE" in run.err and "--chat-template-file FILE" in run.err
    assert "tokenizer.chat_template" not in gguf_keys(tmp_path / "x.gguf")
    template.write_text("{{ messages }}")
    options = ["--chat-template", template, "--model-card", "--force"]
    run = convert(source, "-o", tmp_path / "x.gguf", *options)
    assert run.status == 0 and "--chat-template" not in run.err
    assert gguf_keys(tmp_path / "x.gguf")["tokenizer.chat_template"] == "{{ messages }}"
    card = (tmp_path / "README.md").read_text()
    assert card.count("--chat-template K3.jinja") == 2, "to make the file, and to verify it"
    check = ("verify", tmp_path / "x.gguf", "--checkpoint", source, "--chat-template", template)
    assert convert(*check).status == 0
    template.write_text("{{ message }}")
    differs = convert(*check)
    assert differs.status == 1 and "tokenizer.chat_template: expected '{{ message }}'" in differs.out
    template.write_bytes(b"\xff")
    run = convert(source, "-o", tmp_path / "x.gguf", *options)
    assert run.status == 1 and "K3.jinja, line 1: expected UTF-8" in run.err


@pytest.mark.parametrize("kind", [None, "BF16"])
def test_inspect_verify_and_card(tmp_path: Path, kind: str | None) -> None:
    source, out = source_of(tmp_path / "model", K3Spec()), tmp_path / "x.gguf"
    options = ["--type", kind] if kind else []
    assert convert(source, "-o", out, "--model-card", *options).status == 0
    card = (tmp_path / "README.md").read_text()
    assert "kimi-k3" in card and (kind or "MXFP4") in card and ("--type" in card) == bool(kind)
    summary = json.loads(convert("inspect", out, "--json").out)
    assert [layer["mixer"] for layer in summary["layers"][1:]] == ["KDA", "KDA", "MLA", "KDA"]
    of_checkpoint = json.loads(convert("inspect", source, "--json").out)
    assert of_checkpoint["types"]["MXFP4"] == [36, 36 * 32 * 64 // 32 * 17]
    # The scores of residual attention are one tensor of the GGUF file and two of the checkpoint.
    assert of_checkpoint["parameters"] == summary["parameters"]
    assert convert("verify", out, "--checkpoint", source).status == 0
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    run = convert("verify", out, "--checkpoint", source)
    assert run.status == 1 and "blk.3.ssm_norm.weight" in run.out


def test_names_without_the_prefix_are_read_too(tmp_path: Path) -> None:
    source = source_of(tmp_path / "model", K3Spec(), shards=1)
    assert convert(source, "-o", tmp_path / "a.gguf").status == 0
    with edited_tensors(source / "model.safetensors") as tensors:
        for name in list(tensors):
            tensors[name.removeprefix(PREFIX)] = tensors.pop(name)
    assert convert(source, "-o", tmp_path / "b.gguf").status == 0
    values = [gguf_values_of(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    assert values[0] == values[1]


def gguf_values_of(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


def test_canonical_values_are_those_of_the_generator(tmp_path: Path) -> None:
    """`float32` of every canonical tensor, among them packed ones."""
    spec = K3Spec()
    with open_checkpoint(source_of(tmp_path / "model", spec)) as checkpoint:
        expected = weights(spec)
        assert set(checkpoint.shapes) == set(expected)
        for name, values in expected.items():
            assert np.array_equal(checkpoint.float32(name), values.float().numpy()), name


def test_blocks_hold_the_same_bits() -> None:
    """Every byte and every finite scale: ggml's layout, read according to its definition, has the packed values."""
    rng = np.random.default_rng(0)
    packed = np.concatenate([np.arange(256, dtype=np.uint8), rng.integers(0, 256, 16 * 239, np.uint8)])
    scales = np.arange(255, dtype=np.uint8)
    data = mxfp4.blocks(packed, scales).reshape(-1, 17)
    codes = np.concatenate([data[:, 1:] & 15, data[:, 1:] >> 4], 1)  # elements j, then elements j + 16
    original = np.stack([packed & 15, packed >> 4], -1).reshape(-1, GROUP)
    assert np.array_equal(codes, original) and np.array_equal(data[:, 0], scales)
    exact = E2M1.numpy()[original] * 2.0 ** (scales.astype(float)[:, None] - 127)
    with np.errstate(over="ignore"):
        assert np.array_equal(mxfp4.values(data.reshape(-1)).reshape(-1, GROUP), exact.astype(np.float32))


@pytest.mark.parametrize("kind", ["MXFP4_MOE", "Q4_0"])
def test_kills_leave_no_wrong_file_and_resume_completes_it(tmp_path: Path, kind: str) -> None:
    spec = K3Spec(layers="KM", experts=96, experts_used=16, moe_intermediate=512)
    source = source_of(tmp_path / "model", spec)
    expected, out = tmp_path / "x", tmp_path / "out"
    expected.mkdir()
    out.mkdir()
    name = ["--name", "x"]
    assert convert(source, "-o", expected / "x.gguf", "--type", kind, *name).status == 0
    counts = killed_conversions(source, out / "x.gguf", 12, kind, 0, expected)
    assert counts["wrong"] == 0 and counts["killed"] == 12 and counts["resumed"] > 0, counts


def test_the_order_of_requests_is_whole_experts(tmp_path: Path) -> None:
    """Elements and scales that are read alternately are listed one after the other, each range once."""
    spec = replace(K3Spec(), layers="KM", moe_intermediate=256, latent=256)
    source = source_of(tmp_path / "model", spec)
    name = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    with open_checkpoint(source) as checkpoint:
        wanted = [(name, first, 8192) for first in range(0, 65536, 8192)]
        wanted += [("model.norm.weight", 0, 64)]
        spans = list(checkpoint._spans(iter(wanted)))
        sizes = [end - begin for _, begin, end in spans]
        assert sizes == [4096] * 8 + [256] * 8 + [128]
        assert all(a[2] == b[1] for a, b in pairwise(spans[:16]))


def test_config_may_repeat_tokens_but_not_contradict(tmp_path: Path) -> None:
    source = source_of(tmp_path / "model", K3Spec())
    with edited_json(source / "config.json") as config:
        del config["text_config"]["eos_token_id"]
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    assert gguf_keys(tmp_path / "x.gguf")["tokenizer.ggml.eos_token_id"] == NUM_RANKS + 2


def test_packed_bytes_are_not_requantized(tmp_path: Path) -> None:
    """Scales that a quantizer would not choose are kept."""
    spec = K3Spec(layers="KM", scales=(200, 200))
    source = source_of(tmp_path / "model", spec)
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    tensors = {t.name: t.data for t in GGUFReader(tmp_path / "x.gguf").tensors}
    packed, scales = packed_experts(spec)["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    found = np.array(tensors["blk.1.ffn_up_exps.weight"]).reshape(spec.experts, -1, 17)[2]
    assert (found[:, 0] == 200).all() and torch.equal(scales, torch.full_like(scales, 200))
    assert (found[0, 1] & 15, found[0, 1] >> 4) == (int(packed[0, 0]) & 15, int(packed[0, 8]) & 15)
