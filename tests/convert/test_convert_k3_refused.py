"""Kimi K3: everything that llama.cpp's graph does not compute, other packed formats and damaged files are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_tools import assert_refused, convert, edited_json, edited_tensors
from random_checkpoint import NUM_RANKS, VOCAB_SIZE
from random_k3 import PREFIX, K3Spec, config, write_checkpoint
from test_convert_fuzzed import refusal, write_keys_of

SPEC = K3Spec(layers="KMK", experts=3)
LINEAR, QUANT = "linear_attn_config", "quantization_config"
Tensors = dict[str, tuple[str, list[int], bytes]]
Change = Callable[[Tensors], object]
MOE = f"{PREFIX}model.layers.1.block_sparse_moe."
W1, W2 = f"{MOE}experts.2.w1.weight", f"{MOE}experts.0.w2.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", SPEC, shards=1)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def at(text: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The object that holds the key at the end of a path."""
    *names, last = path.split(".")
    for name in names:
        text = text[name]
    return text, last


WEIGHTS = f"{QUANT}.config_groups.group_0.weights"
# (key of text_config, its value, words of the error)
CONFIGS: list[tuple[str, Any, list[str]]] = [
    ("hidden_act", "silu", ["hidden_act", "'situ'", "'silu'", "always SiTU"]),
    ("hidden_act", None, ["hidden_act", "expected a value"]),
    ("moe_router_activation_func", "softmax", ["moe_router_activation_func", "sigmoid"]),
    ("topk_method", "greedy", ["topk_method", "'noaux_tc'", "'greedy'", "adds a bias"]),
    ("moe_layer_freq", 2, ["moe_layer_freq", "expected 1, found 2"]),
    ("mla_use_nope", False, ["mla_use_nope", "never rotates"]),
    ("mla_use_nope", None, ["mla_use_nope"]),
    (f"{LINEAR}.use_full_rank_gate", False, ["use_full_rank_gate", "full rank"]),
    (f"{LINEAR}.use_full_rank_gate", None, ["use_full_rank_gate"]),
    (f"{LINEAR}.gate_lower_bound", None, ["gate_lower_bound", "a negative number", "nothing"]),
    (f"{LINEAR}.gate_lower_bound", 0.0, ["gate_lower_bound", "a negative number"]),
    (f"{LINEAR}.gate_lower_bound", -1e-300, ["gate_lower_bound", "a negative number"]),  # 0 in the file
    (f"{LINEAR}.gate_lower_bound", "-5", ["gate_lower_bound", "a negative number"]),
    (f"{LINEAR}.num_heads", 4, ["num_heads", "expected 2"]),
    (f"{LINEAR}.kda_layers", [1], ["layer 3"]),
    ("attention_bias", True, ["attention_bias", "false", "true"]),
    ("num_nextn_predict_layers", 1, ["num_nextn_predict_layers", "expected 0, found 1"]),
    ("rope_scaling", {"type": "yarn"}, ["rope_scaling"]),
    ("num_key_value_heads", 1, ["num_key_value_heads"]),
    ("num_shared_experts", 0, ["num_shared_experts"]),
    ("activation_situ_beta", 0, ["activation_situ_beta", "a positive number"]),
    ("activation_situ_beta", None, ["activation_situ_beta"]),
    ("activation_situ_linear_beta", -1.0, ["activation_situ_linear_beta"]),
    ("attn_res_block_size", -1, ["attn_res_block_size"]),
    ("attn_res_block_size", 2.5, ["attn_res_block_size"]),
    ("routed_expert_hidden_size", 0, ["routed_expert_hidden_size"]),
    ("routed_expert_hidden_size", 48, ["routed_expert_hidden_size", "multiple of 32", "48"]),
    ("moe_intermediate_size", 40, ["moe_intermediate_size", "multiple of 32", "40"]),
    ("moe_renormalize", 1, ["moe_renormalize"]),
    ("mla_use_output_gate", "yes", ["mla_use_output_gate"]),
    ("mla_use_output_gate", False, ["unexpected tensor", "g_proj"]),
    ("latent_moe_use_norm", False, ["unexpected tensor", "routed_expert_norm"]),
    ("num_experts_per_token", 4, ["num_experts_per_token"]),
    ("eos_token_id", NUM_RANKS, ["text_config.eos_token_id", str(NUM_RANKS + 2), "outside"]),
    ("eos_token_id", VOCAB_SIZE, ["eos_token_id"]),
    (f"{QUANT}.quant_method", "fp8", ["quant_method", "compressed-tensors", "fp8", "dequantise"]),
    (f"{QUANT}.format", "pack-quantized", ["format", "mxfp4-pack-quantized", "'pack-quantized'"]),
    (f"{QUANT}.format", "nvfp4-pack-quantized", ["format", "nvfp4"]),
    (f"{QUANT}.kv_cache_scheme", {"num_bits": 8}, ["kv_cache_scheme"]),
    (f"{QUANT}.transform_config", {"config_groups": {"a": 1}}, ["transform_config"]),
    (f"{QUANT}.sparsity_config", {"format": "sparse-bitmask"}, ["sparsity_config"]),
    (f"{QUANT}.ignore", "lm_head", ["ignore", "a list"]),
    (f"{QUANT}.config_groups", {}, ["config_groups", "one group"]),
    (f"{QUANT}.config_groups", None, ["config_groups", "an object"]),
    (f"{QUANT}.config_groups", {"a\nb": 4}, ["config_groups.a\\nb'", "an object"]),
    (f"{QUANT}.config_groups", {"a" * 5000: 4}, ["config_groups.aaa", "an object"]),
    (f"{QUANT}.config_groups.group_0", 4, ["group_0", "an object"]),
    (f"{QUANT}.config_groups.group_0.format", "float-quantized", ["group_0.format"]),
    (f"{QUANT}.config_groups.group_0.input_activations", {"num_bits": 8}, ["input_activations"]),
    (f"{WEIGHTS}.num_bits", 8, ["num_bits", "4", "8"]),
    (f"{WEIGHTS}.type", "int", ["weights.type", "'float'", "'int'"]),
    (f"{WEIGHTS}.group_size", 16, ["group_size", "32", "16"]),
    (f"{WEIGHTS}.group_size", None, ["group_size", "nothing"]),
    (f"{WEIGHTS}.symmetric", False, ["symmetric"]),
    (f"{WEIGHTS}.strategy", "channel", ["strategy"]),
    (f"{WEIGHTS}.dynamic", True, ["dynamic"]),
    (f"{WEIGHTS}.actorder", "group", ["actorder"]),
    (f"{WEIGHTS}.scale_dtype", "torch.float8_e4m3fn", ["scale_dtype"]),
    (QUANT, None, ["weight_packed", "quantization_config", "found none"]),
    (QUANT, "mxfp4", ["quantization_config", "an object"]),
]


