"""Kimi-Linear: its config.json, its tensors, its layouts.

The config has two forms. The hub's counts layers from 1 in `linear_attn_config`; transformers' native form counts
from 0 in `layer_types` and has flat `linear_*` keys. transformers re-saves a hub config with both: then both must say
the same.

Sources: the published checkpoint; llama.cpp's loader for `kimi-linear`; for the layouts `conversion_mapping.py` of
transformers 5.23.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any, Final

from kimi_gguf.convert.model.common_tensors import (
    DENSE_FFN,
    HEAD,
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
    check_experts,
    check_heads,
    check_supported,
    common_fields,
    dense_layers,
    layer_kinds,
)
from kimi_gguf.convert.model.family import Family
from kimi_gguf.convert.model.layouts import Rule
from kimi_gguf.convert.model.stored_forms import read_forms
from kimi_gguf.convert.model.tensor_table import Group, Row, Table, Transform, f32, is_kda, is_mla
from kimi_gguf.convert.model.vocab import load_tiktoken_vocab

SUPPORTED: Final[Supported] = (
    (("hidden_act",), "silu", "its activation is always SiLU"),
    (("moe_router_activation_func",), "sigmoid", "its router is always a sigmoid"),
    (("moe_renormalize", "norm_topk_prob"), True, "it always renormalises the chosen experts' weights"),
    (("moe_layer_freq",), 1, "every layer after the dense ones is a mixture of experts"),
    (("mla_use_nope",), True, "it never rotates queries and keys"),
    (("attention_bias",), False, "its projections have no bias"),
    (("num_nextn_predict_layers",), 0, "it has no layers that predict further tokens"),
    (("rope_scaling",), None, "it never rotates queries and keys"),
    (("rope_parameters.rope_type",), "default", "it never rotates queries and keys"),
)


def published_config() -> dict[str, Any]:
    """config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct."""
    text = resources.files(__package__).joinpath("kimi-linear-48b-config.json").read_text()
    config: dict[str, Any] = json.loads(text)
    return config


def read_config(keys: Keys) -> ModelConfig:
    """The config of either form, checked. Raises `ConvertError`."""
    check_supported(keys, SUPPORTED)
    if keys.get("layer_types") is None and keys.get("mla_use_nope") is None:
        # By default the hub's own code rotates; transformers' native form has no such key.
        why = "llama.cpp applies no RoPE to this model; set it to true if the model was trained without RoPE"
        raise keys.fail("mla_use_nope", "true", None, why)
    num_layers = keys.integer("num_hidden_layers", high=MAX_LAYERS)
    groups = keys.integer("num_expert_group", "n_group", default=1)
    config = ModelConfig(
        **common_fields(keys, groups),
        forms=read_forms(keys),
        architecture="kimi-linear",
        context_length=keys.integer("model_max_length", "max_position_embeddings"),
        layers=layer_kinds(keys, num_layers),
        kda_num_heads=keys.integer(f"{LINEAR}.num_heads", "linear_num_heads"),
        kda_head_dim=keys.integer(f"{LINEAR}.head_dim", "linear_head_dim"),
        conv_kernel_size=keys.integer(f"{LINEAR}.short_conv_kernel_size", "linear_conv_kernel_dim", low=2),
        rope_theta=keys.number("rope_theta", f"{ROPE}.rope_theta", default=10000.0),
        num_dense_layers=dense_layers(keys, num_layers),
        num_experts=keys.integer("num_experts", "num_local_experts", "n_routed_experts", high=MAX_EXPERTS),
        num_experts_per_token=keys.integer("num_experts_per_token", "num_experts_per_tok"),
        num_shared_experts=keys.integer("num_shared_experts", "n_shared_experts", low=0),
        renormalize=True,
    )
    check_heads(keys, config)
    check_experts(keys, config)
    return config


def notes(config: ModelConfig) -> Iterator[str]:
    """What a user should know about the file."""
    if config.q_lora_rank is not None:
        yield "query compression (q_lora_rank): upstream llama.cpp cannot load this model"


EMBEDDING: Final = Row("model.embed_tokens.weight", "vocab hidden", "token_embd.weight")
LAYERS: Final = (
    LAYER_NORMS,
    Group(is_kda, "self_attn.", (
        *KDA_QKV,
        Row("f_a_proj.weight", "kda_head hidden", "ssm_f_a.weight"),
        Row("f_b_proj.weight", "kda kda_head", "ssm_f_b.weight"),
        f32("dt_bias", "kda", "ssm_dt.bias"),
        f32("A_log", "1 1 kda_heads 1", "ssm_a", "1 kda_heads 1 1", Transform.NEG_EXP),
        Row("b_proj.weight", "kda_heads hidden", "ssm_beta.weight"),
        Row("g_a_proj.weight", "kda_head hidden", "ssm_g_a.weight"),
        Row("g_b_proj.weight", "kda kda_head", "ssm_g_b.weight"),
        f32("o_norm.weight", "kda_head", "ssm_norm.weight"),
        Row("o_proj.weight", "hidden kda", "attn_output.weight"),
    )),
    *mla_queries("self_attn."),
    Group(is_mla, "self_attn.", (
        *MLA_KV,
        Row("o_proj.weight", "hidden mla_v", "attn_output.weight"),
    )),
    DENSE_FFN,
    Group(lambda config, layer: layer >= config.num_dense_layers, "block_sparse_moe.", (
        f32("gate.weight", "experts hidden", "ffn_gate_inp.weight"),
        f32("gate.e_score_correction_bias", "experts", "exp_probs_b.bias"),
        Row("experts.{e}.w1.weight", "expert hidden", "ffn_gate_exps.weight", "hidden expert experts"),
        Row("experts.{e}.w3.weight", "expert hidden", "ffn_up_exps.weight", "hidden expert experts"),
        Row("experts.{e}.w2.weight", "hidden expert", "ffn_down_exps.weight", "expert hidden experts"),
        *SHARED_EXPERTS,
    )),
)  # fmt: skip

# The layouts besides the hub's: transformers' `save_pretrained` (hub names, but dense FFNs under `block_sparse_moe`);
# transformers' in-memory names (`forget_gate`, q, k and v convolutions in one tensor, experts in one tensor).
_LAYER: Final = r"(?P<layer>model\.layers\.\d+)\."
_ATTN: Final = _LAYER + r"self_attn\."
_MOE: Final = _LAYER + r"block_sparse_moe\."
_EXPERT: Final = _MOE + r"experts\.(?P<e>\d+)\."

RULES: Final = (
    # transformers' save_pretrained: every FFN under block_sparse_moe
    Rule(_LAYER + r"mlp\.(?P<rest>(gate|up|down)_proj\.weight)", "{layer}.block_sparse_moe.{rest}"),
    # transformers' in-memory names
    Rule(_MOE + r"(?P<rest>(gate|shared_experts)\..+)", "{layer}.mlp.{rest}"),
    Rule(_EXPERT + r"(?P<rest>w[123]\.weight)", "{layer}.mlp.experts.{e}.{rest}"),
    Rule(_EXPERT + r"w1\.weight", "{layer}.mlp.experts.gate_up_proj", experts=True, part=(0, 2)),
    Rule(_EXPERT + r"w3\.weight", "{layer}.mlp.experts.gate_up_proj", experts=True, part=(1, 2)),
    Rule(_EXPERT + r"w2\.weight", "{layer}.mlp.experts.down_proj", experts=True),
    Rule(_ATTN + r"(?P<rest>f_[ab]_proj\.weight|dt_bias|A_log)", "{layer}.self_attn.forget_gate.{rest}"),
    *(
        Rule(_ATTN + rf"{x}_conv1d\.weight", "{layer}.self_attn.conv1d.weight", part=(i, 3))
        for i, x in enumerate("qkv")
    ),
)

FAMILY: Final = Family(
    title="Kimi-Linear",
    architecture="kimi-linear",
    model_types=("kimi_linear",),
    read_config=read_config,
    table=Table(EMBEDDING, LAYERS, (NORM,), HEAD),
    rules=RULES,
    load_vocab=load_tiktoken_vocab,
    notes=notes,
    tokenizer_eos="`[EOS]`",
)
