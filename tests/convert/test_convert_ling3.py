"""Ling 3: the tensors of llama.cpp's converter, the same bytes from every layout, the MTP layer, the commands."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
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
    units_apart,
    upstream_convert,
)
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from random_ling3 import Layout, LingSpec, weights, write_checkpoint
from test_convert_layouts import converted

from kimi_gguf.convert.conversion import plan_only
from kimi_gguf.convert.inspect_model import inspect_model
from kimi_gguf.convert.model.config import LayerKind
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.tools.synthetic_checkpoint import ling_flash_config, ling_tiny_config, write_synthetic
from kimi_gguf.tools.upstream_converter import FILE_TYPES, Job

SPEC = LingSpec(mtp=True)
TINY = LingSpec(
    layers="KKKMKKKM", group=4, heads=3, q_lora=24, groups=4, topk_groups=2, nope=20, v_dim=24, seed=1
)
FLASH = LingSpec(
    mtp=True, dense_layers=2, experts=12, moe_intermediate=48, seed=2,
    limits=(0, 0, 0, 0, 0.5, 4), shared_limits=(0, 0, 0, 5, 5, 7), rms_norm_eps=1e-5,
)  # fmt: skip
YARN = LingSpec(
    layers="KM", group=2, seed=3, dtype=torch.float32,
    yarn=(("factor", 4.0), ("original_max_position_embeddings", 64), ("beta_fast", 16.0)),
)  # fmt: skip
SPECS = [SPEC, TINY, FLASH, YARN]
HALF = LingSpec(layers="KM", group=2, mtp=True, dtype=torch.float16, dense_layers=0, seed=4)

PAIRS = [(SPEC, kind) for kind in FILE_TYPES] + [
    (TINY, "Q8_0"),
    (FLASH, "BF16"),
    (HALF, "Q8_0"),
    (YARN, "F32"),
]
# Keys that only one of the two files has, or that differ intentionally.
OTHER_KEYS = {
    "general.name",
    "general.size_label",
    "bailingmoe3.attention.value_length",  # the size of the latent, not head_dim
    "bailingmoe3.expert_group_count",  # omitted if there are no groups
    "bailingmoe3.expert_group_used_count",
    "bailingmoe3.rope.scaling.yarn_beta_slow",  # written, although it is the default
    "kimi_gguf.source.config_sha256",
    "kimi_gguf.source.headers_sha256",
}
# llama-quantize of the patched build does not quantize these; upstream's converter has no such rule for Q8_0.
NOT_QUANTIZED = ("ssm_beta.weight", "attn_gate.weight")


def ids(spec: object) -> str:
    return spec.id if isinstance(spec, LingSpec) else str(spec)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By number, a folder with each of PAIRS: the checkpoint, and upstream's GGUF of it; and one without MTP layer."""
    folder, jobs = tmp_path_factory.mktemp("upstream"), []
    for number, (spec, kind) in enumerate(PAIRS):
        source = fresh_checkpoint(folder / f"{number}" / "model", spec)
        jobs.append(Job(source, folder / f"{number}.gguf", kind))
    jobs.append(Job(folder / "0" / "model", folder / "no-mtp.gguf", PAIRS[0][1], mtp=False))
    upstream_convert(jobs)
    return folder


