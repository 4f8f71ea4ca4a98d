"""A config that llama.cpp's graph does not support, or that contradicts itself, is refused with the name of the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from convert_tools import assert_refused, convert
from random_checkpoint import Layout, Spec, config

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.families import read_config

Config = dict[str, Any]
SPEC = Spec(layers="KMK", experts=8)


def linear(**keys: object) -> Callable[[Config], object]:
    return lambda c: c["linear_attn_config"].update(keys)


def put(**keys: object) -> Callable[[Config], object]:
    return lambda c: c.update(keys)


def drop(*keys: str) -> Callable[[Config], object]:
    return lambda c: [c.pop(key) for key in keys]


# (what is wrong, the change to a valid hub config, words of the error)
HUB_CONFIGS: list[tuple[str, Callable[[Config], object], list[str]]] = [
    ("another model", put(model_type="llama"), ["model_type", "'kimi_linear'", "'llama'"]),
    ("no model type", drop("model_type"), ["model_type"]),
    ("another activation", put(hidden_act="gelu"), ["hidden_act", "'silu'", "'gelu'"]),
    ("softmax", put(moe_router_activation_func="softmax"), ["moe_router_activation_func", "'softmax'"]),
    ("no renormalisation", put(moe_renormalize=False), ["moe_renormalize", "expected true, found false"]),
    ("every second layer MoE", put(moe_layer_freq=2), ["moe_layer_freq", "1", "2"]),
    ("rotation on", put(mla_use_nope=False), ["mla_use_nope", "rotates"]),
    ("rotation not denied", drop("mla_use_nope"), ["mla_use_nope", "nothing"]),
    ("rope scaling", put(rope_scaling={"type": "yarn", "factor": 4}), ["rope_scaling", "yarn"]),
    ("scaled rope parameters", put(rope_parameters={"rope_type": "yarn"}), ["rope_parameters.rope_type"]),
    ("biases", put(attention_bias=True), ["attention_bias", "bias"]),
    ("further-token layers", put(num_nextn_predict_layers=1), ["num_nextn_predict_layers"]),
    (
        "quantised weights",
        put(quantization_config={"quant_method": "awq"}),
        ["quantization_config", "AutoAWQ"],
    ),
    ("no shared expert", put(num_shared_experts=0), ["num_shared_experts", "at least 1"]),
    ("no scaling", put(routed_scaling_factor=0), ["routed_scaling_factor", "positive"]),
    ("KDA heads", linear(num_heads=4), ["linear_attn_config.num_heads", "expected 2", "found 4"]),
    ("KDA value size", linear(head_v_dim=64), ["linear_attn_config.head_v_dim", "expected 32", "found 64"]),
    ("conv of width 1", linear(short_conv_kernel_size=1), ["short_conv_kernel_size", "from 2"]),
    ("grouped key heads", put(num_key_value_heads=1), ["num_key_value_heads", "expected 2"]),
    ("layer in both lists", linear(full_attn_layers=[2, 3]), ["layer 3", "twice"]),
    ("layer twice in one list", linear(kda_layers=[1, 3, 3]), ["layer 3", "twice"]),
    ("layer in no list", linear(kda_layers=[1]), ["layer 3", "neither"]),
    ("from 0", linear(kda_layers=[0, 2], full_attn_layers=[1]), ["kda_layers", "from 1 to 3", "found 0"]),
    ("layer out of range", linear(kda_layers=[1, 3, 4]), ["kda_layers", "from 1 to 3", "found 4"]),
    ("layer not a number", linear(kda_layers=[1, "3"]), ["kda_layers", "'3'"]),
    ("no layer lists", drop("linear_attn_config"), ["kda_layers", "nothing"]),
    ("lists not lists", linear(kda_layers=1), ["kda_layers", "a list"]),
    ("linear config not an object", put(linear_attn_config=[1]), ["linear_attn_config", "an object"]),
    ("contradicting types", put(layer_types=["full_attention"] * 3), ["layer 1", "layer_types", "agree"]),
    ("contradicting head size", put(linear_head_dim=64), ["linear_head_dim", "agree"]),
    ("contradicting dense layers", put(mlp_layer_types=["sparse"] * 3), ["first_k_dense_replace", "agree"]),
    ("more dense layers than layers", put(first_k_dense_replace=4), ["first_k_dense_replace", "from 0 to 3"]),
    ("no dense layers given", drop("first_k_dense_replace"), ["first_k_dense_replace", "nothing"]),
    ("more experts used than there are", put(num_experts_per_token=9), ["num_experts_per_token", "8"]),
    ("more groups kept than there are", put(topk_group=2), ["topk_group", "at most", "1"]),
    ("uneven groups", put(num_expert_group=3), ["num_expert_group", "divisor"]),
    ("groups of one expert", put(num_expert_group=8, topk_group=4), ["num_expert_group", "two experts"]),
    (
        "experts beyond the kept groups",
        put(num_expert_group=4, num_experts_per_token=3),
        ["num_experts_per_token", "at most 2"],
    ),
    (
        "groups that are not to be used",
        put(num_expert_group=4, topk_group=2, use_grouped_topk=False),
        ["use_grouped_topk"],
    ),
    ("missing size", drop("kv_lora_rank"), ["kv_lora_rank", "nothing"]),
    ("size of zero", put(qk_rope_head_dim=0), ["qk_rope_head_dim", "from 1"]),
    ("size as text", put(hidden_size="64"), ["hidden_size", "'64'"]),
    ("size as truth", put(num_hidden_layers=True), ["num_hidden_layers", "found true"]),
    ("negative size", put(vocab_size=-5), ["vocab_size", "-5"]),
    ("huge size", put(hidden_size=10**30), ["hidden_size"]),
    ("too many layers", put(num_hidden_layers=513), ["num_hidden_layers", "512"]),
    ("eps as text", put(rms_norm_eps="1e-5"), ["rms_norm_eps", "positive"]),
    ("eps of 400 digits", put(rms_norm_eps=10**400), ["rms_norm_eps", "positive"]),
    ("eps zero", put(rms_norm_eps=0.0), ["rms_norm_eps", "positive"]),
    ("eps that is zero in float32", put(rms_norm_eps=1e-60), ["rms_norm_eps", "from 1e-30", "1e-60"]),
    ("end token out of range", put(eos_token_id=530), ["eos_token_id", "530"]),
    ("padding token out of range", put(pad_token_id=530), ["pad_token_id", "530"]),
    ("begin token out of range", put(bos_token_id=-1), ["bos_token_id", "-1"]),
    ("too many end tokens", put(eos_token_id=[276, 5, 6]), ["eos_token_id", "5", "GGUF names three"]),
    ("tied as text", put(tie_word_embeddings="yes"), ["tie_word_embeddings", "'yes'"]),
]
NATIVE_CONFIGS: list[tuple[str, Callable[[Config], object], list[str]]] = [
    ("dense after sparse", put(mlp_layer_types=["dense", "sparse", "dense"]), ["mlp_layer_types", "first"]),
    ("unknown layer type", put(layer_types=["sliding_attention"] * 3), ["layer_types", "sliding_attention"]),
    ("too few layer types", put(layer_types=["full_attention"]), ["layer_types", "3 entries", "1 entries"]),
    ("unknown FFN type", put(mlp_layer_types=["dense", "sparse", "x"]), ["mlp_layer_types", "'dense'"]),
    ("nested layer type", put(layer_types=[["full_attention"]] * 3), ["layer_types"]),
]


CASES = [
    *(("hub", change, words) for _, change, words in HUB_CONFIGS),
    *(("native", change, words) for _, change, words in NATIVE_CONFIGS),
]


@pytest.mark.parametrize("layout, change, words", CASES, ids=[c[0] for c in HUB_CONFIGS + NATIVE_CONFIGS])
def test_config_is_refused(
    source: Path, out: Path, layout: Layout, change: Callable[[Config], object], words: list[str]
) -> None:
    data = config(SPEC, layout)
    read_config(data, "config.json")  # does not raise: only the change causes the error
    change(data)
    (source / "config.json").write_text(json.dumps(data))
    assert_refused(convert(source, "-o", out / "x.gguf"), out, "config.json", *words)


def test_settings_that_are_supported_are_not_refused() -> None:
    for change in (
        put(num_expert_group=4, topk_group=2),
        put(num_expert_group=4, topk_group=4),
        put(q_lora_rank=16),
        put(eos_token_id=[276]),
        put(eos_token_id=None, bos_token_id=None, pad_token_id=None),
        put(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_theta=None),
        put(layer_types=["linear_attention", "full_attention", "linear_attention"]),
        put(first_k_dense_replace=0),
        put(first_k_dense_replace=3, num_shared_experts=0),
        put(auto_map={"AutoConfig": "evil.Evil"}),
    ):
        data = config(SPEC)
        change(data)
        read_config(data, "config.json")


def test_config_text_is_read_strictly() -> None:
    for text, word in (('{"a": 1, "a": 2}', "twice"), ('{"a": NaN}', "NaN"), ("[]", "object"), ("{", "JSON")):
        with pytest.raises(ConvertError, match=word):
            read_config(text, "config.json")
    with pytest.raises(ConvertError, match="deep"):
        read_config("[" * 100_000, "config.json")