@pytest.mark.parametrize(
    "key, value, words", CONFIGS, ids=[f"{key}-{value}"[:80] for key, value, _ in CONFIGS]
)
def test_config_is_refused(source: Path, out: Path, key: str, value: Any, words: list[str]) -> None:
    with edited_json(source / "config.json") as changed:
        holder, last = at(changed["text_config"], key)
        holder[last] = value
    assert_refused(convert(source, "-o", out / "x.gguf"), out, "config.json" if key != QUANT else "", *words)


def objects(text: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The object and all objects in it."""
    yield text
    for value in text.values():
        if isinstance(value, dict):
            yield from objects(value)


def test_hostile_values() -> None:
    """Any value at any key of any object: a config whose keys can be written, or a refusal in one line."""
    rng, refused = random.Random(4), 0
    values: list[Any] = [
        None, True, False, 0, 1, -1, 7, 32, 2**31 - 1, 2**31, 10**400, 1e300, -1e300, 1e-300, -1e-300, 0.5, -5.0,
        "", "a\nb", "a" * 5000, [], [1], [None], {}, {"a\nb": {"c": 1}}, {"a" * 5000: 1}, {"type": []},
    ]  # fmt: skip
    more = [
        "rope_scaling",
        "rope_parameters",
        "layer_types",
        "mlp_layer_types",
        "topk_group",
        "n_group",
        QUANT,
    ]

    for number in range(3000):
        changed = config(replace(SPEC, dense_layers=number % 4))
        for _ in range(rng.randint(1, 3)):
            holder = rng.choice(list(objects(changed)))
            holder[rng.choice([*holder, *more])] = deepcopy(rng.choice(values))
        refused += bool(refusal(write_keys_of, json.dumps(changed)))
    assert 1000 < refused < 2900


@pytest.mark.parametrize("value", [None, [], "kimi_linear"], ids=str)
def test_text_config_is_an_object(source: Path, out: Path, value: Any) -> None:
    with edited_json(source / "config.json") as changed:
        changed["text_config"] = value
    assert_refused(convert(source, "-o", out / "x.gguf"), out, "text_config", "an object")


def set_byte(name: str, index: int, value: int) -> Change:
    def change(tensors: Tensors) -> None:
        dtype, shape, content = tensors[name]
        tensors[name] = dtype, shape, content[:index] + bytes([value]) + content[index + 1 :]

    return change


def reshape(name: str, shape: list[int], dtype: str = "U8") -> Change:
    def change(tensors: Tensors) -> None:
        size = {"U8": 1, "I8": 1, "BF16": 2, "F8_E4M3": 1, "F32": 4, "I32": 4}[dtype]
        tensors[name] = dtype, shape, bytes(size * int(np.prod(shape)))

    return change


def lose(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def both(*changes: Change) -> Change:
    return lambda tensors: [change(tensors) for change in changes]


Q = f"{PREFIX}model.layers.0.self_attn.q_proj.weight"
# (what is wrong, the change to valid tensors, words of the error)
TENSORS: list[tuple[str, Change, list[str]]] = [
    ("a scale that is NaN", set_byte(f"{W1}_scale", 63, 255), [f"{W1}_scale", "[63, 0]", "nan", "255"]),
    ("its first of several", both(set_byte(f"{W2}_scale", 40, 255), set_byte(f"{W2}_scale", 7, 255)), ["[3, 1]"]),
    # Row 2, second group: its first byte has 6 (code 7) in the low half.
    (
        "a scale that overflows",
        both(set_byte(f"{W2}_scale", 5, 253), set_byte(f"{W2}_packed", 80, 0x07)),
        [f"{W2}_scale", "[2, 1]", "inf", "damaged"],
    ),
    ("no scales", lose(f"{W1}_scale"), [f"{W1}_packed", "missing", f"{W1}_scale"]),
    ("no elements", lose(f"{W1}_packed"), ["missing tensor", "experts.2.w1.weight"]),
    ("a zero point", reshape(f"{W1}_zero_point", [64, 1]), ["unexpected", "zero_point"]),
    ("a global scale", reshape(f"{W1}_global_scale", [1], "F32"), ["unexpected", "global_scale"]),
    ("unpacked elements", reshape(f"{W1}_packed", [64, 32]), [f"{W1}_packed", "[64, 16]", "[64, 32]"]),
    ("groups of 16", reshape(f"{W1}_scale", [64, 2]), [f"{W1}_scale", "[64, 1]", "[64, 2]"]),
    ("flat scales", reshape(f"{W1}_scale", [64]), [f"{W1}_scale", "[64, 1]", "[64]"]),
    ("signed elements", reshape(f"{W1}_packed", [64, 16], "I8"), [f"{W1}_packed", "U8", "I8"]),
    ("integers", reshape(f"{W1}_packed", [64, 16], "I32"), [f"{W1}_packed", "U8", "I32"]),
    ("scales in FP8", reshape(f"{W1}_scale", [64, 1], "F8_E4M3"), [f"{W1}_scale", "F8_E8M0", "F8_E4M3"]),
    ("scales in BF16", reshape(f"{W1}_scale", [64, 1], "BF16"), [f"{W1}_scale", "BF16"]),
    ("a plain copy", reshape(W1, [64, 32], "BF16"), ["duplicate", W1, f"{W1}_packed"]),
    ("an expert too many", reshape(f"{MOE}experts.3.w1.weight_packed", [64, 16]), ["unexpected", "experts.3"]),
    ("a packed projection", both(lose(Q), reshape(f"{Q}_packed", [64, 32])), [f"{Q}_packed", "only routed"]),
    ("a packed shared expert", both(
        lose(f"{MOE}shared_experts.up_proj.weight"),
        reshape(f"{MOE}shared_experts.up_proj.weight_packed", [128, 32]),
    ), ["shared_experts.up_proj.weight_packed", "only routed"]),
    ("bytes as weights", reshape(Q, [64, 64]), [Q, "F32, F16, BF16", "U8"]),
    ("a short A_log", reshape(f"{PREFIX}model.layers.0.self_attn.A_log", [1], "F32"), ["A_log", "[2]", "[1]"]),
    ("a long norm", reshape(f"{PREFIX}model.norm.weight", [65], "BF16"), ["model.norm", "[64]", "[65]"]),
    ("a flat projection", reshape(f"{PREFIX}model.layers.0.mlp_res_proj.weight", [64], "BF16"), ["[1, 64]"]),
    ("no factor", lose(f"{PREFIX}model.output_attn_res_proj.weight"), ["missing", "output_attn_res_proj"]),
    ("another part", reshape("audio_tower.weight", [1]), ["unexpected", "audio_tower"]),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["MXFP4_MOE", "BF16", "F32"])
@pytest.mark.parametrize("change, words", [c[1:] for c in TENSORS], ids=[c[0] for c in TENSORS])
def test_tensor_is_refused(source: Path, out: Path, change: Change, words: list[str], kind: str) -> None:
    """With any type: also where the bytes would only be copied."""
    with edited_tensors(source / "model.safetensors") as tensors:
        change(tensors)
    run = convert(source, "-o", out / "x.gguf", "--type", kind, "--quiet")
    assert_refused(run, out, *words)


@pytest.mark.parametrize("code", [0x7F, 0xC0])
def test_a_factor_of_a_product_that_is_not_finite_is_named(source: Path, out: Path, code: int) -> None:
    """NaN and infinity in either factor; their index is that in the factor."""
    for name, words in (("mlp_res_norm", "[5]"), ("mlp_res_proj", "[0, 5]")):
        full = f"{PREFIX}model.layers.2.{name}.weight"
        with edited_tensors(source / "model.safetensors") as tensors:
            dtype, shape, content = tensors[full]
            kept, poked = (
                content,
                content[:10] + (0x7F80 | (code & 0x7F)).to_bytes(2, "little") + content[12:],
            )
            tensors[full] = dtype, shape, poked
        assert_refused(convert(source, "-o", out / "x.gguf", "--quiet"), out, full, words)
        with edited_tensors(source / "model.safetensors") as tensors:
            tensors[full] = dtype, shape, kept


def test_a_product_that_overflows_is_refused(source: Path, out: Path) -> None:
    with edited_tensors(source / "model.safetensors") as tensors:
        for name in ("norm", "proj"):
            full = f"{PREFIX}model.output_attn_res_{name}.weight"
            dtype, shape, content = tensors[full]
            tensors[full] = dtype, shape, content[:6] + b"\x00\x7f" + content[8:]
    words = ("output_attn_res_norm.weight", "output_res_score.weight", "[3]")
    assert_refused(convert(source, "-o", out / "x.gguf", "--quiet"), out, *words)


def test_a_value_too_large_for_f16_is_refused_with_its_index(source: Path, out: Path) -> None:
    """6 x 2^14 is finite, but no half; bfloat16 holds it."""
    with edited_tensors(source / "model.safetensors") as tensors:
        others = (set_byte(f"{W2}_packed", 80 + byte, 0) for byte in range(16))
        both(*others, set_byte(f"{W2}_scale", 5, 127 + 14), set_byte(f"{W2}_packed", 81, 0x70))(tensors)
    run = convert(source, "-o", out / "x.gguf", "--type", "F16", "--quiet")
    # Byte 17 of row 2 holds the elements 34 and 35 in its low and high half.
    assert_refused(run, out, f"{W2}_packed", "ffn_down_exps", "[2, 35]", "98304", "F16")
    assert convert(source, "-o", out / "x.gguf", "--type", "BF16", "--quiet").status == 0


def test_scales_in_e8m0_are_read(source: Path, out: Path) -> None:
    assert convert(source, "-o", out / "a.gguf", "--name", "x").status == 0
    with edited_tensors(source / "model.safetensors") as tensors:
        for name, (dtype, shape, content) in tensors.items():
            tensors[name] = ("F8_E8M0" if name.endswith("_scale") else dtype), shape, content
    assert convert(source, "-o", out / "b.gguf", "--name", "x").status == 0
    data = [(out / name).read_bytes()[-5000:] for name in ("a.gguf", "b.gguf")]
    assert data[0] == data[1]


def test_the_padding_of_a_log_is_not_used(source: Path, out: Path) -> None:
    """It is NaN in these checkpoints; a NaN among the used values is refused."""
    assert convert(source, "-o", out / "x.gguf").status == 0
    (out / "x.gguf").unlink()
    name = f"{PREFIX}model.layers.0.self_attn.A_log"
    with edited_tensors(source / "model.safetensors") as tensors:
        dtype, shape, content = tensors[name]
        assert shape == [4]
        tensors[name] = dtype, shape, content[:4] + content[12:16] + content[8:]
    assert_refused(convert(source, "-o", out / "x.gguf", "--quiet"), out, name, "[1]", "nan")