def assert_same(ours_path: Path, theirs_path: Path) -> None:
    """All tensors and keys are the same, except those listed above."""
    theirs = {tensor.name: tensor for tensor in GGUFReader(theirs_path).tensors}
    ours = {tensor.name: tensor for tensor in GGUFReader(ours_path).tensors}
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        if name.endswith(NOT_QUANTIZED) and other.tensor_type is GGMLQuantizationType.Q8_0:
            values = dequantize(tensor.data, tensor.tensor_type)
            assert tensor.tensor_type in (GGMLQuantizationType.BF16, GGMLQuantizationType.F32)
            assert quantize(values, other.tensor_type).tobytes() == other.data.tobytes(), name
            continue
        assert (tensor.tensor_type, list(tensor.shape)) == (other.tensor_type, list(other.shape)), name
        if name.endswith(".ssm_a"):  # exp of a different math library
            assert units_apart(tensor.data, other.data) <= 1, name
            assert (tensor.data > 0).all()
        else:
            assert tensor.data.tobytes() == other.data.tobytes(), name
    our_keys, their_keys = gguf_keys(ours_path), gguf_keys(theirs_path)
    for keys in (our_keys, their_keys):
        for name in [name for name in keys if name.startswith("tokenizer.") or name in OTHER_KEYS]:
            del keys[name]
    assert our_keys == their_keys


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=[f"{spec.id}-{kind}" for spec, kind in PAIRS])
def test_tensors_and_keys_equal_upstreams(tmp_path: Path, pairs: Path, number: int) -> None:
    ours = tmp_path / "ours.gguf"
    run = convert(pairs / f"{number}" / "model", "-o", ours, "--type", PAIRS[number][1])
    assert run.status == 0, run.err
    assert_same(ours, pairs / f"{number}.gguf")


def test_without_the_mtp_layer_too(tmp_path: Path, pairs: Path) -> None:
    ours = tmp_path / "ours.gguf"
    run = convert(pairs / "0" / "model", "-o", ours, "--type", PAIRS[0][1], "--no-mtp")
    assert run.status == 0, run.err
    assert "left out: --no-mtp" in run.err
    assert_same(ours, pairs / "no-mtp.gguf")


LAYOUTS: list[Layout] = ["hub", "resaved", "native"]


@pytest.mark.parametrize("spec", [*SPECS, HALF], ids=ids)
def test_layouts_and_numbers_of_files_give_the_same_bytes(tmp_path: Path, spec: LingSpec) -> None:
    """transformers drops the MTP layer, so the hub's layout is converted without it, too."""
    found = {}
    for layout in LAYOUTS:
        for shards in (1, 3):
            folder = fresh_checkpoint(tmp_path / f"{layout}{shards}", spec, layout, shards)
            found[layout, shards] = converted(folder, tmp_path / f"{layout}{shards}.gguf", "BF16", "--no-mtp")
    first = found["hub", 1]
    assert [key for key, content in found.items() if content != first] == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_a_checkpoint_reads_as_the_hubs_names(tmp_path: Path, spec: LingSpec, layout: Layout) -> None:
    expected = weights(spec)
    if layout != "hub":
        expected = {
            n: t for n, t in expected.items() if not n.startswith(f"model.layers.{len(spec.layers)}.")
        }
    with open_checkpoint(fresh_checkpoint(tmp_path, spec, layout)) as checkpoint:
        assert set(checkpoint.shapes) == set(expected)
        for name, tensor in expected.items():
            assert checkpoint.shapes[name] == tuple(tensor.shape)
            assert np.array_equal(checkpoint.float32(name), tensor.float().numpy()), name


@pytest.mark.parametrize("original_names", [True, False], ids=["resaved", "in-memory-names"])
@pytest.mark.parametrize("spec", [SPEC, TINY, YARN], ids=ids)
def test_what_transformers_saves_gives_the_hub_layouts_values(
    tmp_path: Path, spec: LingSpec, original_names: bool
) -> None:
    from transformers import BailingHybridForCausalLM

    hub = fresh_checkpoint(tmp_path / "hub", spec)
    model = BailingHybridForCausalLM.from_pretrained(hub, dtype=torch.float32)
    saved = tmp_path / "saved"
    model.save_pretrained(saved, save_original_format=original_names)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(hub / name, saved / name)
    expected = converted(hub, tmp_path / "hub.gguf", "F32", "--no-mtp")
    assert converted(saved, tmp_path / "saved.gguf", "F32") == expected


