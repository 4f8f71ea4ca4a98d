"""The tensors of Ling 3 by the hub's names, what each becomes in a GGUF file, and the other layouts of a checkpoint.

Output: `EMBEDDING` and `LAYERS` for a `Table`, and `RULES`. Words of shapes are those of `dimensions` and
of `sizes` in ling3.py.

Sources: llama.cpp's loader for `bailingmoe3`; `conversion_mapping.py` of transformers 5.23.
"""

from __future__ import annotations

from typing import Final

from kimi_gguf.convert.model.common_tensors import (
    DENSE_FFN,
    KDA_QKV,
    LAYER_NORMS,
    MLA_KV,
    SHARED_EXPERTS,
    mla_queries,
)
from kimi_gguf.convert.model.layouts import Rule
from kimi_gguf.convert.model.tensor_table import Group, Row, Transform, f32, is_kda, is_mla

EMBEDDING: Final = Row("model.word_embeddings.weight", "vocab hidden", "token_embd.weight")
LAYERS: Final = (
    LAYER_NORMS,
    Group(is_kda, "attention.", (
        *KDA_QKV,
        Row("f_proj.weight", "kda hidden", "ssm_f_a.weight"),
        f32("dt_bias", "kda", "ssm_dt.bias"),
        f32("A_log", "kda_heads", "ssm_a", "1 kda_heads", Transform.EXP),
        Row("b_proj.weight", "kda_heads hidden", "ssm_beta.weight"),
        Row("g_proj.weight", "kda hidden", "ssm_g_a.weight"),
        f32("o_norm.weight", "kda_head", "ssm_norm.weight"),
        Row("o_proj.weight", "hidden kda", "attn_output.weight"),
    )),
    *mla_queries("attention."),
    Group(is_mla, "attention.", (
        *MLA_KV,
        Row("g_proj.weight", "heads hidden", "attn_gate.weight"),
        Row("dense.weight", "hidden mla_v", "attn_output.weight"),
    )),
    DENSE_FFN,
    Group(lambda config, layer: layer >= config.num_dense_layers, "mlp.", (
        f32("gate.weight", "experts hidden", "ffn_gate_inp.weight"),
        f32("gate.expert_bias", "experts", "exp_probs_b.bias"),
        Row("experts.{e}.gate_proj.weight", "expert hidden", "ffn_gate_exps.weight", "hidden expert experts"),
        Row("experts.{e}.up_proj.weight", "expert hidden", "ffn_up_exps.weight", "hidden expert experts"),
        Row("experts.{e}.down_proj.weight", "hidden expert", "ffn_down_exps.weight", "expert hidden experts"),
        *SHARED_EXPERTS,
    )),
    Group(lambda config, layer: layer >= len(config.layers), "", (
        Row("eh_proj.weight", "hidden two_hidden", "nextn.eh_proj.weight"),
        f32("enorm.weight", "hidden", "nextn.enorm.weight"),
        f32("hnorm.weight", "hidden", "nextn.hnorm.weight"),
        f32("final_layernorm.weight", "hidden", "layer_output_norm.weight"),
    )),
)  # fmt: skip

# The layouts besides the hub's: transformers' `save_pretrained` (hub names, but every attention output is `dense`);
# transformers' in-memory names (`self_attn`, `forget_gate`, q, k and v convolutions in one tensor, experts in one
# tensor). transformers drops the MTP layer.
_LAYER: Final = r"(?P<layer>model\.layers\.\d+)\."
_ATTN: Final = _LAYER + r"attention\."
_EXPERT: Final = _LAYER + r"mlp\.experts\.(?P<e>\d+)\."
_SELF: Final = "{layer}.self_attn."
_SAME: Final = (  # under `attention` and `self_attn` alike
    r"([qkvbg]_proj|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj|o_norm|o_proj|q_a_layernorm|kv_a_layernorm)\.weight"
)

RULES: Final = (
    # transformers' save_pretrained
    Rule(_ATTN + r"o_proj\.weight", "{layer}.attention.dense.weight"),
    # transformers' in-memory names
    Rule(r"model\.word_embeddings\.weight", "model.embed_tokens.weight"),
    Rule(_ATTN + rf"(?P<rest>{_SAME})", _SELF + "{rest}"),
    Rule(_ATTN + r"dense\.weight", _SELF + "o_proj.weight"),
    Rule(_ATTN + r"(?P<rest>f_proj\.weight|dt_bias|A_log)", _SELF + "forget_gate.{rest}"),
    *(
        Rule(_ATTN + rf"{x}_conv1d\.weight", _SELF + "conv1d.weight", part=(i, 3))
        for i, x in enumerate("qkv")
    ),
    Rule(_LAYER + r"mlp\.gate\.expert_bias", "{layer}.mlp.gate.e_score_correction_bias"),
    Rule(_EXPERT + r"gate_proj\.weight", "{layer}.mlp.experts.gate_up_proj", experts=True, part=(0, 2)),
    Rule(_EXPERT + r"up_proj\.weight", "{layer}.mlp.experts.gate_up_proj", experts=True, part=(1, 2)),
    Rule(_EXPERT + r"down_proj\.weight", "{layer}.mlp.experts.down_proj", experts=True),
)
