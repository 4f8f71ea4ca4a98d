"""The tensors of Ling 3 by the hub's names, what each becomes in a GGUF file, and the other layouts of a checkpoint.

Output: `EMBEDDING`, `LAYERS`, `NORM`, `HEAD` for a `Table`, and `RULES`. Words of shapes are those of `dimensions` and
of `sizes` in ling3.py.

Sources: llama.cpp's loader for `bailingmoe3`; `conversion_mapping.py` of transformers 5.23.
"""

from __future__ import annotations

from typing import Final

from kimi_gguf.convert.model.layouts import Rule
from kimi_gguf.convert.model.tensor_table import Group, Row, Transform, f32, is_kda, is_mla

EMBEDDING: Final = Row("model.word_embeddings.weight", "vocab hidden", "token_embd.weight")
NORM: Final = f32("model.norm.weight", "hidden", "output_norm.weight")
HEAD: Final = Row("lm_head.weight", "vocab hidden", "output.weight")
LAYERS: Final = (
    Group(lambda config, layer: True, "", (
        f32("input_layernorm.weight", "hidden", "attn_norm.weight"),
        f32("post_attention_layernorm.weight", "hidden", "ffn_norm.weight"),
    )),
    Group(is_kda, "attention.", (
        *(Row(f"{x}_proj.weight", "kda hidden", f"attn_{x}.weight") for x in "qkv"),
        *(f32(f"{x}_conv1d.weight", "kda 1 conv", f"ssm_conv1d_{x}.weight", "conv 1 kda 1") for x in "qkv"),
        Row("f_proj.weight", "kda hidden", "ssm_f_a.weight"),
        f32("dt_bias", "kda", "ssm_dt.bias"),
        f32("A_log", "kda_heads", "ssm_a", "1 kda_heads", Transform.EXP),
        Row("b_proj.weight", "kda_heads hidden", "ssm_beta.weight"),
        Row("g_proj.weight", "kda hidden", "ssm_g_a.weight"),
        f32("o_norm.weight", "kda_head", "ssm_norm.weight"),
        Row("o_proj.weight", "hidden kda", "attn_output.weight"),
    )),
    Group(lambda config, layer: is_mla(config, layer) and config.q_lora_rank is None, "attention.", (
        Row("q_proj.weight", "mla_q hidden", "attn_q.weight"),
    )),
    Group(lambda config, layer: is_mla(config, layer) and config.q_lora_rank is not None, "attention.", (
        Row("q_a_proj.weight", "q_rank hidden", "attn_q_a.weight"),
        f32("q_a_layernorm.weight", "q_rank", "attn_q_a_norm.weight"),
        Row("q_b_proj.weight", "mla_q q_rank", "attn_q_b.weight"),
    )),
    Group(is_mla, "attention.", (
        Row("kv_a_proj_with_mqa.weight", "latent_rope hidden", "attn_kv_a_mqa.weight"),
        f32("kv_a_layernorm.weight", "latent", "attn_kv_a_norm.weight"),
        Row("kv_b_proj.weight", "mla_kv latent", "attn_k_b.weight", "nope latent heads", Transform.K_OF_KV),
        Row("kv_b_proj.weight", "mla_kv latent", "attn_v_b.weight", "latent v heads", Transform.V_OF_KV),
        Row("g_proj.weight", "heads hidden", "attn_gate.weight"),
        Row("dense.weight", "hidden mla_v", "attn_output.weight"),
    )),
    Group(lambda config, layer: layer < config.num_dense_layers, "mlp.", (
        Row("gate_proj.weight", "ffn hidden", "ffn_gate.weight"),
        Row("up_proj.weight", "ffn hidden", "ffn_up.weight"),
        Row("down_proj.weight", "hidden ffn", "ffn_down.weight"),
    )),
    Group(lambda config, layer: layer >= config.num_dense_layers, "mlp.", (
        f32("gate.weight", "experts hidden", "ffn_gate_inp.weight"),
        f32("gate.expert_bias", "experts", "exp_probs_b.bias"),
        Row("experts.{e}.gate_proj.weight", "expert hidden", "ffn_gate_exps.weight", "hidden expert experts"),
        Row("experts.{e}.up_proj.weight", "expert hidden", "ffn_up_exps.weight", "hidden expert experts"),
        Row("experts.{e}.down_proj.weight", "hidden expert", "ffn_down_exps.weight", "expert hidden experts"),
        Row("shared_experts.gate_proj.weight", "shared hidden", "ffn_gate_shexp.weight"),
        Row("shared_experts.up_proj.weight", "shared hidden", "ffn_up_shexp.weight"),
        Row("shared_experts.down_proj.weight", "hidden shared", "ffn_down_shexp.weight"),
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
_SELF: Final = r"\g<layer>.self_attn."
_SAME: Final = (  # under `attention` and `self_attn` alike
    r"([qkvbg]_proj|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj|o_norm|o_proj|q_a_layernorm|kv_a_layernorm)\.weight"
)

RULES: Final = (
    # transformers' save_pretrained
    Rule(_ATTN + r"o_proj\.weight", r"\g<layer>.attention.dense.weight"),
    # transformers' in-memory names
    Rule(r"model\.word_embeddings\.weight", "model.embed_tokens.weight"),
    Rule(_ATTN + rf"(?P<rest>{_SAME})", _SELF + r"\g<rest>"),
    Rule(_ATTN + r"dense\.weight", _SELF + "o_proj.weight"),
    Rule(_ATTN + r"(?P<rest>f_proj\.weight|dt_bias|A_log)", _SELF + r"forget_gate.\g<rest>"),
    *(
        Rule(_ATTN + rf"{x}_conv1d\.weight", _SELF + "conv1d.weight", part=(i, 3))
        for i, x in enumerate("qkv")
    ),
    Rule(_LAYER + r"mlp\.gate\.expert_bias", r"\g<layer>.mlp.gate.e_score_correction_bias"),
    Rule(_EXPERT + r"gate_proj\.weight", r"\g<layer>.mlp.experts.gate_up_proj", experts=True, part=(0, 2)),
    Rule(_EXPERT + r"up_proj\.weight", r"\g<layer>.mlp.experts.gate_up_proj", experts=True, part=(1, 2)),
    Rule(_EXPERT + r"down_proj\.weight", r"\g<layer>.mlp.experts.down_proj", experts=True),
)