def test_a_checkpoint_without_the_mtp_layer_that_its_config_names(tmp_path: Path) -> None:
    """transformers writes such checkpoints."""
    source = fresh_checkpoint(tmp_path / "model", SPEC, "resaved")
    run = convert(source, "-o", tmp_path / "x.gguf")
    assert run.status == 0 and "left out: the checkpoint does not contain its tensors" in run.err
    keys = gguf_keys(tmp_path / "x.gguf")
    assert keys["bailingmoe3.block_count"] == len(SPEC.layers)
    assert "bailingmoe3.nextn_predict_layers" not in keys


def test_a_part_of_the_mtp_layer_is_missing(tmp_path: Path, out: Path) -> None:
    source = fresh_checkpoint(tmp_path / "model", SPEC, shards=1)
    with edited_tensors(source / "model.safetensors") as tensors:
        del tensors["model.layers.6.eh_proj.weight"]
    assert_refused(
        convert(source, "-o", out / "x.gguf"), out, "missing tensor 'model.layers.6.eh_proj.weight'"
    )
    assert convert(source, "-o", out / "x.gguf", "--no-mtp").status == 0


def test_an_mtp_layer_that_the_config_does_not_name(tmp_path: Path, out: Path) -> None:
    source = fresh_checkpoint(tmp_path / "model", SPEC, shards=1)
    with edited_json(source / "config.json") as config:
        config["num_nextn_predict_layers"] = 0
    assert_refused(convert(source, "-o", out / "x.gguf"), out, "unexpected tensor 'model.layers.6.")


