"""Kimi K3 (`kimi_k3`, llama.cpp's architecture `kimi-k3`): the text model's config.json, tensors, layouts.

Beyond Kimi-Linear: residual attention over blocks of layers, experts in a latent space, the activation SiTU, a gate on
the output of latent attention, a KDA output gate of full rank, and routed experts in MXFP4. The text model's config is
`text_config` in that of a multimodal model. Its tensors' names begin with `language_model.`; others are ignored.

Sources: the published config.json and tensor names; llama.cpp's loader and converter for `kimi-k3`; compressed-tensors'
format `mxfp4-pack-quantized`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gguf import GGUFValueType as ValueType

from kimi_gguf.convert.model.common_tensors import (
    DENSE_FFN,
    HEAD,
    KDA_GATES,
    KDA_QKV,
    LAYER_NORMS,
    MLA_KV,
    NORM,
    SHARED_EXPERTS,
    mla_queries,
)
from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.config_keys import (
    LINEAR,
    MAX_EXPERTS,
    MAX_LAYERS,
    ROPE,
    Keys,
    Supported,
    boolean,
    check_experts,
    check_heads,
    check_supported,
    common_fields,
    dense_layers,
    layer_kinds,
)
from kimi_gguf.convert.model.family import Family
from kimi_gguf.convert.model.gguf_key import Key, u32
from kimi_gguf.convert.model.layouts import Rule
from kimi_gguf.convert.model.quantization import mxfp4_experts
from kimi_gguf.convert.model.tensor_table import Group, Row, Table, Transform, f32, is_kda, is_mla
from kimi_gguf.convert.model.vocab import Vocab, load_tiktoken_vocab
from kimi_gguf.convert.source.mxfp4 import GROUP

ARCHITECTURE: Final = "kimi-k3"


@dataclass(frozen=True, kw_only=True)
class K3Config(ModelConfig):
    """The text model; canonical tensor names have no `language_model.` in front."""

    routed_hidden_size: int | None  # width of the space of the routed experts; None: hidden_size
    situ_beta: float  # situ(g, u) = beta tanh(g / beta) sigmoid(g) * linear_beta tanh(u / linear_beta)
    situ_linear_beta: float  # 0 or less: u is not changed
    attn_res_block_size: int  # layers of a block of residual attention; 0: ordinary residuals
    mla_output_gate: bool = True  # latent attention has a gate on its output
    routed_norm: bool = True  # the sum of the routed experts is normalized in their space


SUPPORTED: Final[Supported] = (
    (("hidden_act",), "situ", "its activation is always SiTU"),
    (("moe_router_activation_func",), "sigmoid", "its router is always a sigmoid"),
    (("topk_method",), "noaux_tc", "its router always adds a bias to the scores"),
    (("moe_layer_freq",), 1, "every layer after the dense ones is a mixture of experts"),
    (("mla_use_nope",), True, "it never rotates queries and keys"),
    ((f"{LINEAR}.use_full_rank_gate",), True, "KDA's output gate has full rank"),
    (("attention_bias",), False, "its projections have no bias"),
    (("num_nextn_predict_layers",), 0, "it has no layers that predict further tokens"),
    (("rope_scaling",), None, "it never rotates queries and keys"),
    (("rope_parameters.rope_type",), "default", "it never rotates queries and keys"),
)
# Settings whose absence means something else than the only supported value, or is not known to mean it.
REQUIRED: Final = ("hidden_act", "mla_use_nope", f"{LINEAR}.use_full_rank_gate")
# Keys of the text model that the outer config may repeat, or have alone.
REPEATED: Final = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "quantization_config",
)


def read_config(keys: Keys) -> K3Config:
    """The text model's config, checked. Raises `ConvertError`."""
    keys = _text_keys(keys)
    check_supported(keys, SUPPORTED)
    for name in REQUIRED:
        keys.require(keys.get(name) is not None, name, "a value", None)
    num_layers = keys.integer("num_hidden_layers", high=MAX_LAYERS)
    groups = keys.integer("num_expert_group", "n_group", default=1)
    linear_beta = keys.get("activation_situ_linear_beta")
    config = K3Config(
        **common_fields(keys, groups),
        architecture=ARCHITECTURE,
        context_length=keys.integer("max_position_embeddings", "model_max_length"),
        layers=layer_kinds(keys, num_layers),
        kda_num_heads=keys.integer(f"{LINEAR}.num_heads"),
        kda_head_dim=keys.integer(f"{LINEAR}.head_dim"),
        conv_kernel_size=keys.integer(f"{LINEAR}.short_conv_kernel_size", low=2),
        kda_lower_bound=_lower_bound(keys),
        rope_theta=keys.number("rope_theta", f"{ROPE}.rope_theta", default=10000.0),
        mla_output_gate=boolean(keys, "mla_use_output_gate", default=False),
        num_dense_layers=dense_layers(keys, num_layers),
        num_experts=keys.integer("num_experts", "num_local_experts", "n_routed_experts", high=MAX_EXPERTS),
        num_experts_per_token=keys.integer("num_experts_per_token", "num_experts_per_tok"),
        num_shared_experts=keys.integer("num_shared_experts", "n_shared_experts", low=0),
        renormalize=boolean(keys, "moe_renormalize", default=True),
        routed_hidden_size=keys.integer("routed_expert_hidden_size", default=None),
        routed_norm=boolean(keys, "latent_moe_use_norm", default=False),
        situ_beta=keys.number("activation_situ_beta"),
        situ_linear_beta=0.0 if linear_beta is None else keys.number("activation_situ_linear_beta"),
        attn_res_block_size=keys.integer("attn_res_block_size", low=0, default=0),
        mxfp4_experts=mxfp4_experts(keys),
    )
    check_heads(keys, config)
    check_experts(keys, config)
    if config.mxfp4_experts:
        todo = "weights in MXFP4 come in groups"
        expected = f"a multiple of {GROUP}"
        for name, size in (
            ("moe_intermediate_size", config.moe_intermediate_size),
            ("routed_expert_hidden_size", _routed(config)),
        ):
            keys.require(size % GROUP == 0, name, expected, size, todo)
    return config


