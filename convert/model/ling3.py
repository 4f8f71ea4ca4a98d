"""Ling 3 and Ring 3 (`bailing_hybrid`, llama.cpp's architecture `bailingmoe3`): their config.json and GGUF keys.

Layers come in groups: KDA layers with a bounded gate, then one with latent attention, RoPE and a sigmoid gate per
head. Gates of KDA have full rank. One layer after the others may predict a further token (MTP).

The config is read as it is stored. The hub's has `layer_group_size`; transformers renames some keys when it saves
(`attribute_map`), writes the kinds of layers, and replaces `head_dim` by the width of RoPE.

The tensors are in ling3_tensors.py.

Sources: `bailing_hybrid` of transformers 5.23; llama.cpp's loader and converter for `bailingmoe3`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from gguf import GGUFValueType as ValueType

from kimi_gguf.convert.model.bpe_vocab import load_bpe_vocab
from kimi_gguf.convert.model.common_tensors import HEAD, KDA_GATES, NORM
from kimi_gguf.convert.model.config import LayerKind, ModelConfig
from kimi_gguf.convert.model.config_keys import (
    ABSENT,
    MAX_EXPERTS,
    MAX_INT,
    MAX_LAYERS,
    ROPE,
    SCALING,
    Keys,
    Supported,
    check_experts,
    check_heads,
    check_supported,
    common_fields,
    dense_layers,
    layer_kinds,
)
from kimi_gguf.convert.model.family import Family
from kimi_gguf.convert.model.gguf_key import Key, u32
from kimi_gguf.convert.model.ling3_tensors import EMBEDDING, LAYERS, RULES
from kimi_gguf.convert.model.stored_forms import read_forms
from kimi_gguf.convert.model.tensor_table import FLOAT32, Table

ARCHITECTURE: Final = "bailingmoe3"
BETA_FAST, BETA_SLOW = 32.0, 1.0  # YaRN's defaults, of transformers and of llama.cpp


@dataclass(frozen=True)
class Yarn:
    """RoPE for longer contexts than the model was trained with; names as in config.json's `rope_scaling`."""

    factor: float
    original_context: int  # original_max_position_embeddings
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    attention_factor: float | None

    def scale(self, mscale: float) -> float:
        """YaRN's scale for longer contexts; `mscale` weighs it."""
        return 1.0 + 0.1 * mscale * math.log(self.factor) if self.factor > 1 else 1.0

    @property
    def rotated(self) -> float:
        """What the rotated values are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.scale(self.mscale) / self.scale(self.mscale_all_dim)
        return self.scale(1.0)

    @property
    def attn_factor(self) -> float:
        """Makes `rotated` of what llama.cpp multiplies the rotated values by, scale(1) / scale(mscale_all_dim)."""
        return self.rotated * self.scale(self.mscale_all_dim or 0.0) / self.scale(1.0)


@dataclass(frozen=True, kw_only=True)
class Ling3Config(ModelConfig):
    """`layers` are the main ones, without those that predict further tokens."""

    shared_expert_size: int  # width of the shared experts together
    swiglu_limits: tuple[float, ...]  # of the routed experts, one per layer, MTP included; 0: not clamped
    shared_swiglu_limits: tuple[float, ...]  # the same of the shared experts
    yarn: Yarn | None
    open_layers: int = 0  # last layers whose kind the config leaves open: those after the last whole group
    mtp_left_out: str | None = None  # why the file has no MTP layer although the config names one


SUPPORTED: Final[Supported] = (
    (("hidden_act",), "silu", "its activation is always SiLU"),
    (("score_function", "scoring_func"), "sigmoid", "its router is always a sigmoid"),
    (("topk_method",), "noaux_tc", "its router always adds a bias to the scores and keeps groups by their best two"),
    (("moe_router_enable_expert_bias",), True, "its router always has a bias"),
    (("scale_router_input",), False, "its router reads the input as it is"),
    (("no_kda_lora",), True, "the gates of its KDA layers have full rank"),
    (("use_kda_lora",), False, "the gates of its KDA layers have full rank"),
    (("kda_safe_gate",), True, "its log-gate is always bounded"),
    (("linear_silu",), True, "SiLU always follows the convolutions"),
    (("linear_attention",), "kda", "its linear attention is always KDA"),
    (("num_kv_heads_for_linear_attn",), 0, "KDA has as many key heads as query heads"),
    (("group_norm_size",), 1, "KDA's output is normalised per head"),
    (("gated_attention_proj_granularity_type",), "head_wise", "latent attention has one gate per head"),
    (("use_qk_norm",), True, "queries and keys of KDA are always normalised"),
    (("use_mla_nope",), False, "latent attention always has RoPE"),
    (("rope_interleave",), True, "RoPE always rotates neighbouring values"),
    (("mtp_use_kda",), False, "the layer for further tokens always has latent attention"),
    (("attention_bias", "use_bias"), False, "its projections have no bias"),
    (("use_qkv_bias",), False, "its projections have no bias"),
    (("use_nGPT",), False, "its weights and activations are not normalised as in nGPT"),
    (("up_proj_norm",), False, "its FFN has no norm inside"),
    (("value_norm",), False, "values are not normalised"),
    (("mrope_section",), None, "images are not supported"),
    (("vision_config",), None, "images are not supported"),
)  # fmt: skip
_ROPE_KEYS: Final = frozenset({
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
})  # fmt: skip


def read_config(keys: Keys) -> Ling3Config:
    """The config of either form, checked. Raises `ConvertError`."""
    check_supported(keys, SUPPORTED)
    num_layers = keys.integer("num_hidden_layers", high=MAX_LAYERS - 1)
    groups = keys.integer("n_group", "num_expert_group", default=1)
    num_mtp = keys.integer("num_nextn_predict_layers", "num_mtp_layers", low=0, default=0)
    todo = "llama.cpp predicts one further token at most"
    keys.require(num_mtp <= 1, "num_nextn_predict_layers", "0 or 1", num_mtp, todo)
    layers, open_layers = _layers(keys, num_layers)
    rope = keys.integer("qk_rope_head_dim")
    keys.require(rope % 2 == 0, "qk_rope_head_dim", "an even number", rope)
    num_dense = dense_layers(keys, num_layers)
    expert = keys.integer("moe_intermediate_size")
    shared = keys.integer("num_shared_experts", "n_shared_experts")
    shared_width = keys.integer("moe_shared_expert_intermediate_size", default=expert)
    expected = f"at most {MAX_INT // shared_width} of width {shared_width}"
    keys.require(shared * shared_width <= MAX_INT, "num_shared_experts", expected, shared)
    config = Ling3Config(
        **common_fields(keys, groups),
        forms=read_forms(keys),
        architecture=ARCHITECTURE,
        context_length=keys.integer("max_position_embeddings", "model_max_length"),
        layers=layers,
        kda_num_heads=keys.integer("linear_num_heads", "num_attention_heads"),
        kda_head_dim=_kda_head_dim(keys, rope),
        conv_kernel_size=keys.integer("short_conv_kernel_size", "linear_conv_kernel_dim", low=2),
        kda_lower_bound=keys.negative("kda_lower_bound"),
        rope_theta=keys.number("rope_theta", f"{ROPE}.rope_theta"),
        num_dense_layers=num_dense,
        num_experts=keys.integer("num_experts", "num_local_experts", high=MAX_EXPERTS),
        num_experts_per_token=keys.integer("num_experts_per_tok", "num_experts_per_token"),
        num_shared_experts=shared,
        renormalize=_renormalize(keys),
        num_mtp_layers=num_mtp,
        shared_expert_size=shared * shared_width,
        swiglu_limits=_limits(keys, "expert_swiglu_limit_list", num_layers + num_mtp, num_dense),
        shared_swiglu_limits=_limits(keys, "share_expert_swiglu_limit_list", num_layers + num_mtp, num_dense),
        yarn=_yarn(keys),
        open_layers=open_layers,
    )
    _check_widths(keys, config)
    check_heads(keys, config)
    check_experts(keys, config)
    return config


def _layers(keys: Keys, num_layers: int) -> tuple[tuple[LayerKind, ...], int]:
    """The kind of each layer, and how many of the last ones the config leaves open.

    In transformers the layers after the last whole group have KDA, in llama.cpp's converter and in vLLM latent
    attention. The tensors decide (`stored`); until then they have KDA.
    """
    size = keys.integer("layer_group_size")
    if keys.get("layer_types") is not None:
        return layer_kinds(keys, num_layers), 0
    kinds = tuple(LayerKind.KDA if (i + 1) % size else LayerKind.MLA for i in range(num_layers))
    return kinds, num_layers % size


def _kda_head_dim(keys: Keys, rope: int) -> int:
    """The width of a KDA head. transformers saves it as `linear_head_dim`, and the width of RoPE as `head_dim`."""
    width = keys.integer("linear_head_dim", default=None)
    head_dim: int = keys.integer("head_dim", default=ABSENT if width is None else width)
    if width is None:
        return head_dim
    expected = f"{width}, as linear_head_dim, or {rope}, as qk_rope_head_dim"
    keys.require(head_dim in (width, rope), "head_dim", expected, head_dim)
    return int(width)


def _renormalize(keys: Keys) -> bool:
    value = keys.get("norm_topk_prob", "moe_renormalize")
    keys.require(value is None or type(value) is bool, "norm_topk_prob", "true or false", value)
    return value is not False


def _limits(keys: Keys, name: str, num_layers: int, num_dense: int) -> tuple[float, ...]:
    """The limits of a clamped SwiGLU, one per layer; a layer that the list does not reach is not clamped."""
    values = keys.get(name)
    if values is None:
        return (0.0,) * num_layers
    expected = f"a list of at most {num_layers} numbers from 0, or null"
    keys.require(isinstance(values, list) and len(values) <= num_layers, name, expected, values)
    for value in values:
        valid = value is None or (type(value) in (int, float) and (value == 0 or 1e-5 < value < 1e30))
        keys.require(valid, name, "0, or numbers from 1e-5", value)
    limits = tuple(0.0 if value is None else float(value) for value in values)
    todo = "llama.cpp and other programs do not agree on the limits of dense layers"
    keys.require(not any(limits[:num_dense]), name, f"0 in the {num_dense} dense layers", values, todo)
    return limits + (0.0,) * (num_layers - len(limits))


def _yarn(keys: Keys) -> Yarn | None:
    """RoPE scaling of `rope_scaling` (the hub's) or `rope_parameters` (transformers'); both must agree."""
    for name in (SCALING, ROPE):
        strange = sorted(set(keys.data.get(name) or {}) - _ROPE_KEYS)
        if strange:
            key = f"{name}.{strange[0]}"
            raise keys.fail(
                key, "no such key", keys.data[key], "llama.cpp has no such setting for this model"
            )

    def names(key: str) -> tuple[str, str]:
        return f"{SCALING}.{key}", f"{ROPE}.{key}"

    def optional(key: str) -> float | None:
        return None if keys.get(*names(key)) is None else keys.number(*names(key))

    kind = keys.get(*names("type"), *names("rope_type"))
    if kind in (None, "default") and keys.get(*names("factor")) is None:
        return None
    todo = "llama.cpp's loader for this model knows no other scaling"
    keys.require(kind == "yarn", f"{SCALING}.type", "'yarn', or no rope_scaling", kind, todo)
    yarn = Yarn(
        factor=keys.number(*names("factor")),
        original_context=keys.integer(*names("original_max_position_embeddings")),
        beta_fast=keys.number(*names("beta_fast"), default=BETA_FAST),
        beta_slow=keys.number(*names("beta_slow"), default=BETA_SLOW),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        attention_factor=optional("attention_factor"),
    )
    keys.require(yarn.factor >= 1, f"{SCALING}.factor", "at least 1", yarn.factor)
    fast, slow = yarn.beta_fast, yarn.beta_slow
    keys.require(fast >= slow, f"{SCALING}.beta_fast", f"at least beta_slow, {slow:g}", fast)
    expected = "mscale, mscale_all_dim and attention_factor that give a factor below 1e30"
    keys.require(yarn.attn_factor < 1e30, SCALING, expected, yarn.attn_factor)
    return yarn


def _check_widths(keys: Keys, config: Ling3Config) -> None:
    """Keys that repeat a width must say the same."""
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    for name, width in (("qk_head_dim", nope + rope), ("rotary_dim", rope)):
        found = keys.integer(name, default=width)
        keys.require(found == width, name, f"{width}, by qk_nope_head_dim and qk_rope_head_dim", found)


def stored(config: ModelConfig, names: Collection[str], mtp: bool) -> ModelConfig:
    """The config of a checkpoint with tensors of these names. They decide the kind of the open layers. Without tensors
    of an MTP layer, or with `mtp` false, there is no such layer."""
    assert isinstance(config, Ling3Config)
    latent = {name.rsplit(".", 3)[0] for name in names if name.endswith(".kv_a_proj_with_mqa.weight")}
    kinds = list(config.layers)
    for i in range(len(kinds) - config.open_layers, len(kinds)):
        kinds[i] = LayerKind.MLA if f"model.layers.{i}" in latent else LayerKind.KDA
    config = replace(config, layers=tuple(kinds), open_layers=0)
    if config.num_mtp_layers == 0:
        return config
    there = any(name.startswith(_mtp_prefix(config)) for name in names)
    if there and mtp:
        return config
    why = "--no-mtp" if there else "the checkpoint does not contain its tensors"
    count = len(config.layers)
    return replace(
        config,
        num_mtp_layers=0,
        mtp_left_out=why,
        swiglu_limits=config.swiglu_limits[:count],
        shared_swiglu_limits=config.shared_swiglu_limits[:count],
    )


def _mtp_prefix(config: ModelConfig) -> str:
    return f"model.layers.{len(config.layers)}."


def left_out(config: ModelConfig) -> tuple[str, ...]:
    """The beginnings of the names of tensors that the file leaves out."""
    assert isinstance(config, Ling3Config)
    return (_mtp_prefix(config),) if config.mtp_left_out else ()


def notes(config: ModelConfig) -> Iterator[str]:
    """What a user should know about the file."""
    assert isinstance(config, Ling3Config)
    if config.mtp_left_out:
        yield f"the layer that predicts a further token is left out: {config.mtp_left_out}"
    if config.yarn and config.yarn.mscale_all_dim:
        yield "YaRN with mscale_all_dim: upstream llama.cpp ignores it and computes other logits"
    if config.yarn and (config.yarn.beta_fast, config.yarn.beta_slow) != (BETA_FAST, BETA_SLOW):
        yield (
            f"YaRN with beta_fast {config.yarn.beta_fast:g} and beta_slow {config.yarn.beta_slow:g}: upstream "
            f"llama.cpp uses {BETA_FAST:g} and {BETA_SLOW:g} and computes other logits"
        )


def own_keys(config: ModelConfig) -> Iterator[Key]:
    """The GGUF keys that only this family has; names as in llama.cpp's converter."""
    assert isinstance(config, Ling3Config)

    def key(name: str, kind: ValueType, value: Any, items: ValueType | None = None) -> Key:
        return Key(f"{ARCHITECTURE}.{name}", kind, value, items)

    yield key("kda.safe_gate", ValueType.BOOL, True)
    yield key("kda.gate_lower_bound", ValueType.FLOAT32, config.kda_lower_bound)
    yield u32(f"{ARCHITECTURE}.expert_shared_feed_forward_length", config.shared_expert_size)
    limits = (("swiglu_clamp_exp", config.swiglu_limits), ("swiglu_clamp_shexp", config.shared_swiglu_limits))
    for name, values in limits:
        if any(values):
            yield key(name, ValueType.ARRAY, list(values), ValueType.FLOAT32)
    if config.num_mtp_layers:
        yield u32(f"{ARCHITECTURE}.nextn_predict_layers", config.num_mtp_layers)
    if (yarn := config.yarn) is None:
        return
    yield key("rope.scaling.type", ValueType.STRING, "yarn")
    yield key("rope.scaling.factor", ValueType.FLOAT32, yarn.factor)
    yield u32(f"{ARCHITECTURE}.rope.scaling.original_context_length", yarn.original_context)
    yield key("rope.scaling.yarn_beta_fast", ValueType.FLOAT32, yarn.beta_fast)
    yield key("rope.scaling.yarn_beta_slow", ValueType.FLOAT32, yarn.beta_slow)
    if yarn.mscale_all_dim:
        yield key("rope.scaling.yarn_log_multiplier", ValueType.FLOAT32, 0.1 * yarn.mscale_all_dim)
    if yarn.mscale_all_dim or yarn.attn_factor != 1:
        yield key("rope.scaling.attn_factor", ValueType.FLOAT32, yarn.attn_factor)


def sizes(config: ModelConfig) -> dict[str, int]:
    """Words of the table's shapes beyond the common ones."""
    assert isinstance(config, Ling3Config)
    return {"shared": config.shared_expert_size, "two_hidden": 2 * config.hidden_size}


FAMILY: Final = Family(
    title="Ling 3",
    architecture=ARCHITECTURE,
    model_types=("bailing_hybrid",),
    read_config=read_config,
    table=Table(EMBEDDING, LAYERS, (NORM,), HEAD, sizes),
    rules=RULES,
    load_vocab=load_bpe_vocab,
    own_keys=own_keys,
    float32=(*FLOAT32, ".expert_bias"),
    stored=stored,
    left_out=left_out,
    notes=notes,
    not_quantized=("ssm_beta.weight", "attn_gate.weight"),
    at_least_q8_0=KDA_GATES,
    mxfp4_only_ffn=True,
)