# Layers after the last whole group: transformers gives them KDA, other programs latent attention.
LAST = [
    LingSpec(layers="KKMK", seed=5),
    LingSpec(layers="KKMM", mtp=True, seed=6),
    LingSpec(layers="KK", seed=7),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", LAST, ids=ids)
def test_the_tensors_say_what_the_layers_after_the_last_group_are(
    tmp_path: Path, spec: LingSpec, layout: Layout
) -> None:
    source = fresh_checkpoint(tmp_path / "model", spec, layout)
    with edited_json(source / "config.json") as config:
        config.pop("layer_types", None)
    with open_checkpoint(source) as checkpoint:
        kinds = {LayerKind.KDA: "K", LayerKind.MLA: "M"}
        assert "".join(kinds[kind] for kind in checkpoint.config.layers) == spec.layers
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    heads = gguf_keys(tmp_path / "x.gguf")["bailingmoe3.attention.head_count_kv"]
    kinds_in_file = spec.kinds if layout == "hub" else spec.layers
    assert heads == [int(kind == "M") for kind in kinds_in_file]


def test_layer_types_that_the_tensors_contradict(tmp_path: Path, out: Path) -> None:
    source = fresh_checkpoint(tmp_path / "model", LAST[0])
    with edited_json(source / "config.json") as config:
        config["layer_types"] = ["linear_attention"] * 2 + ["full_attention"] * 2
    refused = convert(source, "-o", out / "x.gguf")
    assert_refused(
        refused, out, "missing tensor 'model.layers.3.attention.", "config.json describes another model"
    )


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_a_file_is_verified_against_its_checkpoint(tmp_path: Path, spec: LingSpec) -> None:
    source = fresh_checkpoint(tmp_path / "model", spec)
    for number, options in enumerate(((), ("--no-mtp",), ("--type", "F16"))):
        file = tmp_path / f"{number}.gguf"
        assert convert(source, "-o", file, *options).status == 0
        run = convert("verify", file, "--checkpoint", source)
        assert run.status == 0 and run.out.endswith("identical to a new conversion\n"), run.out
    other = fresh_checkpoint(tmp_path / "other", replace(spec, seed=99))
    run = convert("verify", tmp_path / "0.gguf", "--checkpoint", other)
    assert run.status == 1 and "blk.0.ssm_a (F32): first difference at byte" in run.out


def test_inspect_shows_the_kinds_of_layers(tmp_path: Path) -> None:
    source = fresh_checkpoint(tmp_path / "model", SPEC)
    assert convert(source, "-o", tmp_path / "x.gguf").status == 0
    for path in (tmp_path / "x.gguf", source):
        summary = inspect_model(path, 1000)
        assert [layer.mixer for layer in summary.layers] == [
            "",
            "KDA",
            "KDA",
            "MLA",
            "KDA",
            "KDA",
            "MLA",
            "MTP",
        ]
        assert [layer.ffn for layer in summary.layers] == ["", "dense", *["MoE"] * 6]
        assert summary.latent_cache_f16 == 2 * (SPEC.kv_lora + SPEC.rope) * 1000 * 2
        assert summary.parameters == sum(tensor.numel() for tensor in weights(SPEC).values())


def test_a_recipe_quantizes_routed_experts_only(tmp_path: Path) -> None:
    """The input projection of the MTP layer stays Q8_0."""
    source = write_checkpoint(tmp_path / "in", SPEC)
    plan = convert(source, "--dry-run", "--recipe", "kimi-q4").out
    types = {line.split()[0]: line.split()[1] for line in plan.splitlines() if ".weight" in line.split()[0]}
    assert [kind for name, kind in types.items() if "nextn.eh_proj" in name] == ["Q8_0"]
    for name, kind in types.items():
        assert kind in ({"Q4_K", "Q5_0"} if "_exps" in name else {"Q8_0", "F32", "BF16"}), name
        assert kind != "BF16" or name.endswith(("ssm_beta.weight", "attn_gate.weight"))


def test_the_model_card(tmp_path: Path) -> None:
    source = fresh_checkpoint(tmp_path / "Ling-Test", SPEC)
    (tmp_path / "out").mkdir()
    run = convert(source, "-o", tmp_path / "out" / "x.gguf", "--model-card", "--no-mtp")
    assert run.status == 0, run.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- bailingmoe3" in card
    assert "convert-kimi Ling-Test -o x.gguf --no-mtp --model-card" in card
    assert "`ssm_a` = exp(A_log)" in card and "-exp(A_log)" not in card
    assert "(`<|role_end|>`)" in card and "[EOS]" not in card
    assert "With upstream llama.cpp" in card


def test_the_shape_of_ling_3_tiny_is_planned(tmp_path: Path) -> None:
    """A sparse checkpoint with all tensors: 128 experts in 23 layers."""
    source = write_synthetic(tmp_path / "Ling-3.0-tiny", ling_tiny_config(), num_shards=32)
    plan = plan_only(source, TYPES["Q4_K_M"])
    facts = {key.name: key.value for key in plan.keys}
    assert facts["bailingmoe3.block_count"] == 24
    assert str(facts["general.size_label"]).startswith("7.9B-A")
    assert 4.5e9 < plan.nbytes < 5.5e9


def test_the_whole_of_ling_3_flash_is_planned(tmp_path: Path) -> None:
    """A sparse checkpoint with all tensors: 512 experts in 41 layers, of which the last predicts a further token.

    The published number of parameters is 124 billion, without that layer.
    """
    source = write_synthetic(tmp_path / "Ling-3.0-flash", ling_flash_config(), num_shards=32)
    plan = plan_only(source, TYPES["BF16"])
    facts = {key.name.removeprefix("bailingmoe3."): key.value for key in plan.keys}
    assert (facts["block_count"], facts["nextn_predict_layers"]) == (43, 1)
    assert facts["attention.head_count_kv"] == [int(i % 6 == 5) for i in range(42)] + [1]
    assert [len(facts[f"swiglu_clamp_{x}"]) for x in ("exp", "shexp")] == [43, 43]
    main = sum(math.prod(t.output.ne) for t in plan.tensors if not t.name.startswith("blk.42."))
    assert round(main / 1e9) == 124
    assert [t.output.ne for t in plan.tensors if t.name == "blk.42.ffn_up_exps.weight"] == [(2560, 768, 512)]