def _text_keys(keys: Keys) -> Keys:
    """The keys of the text model, with those that the outer config repeats."""
    text = keys.get("text_config")
    if not isinstance(text, Mapping):
        raise keys.fail("text_config", "an object", text)
    inner = dict(text)
    for name in REPEATED:
        outer = keys.get(name)
        if outer is not None and inner.get(name, outer) not in (None, outer):
            raise keys.fail(f"text_config.{name}", f"{outer!r:.80}, as outside of it", inner[name])
        if inner.get(name) is None:
            inner[name] = outer
    return Keys(inner, f"{keys.where}: text_config")


def _lower_bound(keys: Keys) -> float:
    todo = "without a bound llama.cpp computes another gate, for which no checkpoint is known"
    return keys.negative(f"{LINEAR}.gate_lower_bound", todo)


def _routed(config: ModelConfig) -> int:
    """Width of the space of the routed experts."""
    assert isinstance(config, K3Config)
    return config.routed_hidden_size or config.hidden_size


def _residual(config: ModelConfig, layer: int = 0) -> bool:
    return isinstance(config, K3Config) and config.attn_res_block_size > 0


def _gated_mla(config: ModelConfig, layer: int) -> bool:
    return isinstance(config, K3Config) and config.mla_output_gate and is_mla(config, layer)


def _moe(config: ModelConfig, layer: int) -> bool:
    return layer >= config.num_dense_layers


def _latent_moe(config: ModelConfig, layer: int) -> bool:
    return isinstance(config, K3Config) and config.routed_hidden_size is not None and _moe(config, layer)


def _normed_moe(config: ModelConfig, layer: int) -> bool:
    return isinstance(config, K3Config) and config.routed_norm and _latent_moe(config, layer)


def _score(hub: str, gguf: str) -> Row:
    """Weights of the scores of residual attention: norm and projection are only used as their product."""
    factor = f"{hub}_proj.weight", "1 hidden"
    return f32(f"{hub}_norm.weight", "hidden", gguf, transform=Transform.PRODUCT, factor=factor)


