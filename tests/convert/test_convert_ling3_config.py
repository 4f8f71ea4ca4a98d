"""A config of Ling 3 that llama.cpp's graph does not support, or that contradicts itself, is refused with the key."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from convert_tools import assert_refused, convert, edited_json, fresh_checkpoint
from random_ling3 import Layout, LingSpec, config, weights
from test_convert_config import drop, put
from test_convert_fuzzed import fuzz, refusal, write_keys_of

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.families import hub_shapes, read_config
from kimi_gguf.convert.model.ling3 import Ling3Config, Yarn, notes, own_keys

Config = dict[str, Any]
SPEC = LingSpec(mtp=True, dense_layers=2)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# (what is wrong, the change to a valid hub config, words of the error)
HUB_CONFIGS: list[tuple[str, Callable[[Config], object], list[str]]] = [
    ("another model", put(model_type="bailing_moe"), ["model_type", "'bailing_hybrid'", "'bailing_moe'"]),
    ("another activation", put(hidden_act="gelu"), ["hidden_act", "'silu'"]),
    ("softmax", put(score_function="softmax", scoring_func="softmax"), ["score_function", "'softmax'"]),
    ("two score functions", put(scoring_func="softmax"), ["score_function", "scoring_func", "agree"]),
    ("another choice of experts", put(topk_method="greedy"), ["topk_method", "'noaux_tc'"]),
    ("a router without bias", put(moe_router_enable_expert_bias=False), ["moe_router_enable_expert_bias"]),
    ("low-rank gates", put(no_kda_lora=False), ["no_kda_lora", "full rank"]),
    ("low-rank gates by the other key", put(use_kda_lora=True), ["use_kda_lora", "full rank"]),
    ("an unbounded gate", put(kda_safe_gate=False), ["kda_safe_gate", "bounded"]),
    ("a gate per value", put(gated_attention_proj_granularity_type="element_wise"), ["granularity_type", "per head"]),
    ("no norm of q and k", put(use_qk_norm=False), ["use_qk_norm"]),
    ("no RoPE", put(use_mla_nope=True), ["use_mla_nope", "RoPE"]),
    ("RoPE of halves", put(rope_interleave=False), ["rope_interleave", "neighbouring"]),
    ("fewer key heads of KDA", put(num_kv_heads_for_linear_attn=1), ["num_kv_heads_for_linear_attn"]),
    ("fewer key heads", put(num_key_value_heads=1), ["num_key_value_heads", "expected 2"]),
    ("no SiLU after the convolutions", put(linear_silu=False), ["linear_silu"]),
    ("norms of groups", put(group_norm_size=2), ["group_norm_size"]),
    ("biases", put(use_bias=True), ["attention_bias", "bias"]),
    ("biases of q, k and v", put(use_qkv_bias=True), ["use_qkv_bias", "bias"]),
    ("nGPT", put(use_nGPT=True), ["use_nGPT"]),
    ("a norm in the FFN", put(up_proj_norm=True), ["up_proj_norm"]),
    ("normalised values", put(value_norm=True), ["value_norm"]),
    ("KDA in the MTP layer", put(mtp_use_kda=True), ["mtp_use_kda"]),
    ("two MTP layers", put(num_nextn_predict_layers=2), ["num_nextn_predict_layers", "0 or 1"]),
    ("images", put(mrope_section=[8, 12, 12]), ["mrope_section", "images"]),
    ("quantised weights", put(quantization_config={"quant_method": "awq"}), ["quantization_config", "AutoAWQ"]),
    ("a positive bound", put(kda_lower_bound=5), ["kda_lower_bound", "negative"]),
    ("no bound", drop("kda_lower_bound"), ["kda_lower_bound", "nothing"]),
    ("a bound that is no number", put(kda_lower_bound=True), ["kda_lower_bound", "negative"]),
    ("no groups of layers", drop("layer_group_size"), ["layer_group_size"]),
    ("two widths of heads", put(qk_head_dim=47), ["qk_head_dim", "expected 48"]),
    ("another width of RoPE", put(rotary_dim=8), ["rotary_dim", "expected 16"]),
    ("an odd width of RoPE", put(qk_rope_head_dim=15), ["qk_rope_head_dim", "even"]),
    ("two KDA head widths", put(linear_head_dim=64), ["head_dim", "expected 64"]),
    ("more heads of KDA", put(linear_num_heads=4), ["linear_num_heads", "agree"]),
    ("two contexts", put(model_max_length=8192), ["max_position_embeddings", "model_max_length", "agree"]),
    ("two counts of experts", put(num_local_experts=4), ["num_experts", "num_local_experts", "agree"]),
    ("two counts of groups", put(num_expert_group=4), ["n_group", "num_expert_group", "agree"]),
    ("two counts of chosen experts", put(num_experts_per_token=4), ["num_experts_per_tok", "agree"]),
    ("two counts of MTP layers", put(num_mtp_layers=0), ["num_nextn_predict_layers", "num_mtp_layers", "agree"]),
    ("renormalised or not", put(moe_renormalize=False), ["norm_topk_prob", "moe_renormalize", "agree"]),
    ("renormalised by a number", put(norm_topk_prob=1), ["norm_topk_prob", "true or false"]),
    ("no shared expert", put(num_shared_experts=0), ["num_shared_experts"]),
    ("shared experts that a file cannot count", put(num_shared_experts=2**31 - 1), ["num_shared_experts", "width 32"]),
    ("uneven groups", put(n_group=3, topk_group=2), ["num_expert_group", "divisor"]),
    ("more groups kept than there are", put(topk_group=2), ["topk_group", "at most"]),
    ("more experts used than there are", put(num_experts_per_tok=9), ["num_experts_per_token", "8"]),
    ("too many limits", put(expert_swiglu_limit_list=[0] * 8), ["expert_swiglu_limit_list", "at most 7"]),
    ("negative limits", put(share_expert_swiglu_limit_list=[-1]), ["share_expert_swiglu_limit_list"]),
    ("a limit that is too small", put(expert_swiglu_limit_list=[0, 0, 1e-6]), ["expert_swiglu_limit_list"]),
    ("limits that are no list", put(expert_swiglu_limit_list=4), ["expert_swiglu_limit_list", "a list"]),
    ("limits of dense layers", put(expert_swiglu_limit_list=[0, 4]), ["expert_swiglu_limit_list", "dense"]),
    ("another scaling", put(rope_scaling={"type": "linear", "factor": 4.0}), ["rope_scaling.type", "'yarn'"]),
    ("a factor without type", put(rope_scaling={"factor": 4.0}), ["rope_scaling.type", "'yarn'"]),
    ("YaRN without a factor", put(rope_scaling={"type": "yarn"}), ["rope_scaling.factor"]),
    ("a factor below 1", put(rope_scaling=YARN | {"factor": 0.5}), ["rope_scaling.factor", "at least 1"]),
    ("YaRN without the old context", put(rope_scaling={"type": "yarn", "factor": 2}), ["original_max_position"]),
    ("an unknown key", put(rope_scaling=YARN | {"truncate": False}), ["rope_scaling.truncate", "no such"]),
    ("an unknown key of two lines", put(rope_scaling=YARN | {"a\nb": 1}), ["'rope_scaling.a\\nb'", "no such"]),
    ("scales of YaRN too large for a file", put(rope_scaling=YARN | {
        "mscale_all_dim": 1e29, "attention_factor": 1e29,
    }), ["rope_scaling", "below 1e30"]),
    ("two factors", put(rope_scaling=YARN, rope_parameters=YARN | {"factor": 2.0}), ["factor", "agree"]),
    ("two bases", put(rope_parameters={"rope_theta": 10000.0}), ["rope_theta", "agree"]),
    ("scaling that is no object", put(rope_scaling="yarn"), ["rope_scaling", "an object"]),
    ("types of layers missing", put(layer_types=["linear_attention"]), ["layer_types", "6 entries"]),
    ("strange types of layers", put(layer_types=["kda"] * 6), ["layer_types", "'linear_attention'"]),
    ("contradicting dense layers", put(mlp_layer_types=["sparse"] * 6), ["first_k_dense_replace", "agree"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"), [case[1:] for case in HUB_CONFIGS], ids=[c[0] for c in HUB_CONFIGS]
)
def test_unsupported_configs_are_refused(change: Callable[[Config], object], words: list[str]) -> None:
    changed = config(SPEC)
    change(changed)
    with pytest.raises(ConvertError) as caught:
        read_config(changed, "config.json")
    message = str(caught.value)
    assert message.startswith("config.json: ") and "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_the_command_refuses_before_it_writes(tmp_path: Path, out: Path) -> None:
    source = fresh_checkpoint(tmp_path / "model", SPEC)
    with edited_json(source / "config.json") as changed:
        changed["kda_safe_gate"] = False
    assert_refused(convert(source, "-o", out / "x.gguf"), out, "config.json: kda_safe_gate: expected true")


LAYOUTS: list[Layout] = ["hub", "resaved"]


@pytest.mark.parametrize(
    "spec", [SPEC, LingSpec("KM", 2, q_lora=24, groups=4, topk_groups=2)], ids=lambda s: s.id
)
def test_both_forms_mean_the_same(spec: LingSpec) -> None:
    hub, resaved = (read_config(config(spec, layout), layout) for layout in LAYOUTS)
    assert hub == resaved
    assert hub_shapes(hub) == {name: tuple(tensor.shape) for name, tensor in weights(spec).items()}


def test_keys_of_both_forms_together() -> None:
    """transformers keeps the keys of a hub config that it does not know."""
    both = config(SPEC, "hub") | {k: v for k, v in config(SPEC, "resaved").items() if k != "head_dim"}
    assert read_config(both, "both") == read_config(config(SPEC), "hub")


def ling(**changes: object) -> Ling3Config:
    found = read_config(config(SPEC) | changes, "config.json")
    assert isinstance(found, Ling3Config)
    return found


def test_limits_reach_the_layers_that_the_list_names() -> None:
    limits = ling(
        expert_swiglu_limit_list=[0, 0, None, 4], share_expert_swiglu_limit_list=[0, 0, 0, 0, 0, 0, 7]
    )
    assert limits.swiglu_limits == (0, 0, 0, 4, 0, 0, 0)
    assert limits.shared_swiglu_limits == (0, 0, 0, 0, 0, 0, 7)
    names = [key.name for key in own_keys(ling())]
    assert not [name for name in names if "swiglu" in name]


def test_an_integer_is_as_good_as_a_decimal_number() -> None:
    """The published config of the tiny model has -5."""
    assert ling(kda_lower_bound=-5) == ling(kda_lower_bound=-5.0)


def test_widths_of_shared_experts() -> None:
    assert ling().shared_expert_size == SPEC.moe_intermediate
    assert ling(num_shared_experts=2, moe_shared_expert_intermediate_size=48).shared_expert_size == 96
    without = config(SPEC)
    del without["moe_shared_expert_intermediate_size"]
    assert read_config(without, "config.json") == ling()


# Values by YaRN's paper and the reference's: rotated values are multiplied by the first, scores by the second squared.
YARNS = [
    ({}, 1 + 0.1 * 1.3862943611198906, 1.0),
    ({"mscale": 0.7}, 1 + 0.1 * 1.3862943611198906, 1.0),
    ({"mscale_all_dim": 1.0}, 1 + 0.1 * 1.3862943611198906, 1 + 0.1 * 1.3862943611198906),
    ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1 + 0.1 * 1.3862943611198906),
    ({"mscale": 0.5, "mscale_all_dim": 0.8}, 1.0693147180559945 / 1.1109035488895912, 1.1109035488895912),
    ({"attention_factor": 1.25}, 1.25, 1.0),
    ({"attention_factor": 1.25, "mscale_all_dim": 0.8}, 1.25, 1.1109035488895912),
]  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "rotated", "scores"), YARNS, ids=[" ".join(case[0]) or "plain" for case in YARNS]
)
def test_yarn(extra: dict[str, float], rotated: float, scores: float) -> None:
    found = ling(rope_scaling=YARN | extra)
    assert isinstance(found.yarn, Yarn)
    keys = {key.name.removeprefix("bailingmoe3.rope.scaling."): key.value for key in own_keys(found)}
    assert (keys["type"], keys["factor"], keys["original_context_length"]) == ("yarn", 4.0, 64)
    assert (keys["yarn_beta_fast"], keys["yarn_beta_slow"]) == (32.0, 1.0)
    log_multiplier = keys.get("yarn_log_multiplier", 0.0)
    assert isinstance(log_multiplier, float)
    # llama.cpp multiplies scores by the square of `in_scores`, and rotated values by attn_factor * plain / in_scores.
    in_scores, plain = 1 + log_multiplier * 1.3862943611198906, 1 + 0.1 * 1.3862943611198906
    factor = keys.get("attn_factor", 1.0)
    assert isinstance(factor, float)
    assert in_scores == pytest.approx(scores, rel=1e-12)
    assert factor * plain / in_scores == pytest.approx(rotated, rel=1e-12)


def test_a_note_names_what_upstream_ignores_of_yarn() -> None:
    found = ling(rope_scaling=YARN | {"beta_fast": 16.0, "beta_slow": 4})
    keys = {key.name.removeprefix("bailingmoe3.rope.scaling."): key.value for key in own_keys(found)}
    assert (keys["yarn_beta_fast"], keys["yarn_beta_slow"]) == (16.0, 4.0)
    (note,) = notes(found)
    assert "beta_fast 16 and beta_slow 4: upstream llama.cpp uses 32 and 1" in note
    assert not list(notes(ling(rope_scaling=YARN)))


def test_betas_of_yarn_in_the_wrong_order_are_refused() -> None:
    """beta_fast alone below the default of beta_slow, too; equal ones make the ramp a step."""
    for betas in ({"beta_fast": 1.0, "beta_slow": 4.0}, {"beta_fast": 0.5}):
        with pytest.raises(ConvertError, match=r"rope_scaling\.beta_fast.*at least beta_slow"):
            ling(rope_scaling=YARN | betas)
    assert ling(rope_scaling=YARN | {"beta_fast": 4.0, "beta_slow": 4.0}).yarn


def test_hostile_configs(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(SPEC)))

    def act(file: Path) -> None:
        read_config(file.read_bytes(), str(file))

    refused = fuzz(path, 2000, 2, act)
    assert 1000 < len(refused) < 1980


def test_hostile_values() -> None:
    """Any value at any key: a config whose keys can be written, or a refusal in one line."""
    rng, refused = random.Random(3), 0
    values = [
        None,
        True,
        False,
        0,
        1,
        -1,
        7,
        2**31 - 1,
        2**31,
        1e300,
        0.5,
        "",
        "yarn",
        [],
        [1],
        [None],
        {},
        {"factor": 2},
        {"type": []},
    ]
    keys = sorted(
        {*config(SPEC), *config(SPEC, "resaved"), "quantization", "n_shared_experts", "attn_factor"}
    )
    for _ in range(3000):
        changed = config(SPEC, rng.choice(LAYOUTS))
        for key in rng.sample(keys, rng.randint(1, 3)):
            changed[key] = rng.choice(values)
        text = json.dumps(changed)
        refused += bool(refusal(write_keys_of, text))
    assert 1000 < refused < 2900