EMBEDDING: Final = Row("model.embed_tokens.weight", "vocab hidden", "token_embd.weight")
LAYERS: Final = (
    LAYER_NORMS,
    Group(_residual, "", (
        _score("self_attention_res", "attn_res_score.weight"),
        _score("mlp_res", "ffn_res_score.weight"),
    )),
    Group(is_kda, "self_attn.", (
        *KDA_QKV,
        Row("f_a_proj.weight", "kda_head hidden", "ssm_f_a.weight"),
        Row("f_b_proj.weight", "kda kda_head", "ssm_f_b.weight"),
        f32("dt_bias", "kda", "ssm_dt.bias"),
        f32("A_log", "kda_heads", "ssm_a", transform=Transform.NEG_EXP),
        Row("b_proj.weight", "kda_heads hidden", "ssm_beta.weight"),
        Row("g_proj.weight", "kda hidden", "ssm_g.weight"),
        f32("o_norm.weight", "kda_head", "ssm_norm.weight"),
        Row("o_proj.weight", "hidden kda", "attn_output.weight"),
    )),
    *mla_queries("self_attn."),
    Group(is_mla, "self_attn.", (
        *MLA_KV,
        Row("o_proj.weight", "hidden mla_v", "attn_output.weight"),
    )),
    Group(_gated_mla, "self_attn.", (
        Row("g_proj.weight", "mla_v hidden", "attn_gate.weight"),
    )),
    DENSE_FFN,
    Group(_moe, "block_sparse_moe.", (
        f32("gate.weight", "experts hidden", "ffn_gate_inp.weight"),
        f32("gate.e_score_correction_bias", "experts", "exp_probs_b.bias"),
        Row("experts.{e}.w1.weight", "expert routed", "ffn_gate_exps.weight", "routed expert experts"),
        Row("experts.{e}.w3.weight", "expert routed", "ffn_up_exps.weight", "routed expert experts"),
        Row("experts.{e}.w2.weight", "routed expert", "ffn_down_exps.weight", "expert routed experts"),
        *SHARED_EXPERTS,
    )),
    Group(_latent_moe, "block_sparse_moe.", (
        Row("routed_expert_down_proj.weight", "routed hidden", "ffn_routed_down.weight"),
        Row("routed_expert_up_proj.weight", "hidden routed", "ffn_routed_up.weight"),
    )),
    Group(_normed_moe, "block_sparse_moe.", (
        f32("routed_expert_norm.weight", "routed", "ffn_routed_norm.weight"),
    )),
)  # fmt: skip
OUTPUT_SCORE: Final = _score("model.output_attn_res", "output_res_score.weight")

# The published layout has the prefix; without it, the text model was saved alone. Either may have packed experts.
PREFIX: Final = "language_model."
_EXPERT: Final = r"(?P<expert>model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w[123]\.weight)"
RULES: Final = (
    Rule(r"(?P<name>.+)", f"{PREFIX}{{name}}"),
    *(
        Rule(_EXPERT, f"{prefix}{{expert}}_packed", scales=f"{prefix}{{expert}}_scale")
        for prefix in (PREFIX, "")
    ),
)


def own_keys(config: ModelConfig) -> Iterator[Key]:
    """The keys that only this architecture has."""
    assert isinstance(config, K3Config)
    if config.routed_hidden_size is not None:
        yield u32(f"{ARCHITECTURE}.expert_latent_length", config.routed_hidden_size)
    yield u32(f"{ARCHITECTURE}.attn_res.block_size", config.attn_res_block_size)
    floats: tuple[tuple[str, Any], ...] = (
        ("kda.gate_lower_bound", config.kda_lower_bound),
        ("activation.situ_beta", config.situ_beta),
        ("activation.situ_linear_beta", config.situ_linear_beta),
    )
    yield from (Key(f"{ARCHITECTURE}.{name}", ValueType.FLOAT32, value) for name, value in floats)


def load_vocab(folder: Path, config: ModelConfig) -> Vocab:
    """The vocabulary; the token that ends an answer also ends a turn. Raises `ConvertError`."""
    vocab = load_tiktoken_vocab(folder, config)
    return replace(vocab, eot_id=vocab.eos_id)


def _last(config: ModelConfig) -> tuple[Row, ...]:
    return (NORM, OUTPUT_SCORE) if _residual(config) else (NORM,)


FAMILY: Final = Family(
    title="Kimi K3",
    architecture=ARCHITECTURE,
    model_types=("kimi_k3",),
    read_config=read_config,
    table=Table(EMBEDDING, LAYERS, _last, HEAD, sizes=lambda config: {"routed": _routed(config)}),
    load_vocab=load_vocab,
    rules=RULES,
    own_keys=own_keys,
    ignored=("vision_tower.", "mm_projector."),
    template="https://github.com/ggml-org/llama.cpp/blob/master/models/templates/Kimi-K3.jinja",
    padded=(".A_log",),
    not_quantized=("ssm_beta.weight",),
    at_least_q8_0=KDA_GATES,
)
